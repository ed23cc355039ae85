"""A picture of plans: days over GPUs, memory and time of each plan by part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from sfd_scale.planning.hardware import Hardware
from sfd_scale.planning.planner import Plan

# Colours of Okabe and Ito, distinct with any colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
_MEMORY = ("params", "gradients", "optimizer", "ema", "buffers", "activations", "update")


@dataclass(frozen=True)
class Drawn:
    """One plan of a picture."""

    recipe: str
    ranks: int
    plan: Plan

    @property
    def label(self) -> str:
        return f"{self.recipe}, {self.ranks} GPUs"


def draw(plans: Sequence[Drawn], hardware: Hardware, path: Path) -> None:
    """Write a PNG.

    Raises:
        ValueError: if the path does not end with .png.
    """
    if path.suffix != ".png":
        raise ValueError(f"--plot: {path}; allowed: a name that ends with .png")
    figure = Figure(figsize=(15, 1.8 + 0.32 * max(len(plans), 8)), layout="constrained")
    scaling, memory, time = figure.subplots(1, 3, width_ratios=(1, 1.2, 1.2))
    _scaling(scaling, plans)
    _bars(memory, plans, [[getattr(p.plan.memory, name) / 2**30 for name in _MEMORY] for p in plans], _MEMORY)
    memory.axvline(hardware.memory / 2**30, color="#8a8f98", linestyle="--")
    memory.set_title(f"GiB of the fullest rank; the line is the memory of a {hardware.device}", fontsize=9)
    timed = [p for p in plans if p.plan.time is not None]
    names = [name for name, _ in timed[0].plan.time.parts] if timed and timed[0].plan.time else []
    _bars(time, timed, [[1000 * s for _, s in p.plan.time.parts] for p in timed if p.plan.time], names)
    time.set_title("milliseconds of a step", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


def _scaling(axes: Axes, plans: Sequence[Drawn]) -> None:
    for colour, recipe in zip(_COLOURS * 4, dict.fromkeys(p.recipe for p in plans), strict=False):
        points = sorted((p.ranks, p.plan.days_with_failures) for p in plans if p.recipe == recipe)
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour, label=recipe)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({p.ranks for p in plans}))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.set_xlabel("GPUs", fontsize=8)
    axes.set_title("days of the run", fontsize=9)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)


def _bars(axes: Axes, plans: Sequence[Drawn], values: Sequence[Sequence[float]], names: Sequence[str]) -> None:
    """Stacked bars, one line for each plan."""
    start = [0.0] * len(plans)
    for index, name in enumerate(names):
        part = [row[index] for row in values]
        axes.barh(range(len(plans)), part, left=start, color=_COLOURS[index], label=name)
        start = [a + b for a, b in zip(start, part, strict=True)]
    axes.set_yticks(range(len(plans)), [p.label for p in plans], fontsize=7)
    axes.invert_yaxis()
    axes.legend(fontsize=7)
