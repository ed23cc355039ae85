"""`eval compare`: whether two results differ, by the difference of each score with a bootstrap interval.

N samples.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from eval.features.extract import open_features, read_features
from eval.metrics.influence import Influence
from eval.metrics.scores import SCORES
from eval.reference import read_reference
from eval.results import Results
from sfd_scale import config
from sfd_scale.runtime import distributed, seeding
from sfd_scale.runtime.files import read_json, write_json
from sfd_scale.runtime.output import plain_console

logger = logging.getLogger(__name__)
LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """One score of A and of B, the difference B − A, and its bootstrap interval."""

    score: str
    a: float
    b: float
    difference: float
    low: float
    high: float

    @property
    def differs(self) -> bool:
        """Whether the interval excludes zero."""
        return not self.low <= 0 <= self.high


def compare(a: Path, b: Path, *, rounds: int = 2000, out: Path | None = None) -> list[Difference]:
    """Compare two results, each given by its results.json or the folder of it. Prints a table and writes `out`.

    Raises:
        ValueError: if they were scored against different references or with different settings.
    """
    first, second = Results.read(a), Results.read(b)
    _check_comparable(first, second)
    paired = first.paired_with(second)
    reference = read_reference(_cached(first, a), first.reference)
    sets = [read_features(open_features(_features(r, p))) for r, p in ((first, a), (second, b))]
    differences = []
    for score in SCORES:
        if score.influence is not None:
            left, right = (score.influence(found, reference, first.metrics) for found in sets)
            if left is not None and right is not None:
                differences.append(difference(score.key, left, right, paired=paired, rounds=rounds))
    if not distributed.is_main():
        return differences
    others = settings_that_differ(first, second)
    _show(differences, paired, others)
    if out is not None:
        rows = [{**vars(found), "differs": found.differs} for found in differences]
        data = {
            "a": str(a), "b": str(b), "paired": paired, "level": LEVEL, "rounds": rounds, "scores": rows,
            "settings": others,
        }  # fmt: skip
        write_json(out, data)
    return differences


def difference(name: str, a: Influence, b: Influence, *, paired: bool, rounds: int) -> Difference:
    """B − A with its interval, by the bootstrap (Efron 1979, Ann. Statist. 7, Sec. 2) of linearised scores.

    Args:
        paired: whether row i of both has the same noise and label, so that they are drawn together. Reference images
            always are.
    """
    if paired or (a.of_reference and b.of_reference):
        moves = resampled_means(b.per_image - a.per_image, "paired", rounds)
    else:
        moves = resampled_means(b.per_image, "b", rounds) - resampled_means(a.per_image, "a", rounds)
    low, high = torch.quantile(moves, torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2]).double()).tolist()
    observed = b.value - a.value
    return Difference(name, a.value, b.value, observed, observed + low, observed + high)


def resampled_means(values: Tensor, stream: str, rounds: int) -> Tensor:
    """Means over `rounds` resamples with replacement (Efron 1979, Sec. 2) of values (N,): (rounds,)."""
    count = len(values)
    draws = (
        torch.randint(count, (count,), generator=seeding.generator(0, f"bootstrap_{stream}", number))
        for number in range(rounds)
    )
    return torch.stack([values[rows].mean() for rows in draws])


# ------------------------------------------------------------------------------------------------- two results


def _check_comparable(a: Results, b: Results) -> None:
    for what, key in (("reference", "data"), ("extractor", "extractor")):
        if a.reference[key] != b.reference[key]:
            raise ValueError(f"{what}: {a.reference[key]} and {b.reference[key]}; allowed: the same for both")
    if a.metrics != b.metrics:
        raise ValueError(f"metrics: {a.metrics} and {b.metrics}; allowed: the same for both")


def settings_that_differ(a: Results, b: Results) -> dict[str, tuple[str, str]]:
    """The settings and versions in which two results differ, by dotted key."""
    left, right = (config.flatten({"samples": side.samples, "versions": side.versions}) for side in (a, b))
    keys = dict.fromkeys([*left, *right])
    pairs = {key: (str(left.get(key, "–")), str(right.get(key, "–"))) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _cached(results: Results, path: Path) -> Path:
    file = Path(results.run.reference)
    if not file.is_file():
        raise ValueError(f"{path}: its reference {file} is not in the cache any more; score it again")
    return file


def _features(results: Results, path: Path) -> Path:
    """The folder of features of the results: beside them, or at the recorded path."""
    beside = path if path.is_dir() else path.parent
    for folder in (beside, Path(results.run.features)):
        file = folder / "config.json"
        if file.is_file() and read_json(file) == results.samples:
            return folder
    raise ValueError(f"{path}: its features are neither beside it nor at the recorded path")


def _show(differences: list[Difference], paired: bool, others: dict[str, tuple[str, str]]) -> None:
    title = "B − A, paired by image number" if paired else "B − A, not paired: the images have other noise and labels"
    table = Table("score", "A", "B", "B − A", f"{100 * LEVEL:.0f}% interval", "", title=title)
    for found in differences:
        verdict = "differs" if found.differs else "no difference shown"
        interval = f"{found.low:+.4g} to {found.high:+.4g}"
        table.add_row(found.score, f"{found.a:.5g}", f"{found.b:.5g}", f"{found.difference:+.4g}", interval, verdict)
    plain_console().print(table)
    settings = Table("what differs", "A", "B")
    for key, (left, right) in others.items():
        settings.add_row(key, left, right)
    plain_console().print(settings if others else "A and B have the same settings.")


if __name__ == "__main__":
    from eval.__main__ import main

    main("compare")
