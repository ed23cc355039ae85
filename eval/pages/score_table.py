"""The table of scores that the pages show: one row per result, one column per score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eval.metrics.scores import SCORES
from eval.results import Results


@dataclass(frozen=True)
class Cell:
    """The text of one score, and whether it is the best of its column."""

    text: str
    best: bool


@dataclass(frozen=True)
class ScoreTableRow:
    """One result. `labels` say which one, a text per column before the scores."""

    labels: tuple[str, ...]
    cells: list[Cell]
    count: str
    sampling: str


def score_table(results: Sequence[Results], labels: Sequence[tuple[str, ...]]) -> list[ScoreTableRow]:
    """A row per result. No cell is the best of a single result."""
    best = {score: score.best(result.scores.of(score) for result in results) for score in SCORES}
    return [
        ScoreTableRow(
            labels=own,
            cells=[
                Cell(found.scores.text(score), len(results) > 1 and value is not None and value == best[score])
                for score in SCORES
                for value in [found.scores.of(score)]
            ],
            count=f"{found.count:,}",
            sampling=found.sampling,
        )
        for found, own in zip(results, labels, strict=True)
    ]
