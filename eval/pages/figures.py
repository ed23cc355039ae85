"""Figures of the pages: curves of runs and scores. Each function returns a PNG."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image, ImageDraw

from eval.pages.run_metrics import Row

# Colours of Okabe and Ito: they are distinct with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_GREY = "#8a8f98"


def panel(runs: Mapping[str, list[Row]], name: str) -> bytes:
    """A metric over steps. Each run has a colour; its values are drawn raw and smoothed."""
    figure = Figure(figsize=(4.2, 2.8), layout="constrained")
    axes = _axes(figure, name.removeprefix("loss/").replace("_", " "), (1, 1, 1))
    shown: list[float] = []
    for colour, rows in zip(itertools.cycle(COLOURS), runs.values(), strict=False):
        points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
        steps, values = [p[0] for p in points], [float(p[1]) for p in points]
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smoothed(values), color=colour, linewidth=1.6)
        # The first losses are far above the rest and would flatten the curve.
        shown += values[len(values) // 20 :] if len(values) > 20 else values
    finite = sorted(value for value in shown if math.isfinite(value))
    if len(finite) > 20 and name not in ("lr", "samples_per_s"):
        low, high = finite[0], finite[int(0.99 * (len(finite) - 1))]
        margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(low - margin, high + margin)
    axes.set_xlabel("step", fontsize=8, color="#404550")
    _legend(figure, list(runs))
    return _png(figure)


def score_curve(runs: Mapping[str, list[Row]], key: str, title: str) -> bytes:
    """A score over the steps of the checkpoints."""
    figure = Figure(figsize=(4.2, 2.8), layout="constrained")
    axes = _axes(figure, title, (1, 1, 1))
    for colour, rows in zip(itertools.cycle(COLOURS), runs.values(), strict=False):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        axes.plot([p[0] for p in points], [p[1] for p in points], marker="o", markersize=3, color=colour)
    axes.set_xlabel("step", fontsize=8, color="#404550")
    _legend(figure, list(runs))
    return _png(figure)


def spread_curves(curves: Mapping[str, list[tuple[float, list[float]]]], title: str, xlabel: str) -> bytes:
    """Means over seeds as lines, with a band of one standard deviation and one dot per seed.

    Args:
        curves: by label, the points (x, one value per seed).
    """
    figure = Figure(figsize=(4.6, 3.0), layout="constrained")
    axes = _axes(figure, title, (1, 1, 1))
    for colour, points in zip(itertools.cycle(COLOURS), curves.values(), strict=False):
        xs, means = [x for x, _ in points], [float(np.mean(values)) for _, values in points]
        deviations = [float(np.std(values, ddof=1)) if len(values) > 1 else 0.0 for _, values in points]
        axes.plot(xs, means, color=colour, linewidth=1.6)
        low, high = ([m + sign * d for m, d in zip(means, deviations, strict=True)] for sign in (-1, 1))
        axes.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
        for x, values in points:
            axes.plot([x] * len(values), values, "o", markersize=3, color=colour)
    axes.set_xlabel(xlabel, fontsize=8, color="#404550")
    _legend(figure, list(curves))
    return _png(figure)


def side_by_side(images: Mapping[str, Path]) -> bytes:
    """Image files next to each other, pixel by pixel in 256 colours, each below its label."""
    loaded = {label: Image.open(path).convert("RGB") for label, path in images.items()}
    gap, head = 12, 16
    width = sum(image.width + gap for image in loaded.values()) - gap
    page = Image.new("RGB", (width, head + max(image.height for image in loaded.values())), "white")
    draw, left = ImageDraw.Draw(page), 0
    for label, image in loaded.items():
        draw.text((left, 0), label, fill="#404550")
        page.paste(image, (left, head))
        left += image.width + gap
    out = io.BytesIO()
    page.quantize(256).save(out, "png", optimize=True)
    return out.getvalue()


@dataclass(frozen=True)
class Curve:
    """Points (cost, value), and by how much each value may be off: (below, above), as signed numbers."""

    points: list[tuple[float, float]]
    spans: list[tuple[float, float]] | None = None


def cost_curves(curves: Mapping[str, Mapping[str, Curve]], xlabel: str, goal: tuple[float, float]) -> bytes:
    """Values over a cost on a logarithmic axis, one panel per quantity, one colour per method.

    The values of all panels but the last are logarithmic, too.

    Args:
        curves: by panel, by method.
        goal: of the last panel: the value to reach and the tolerance, drawn as a band.
    """
    figure = Figure(figsize=(4.2 * len(curves), 3.4), layout="constrained")
    for index, (title, methods) in enumerate(curves.items()):
        axes = _axes(figure, title, (1, len(curves), index + 1))
        for number, curve in enumerate(methods.values()):
            xs, ys = zip(*sorted(curve.points), strict=True)
            style = ("-", "--", ":")[number // len(COLOURS) % 3]
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(xs, ys, style, marker="o", markersize=3, color=colour, linewidth=1.2)
            if curve.spans is not None:
                for (x, y), (low, high) in zip(curve.points, curve.spans, strict=True):
                    axes.plot([x, x], [y + low, y + high], color=colour, linewidth=0.8)
        if index == len(curves) - 1:
            axes.axhspan(goal[0] - goal[1], goal[0] + goal[1], color=_GREY, alpha=0.2, linewidth=0)
        axes.set_xscale("log")
        costs = [x for curve in methods.values() for x, _ in curve.points]
        ticks = [5 * 2**n for n in range(12) if min(costs) <= 5 * 2**n <= max(costs)]
        axes.set_xticks(ticks, labels=[str(tick) for tick in ticks], minor=False)
        axes.set_xticks([], minor=True)
        if index < len(curves) - 1:
            axes.set_yscale("log")
        axes.set_xlabel(xlabel, fontsize=8, color="#404550")
    lines = [
        Line2D([], [], color=COLOURS[n % len(COLOURS)], linestyle=("-", "--", ":")[n // len(COLOURS) % 3], label=name)
        for n, name in enumerate(next(iter(curves.values())))
    ]
    figure.legend(handles=lines, loc="outside lower left", ncols=5, fontsize=8, frameon=False)
    return _png(figure)


def smoothed(values: list[float], fraction: float = 0.04) -> list[float]:
    """A centred running mean of the finite values over about `fraction` of the points; shorter at the ends."""
    if not values:
        return []
    half = max(1, int(len(values) * fraction / 2))
    array = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(array)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, array, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    positions = np.arange(len(array))
    low, high = np.maximum(positions - half, 0), np.minimum(positions + half + 1, len(array))
    with np.errstate(invalid="ignore"):
        means: list[float] = ((sums[high] - sums[low]) / (counts[high] - counts[low])).tolist()
    return means


def clock_curve(rows: list[Row]) -> bytes | None:
    """The loss by the global clock, early and late in training; None with fewer than two rows of it."""
    return clock_curves({"": rows})


def clock_curves(runs: Mapping[str, list[Row]]) -> bytes | None:
    """`clock_curve` of several runs."""
    binned = {label: [row for row in rows if any(n.startswith("loss_by_clock/") for n in row)]
              for label, rows in runs.items()}  # fmt: skip
    if all(len(rows) < 2 for rows in binned.values()):
        return None
    figure = Figure(figsize=(4.6, 2.8), layout="constrained")
    axes = _axes(figure, "loss by time, from noise (0) to data (1)", (1, 1, 1))
    middles = [(index + 0.5) / 10 for index in range(10)]
    for colour, (label, rows) in zip(itertools.cycle(COLOURS), binned.items(), strict=False):
        tenth = max(1, len(rows) // 10)
        for when, part, style in (("first tenth", rows[:tenth], ":"), ("last tenth", rows[-tenth:], "-")):
            name = f"{label}, {when}" if label else when
            axes.plot(middles, _by_clock(part), style, marker="o", markersize=3, color=colour, label=name)
    axes.legend(fontsize=8, frameon=False)
    return _png(figure)


def _by_clock(rows: list[Row]) -> list[float]:
    means = []
    for index in range(10):
        found = [row[f"loss_by_clock/{index}"] for row in rows if row.get(f"loss_by_clock/{index}") is not None]
        means.append(sum(found) / len(found) if found else math.nan)
    return means


def _axes(figure: Figure, title: str, place: tuple[int, int, int]) -> Axes:
    """The style of every figure."""
    axes = figure.add_subplot(*place)
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=_GREY, labelcolor="#404550")
    return axes


def _legend(figure: Figure, labels: list[str]) -> None:
    """The colours of the runs, if there are several."""
    if len(labels) > 1:
        lines = [Line2D([], [], color=c, label=name) for c, name in zip(itertools.cycle(COLOURS), labels, strict=False)]
        figure.legend(handles=lines, loc="outside lower left", ncols=4, fontsize=8, frameon=False)


def _png(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    return buffer.getvalue()
