"""The tables of `eval compare`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from eval.comparison.intervals import LEVEL, POWER
from sfd_scale.runtime.output import plain_console

if TYPE_CHECKING:
    from eval.comparison.compare import Comparison, Difference
    from eval.comparison.variance import Component


def show(found: Comparison) -> None:
    """Print the differences, the variance by source, and the settings that differ."""
    console = plain_console()
    console.print(_differences(found))
    for name, by_score in zip("AB", found.sources, strict=True):
        if by_score:
            console.print(_sources(name, by_score, found.differences))
    settings = Table("what differs", "A", "B")
    for key, (left, right) in found.settings.items():
        settings.add_row(key, left, right)
    console.print(settings if found.settings else "A and B have the same settings.")


def _differences(found: Comparison) -> Table:
    images = "paired by image number" if found.paired_images else "not paired: the images have other noise and labels"
    counts = "" if found.trainings == (1, 1) else f"{found.trainings[0]} and {found.trainings[1]} trainings, "
    table = Table(
        "score", "A", "B", "B − A", f"{LEVEL:.0%} interval", "", "seeds", title=f"B − A, {counts}{images}",
        caption=f"{found.basis}. seeds: of each group, to decide in {POWER:.0%} of cases.",
    )  # fmt: skip
    for row in found.differences:
        interval = f"{row.low:+.4g} to {row.high:+.4g}"
        sides = [_with_deviation(value, apart) for value, apart in zip((row.a, row.b), row.deviations, strict=True)]
        seeds = "" if row.seeds is None else str(row.seeds)
        table.add_row(row.score, *sides, f"{row.difference:+.4g}", interval, row.verdict, seeds)
    return table


def _with_deviation(value: float, deviation: float | None) -> str:
    return f"{value:.5g}" if deviation is None else f"{value:.5g} ± {deviation:.2g}"


def _sources(name: str, by_score: dict[str, list[Component]], differences: list[Difference]) -> Table:
    """One row for each score: the standard deviation of each source as a share of the score's mean."""
    sources = [component.source for component in next(iter(by_score.values()))]
    table = Table("score", *sources, title=f"{name}: standard deviation by source, as a share of the mean")
    means = {row.score: (row.a if name == "A" else row.b) for row in differences}
    for key, parts in by_score.items():
        table.add_row(key, *(f"{part.deviation / abs(means[key]):.2%}" if means[key] else "–" for part in parts))
    return table
