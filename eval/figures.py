"""Curves of a run, drawn from its metrics.jsonl."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

logger = logging.getLogger(__name__)
# Okabe and Ito's colours, which people with any colour vision can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_NOT_LOSSES = frozenset(
    ("step", "samples", "lr", "grad_norm", "grad_norm_max", "mfu", "ema_distance")
    + ("skipped_steps", "loss_spikes", "rollbacks")
)
_GREY = "#8a8f98"
Row = dict[str, Any]


def read_metrics(run: Path) -> list[Row]:
    """The lines of a run's metrics.jsonl; a torn last one is left out.

    Raises:
        ValueError: if the run folder has none.
    """
    file = run / "metrics.jsonl"
    if not file.is_file():
        raise ValueError(f"{run}: no run folder (no metrics.jsonl in it)")
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            logger.warning("%s: a line that is no JSON is left out", file)
    return rows


def loss_names(rows: list[Row]) -> list[str]:
    """The total first, then every term."""
    names = {name for row in rows for name, value in row.items() if isinstance(value, int | float)}
    terms = sorted(name for name in names if _is_loss(name))
    return [name for name in ("loss",) if name in terms] + [name for name in terms if name != "loss"]


def _is_loss(name: str) -> bool:
    return (
        name not in _NOT_LOSSES
        and "/" not in name
        and not name.endswith(("_s", "_share", "_share_max", "_per_rank", "_bytes"))
    )


def loss_curves(rows: list[Row]) -> bytes:
    """The total loss and its terms over steps, one panel each: a PNG."""
    return _panels(rows, loss_names(rows))


def progress_curves(rows: list[Row]) -> bytes:
    """Learning rate, gradient norm and speed over steps, as far as they were written: a PNG."""
    names = [name for name in ("lr", "grad_norm", "samples_per_s") if any(name in row for row in rows)]
    return _panels(rows, names)


def _panels(rows: list[Row], names: list[str]) -> bytes:
    columns = min(4, max(1, len(names)))
    lines = max(1, -(-len(names) // columns))
    figure = Figure(figsize=(2.9 * columns, 2.2 * lines), layout="constrained")
    for index, name in enumerate(names):
        axes = figure.add_subplot(lines, columns, index + 1)
        points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
        steps, values = [p[0] for p in points], [p[1] for p in points]
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smoothed(values), color=colour, linewidth=1.6)
        axes.set_title(name.replace("_", " "), fontsize=10, loc="left")
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, colors=_GREY, labelcolor="#404550")
        # The first steps of a loss are far above the rest and would flatten it.
        if len(values) > 20 and name not in ("lr", "samples_per_s"):
            tail = sorted(values[len(values) // 20 :])
            low, high = tail[0], tail[int(0.99 * (len(tail) - 1))]
            margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
            axes.set_ylim(low - margin, high + margin)
        if index >= len(names) - columns:
            axes.set_xlabel("step", fontsize=8, color="#404550")
    return _png(figure)


def smoothed(values: list[float], share: float = 0.04) -> list[float]:
    """A running mean over about `share` of the points, centred and shorter at the ends."""
    half = max(1, int(len(values) * share / 2))
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def clock_curve(rows: list[Row]) -> bytes | None:
    """The loss by share of the run from noise to data, early and late in training: a PNG, or None."""
    lines = [row for row in rows if any(name.startswith("loss_by_clock/") for name in row)]
    if len(lines) < 2:
        return None
    figure = Figure(figsize=(4.6, 2.8), layout="constrained")
    axes = figure.add_subplot()
    tenth = max(1, len(lines) // 10)
    for label, part, colour in (("first tenth", lines[:tenth], COLOURS[1]), ("last tenth", lines[-tenth:], COLOURS[0])):
        means = []
        for index in range(10):
            found = [row[f"loss_by_clock/{index}"] for row in part if row.get(f"loss_by_clock/{index}") is not None]
            means.append(sum(found) / len(found) if found else float("nan"))
        axes.plot(
            [(index + 0.5) / 10 for index in range(10)], means, marker="o", markersize=3, color=colour, label=label
        )
    axes.set_title("loss by time, from noise (0) to data (1)", fontsize=10, loc="left")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8, frameon=False)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    return buffer.getvalue()
