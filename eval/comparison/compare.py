"""`eval compare`: whether two results, or two groups of trainings, differ; each score with an interval.

N samples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from eval.comparison import groups, intervals, tables
from eval.comparison.groups import Group, Replicate
from eval.comparison.intervals import LEVEL, PAPER, PAPER_VARIATION, Interval, Spread
from eval.comparison.variance import Component, components, residual_sampling, shared_sampling
from eval.metrics.influence import Influence
from eval.results import Results
from sfd_scale import config
from sfd_scale.runtime import distributed, seeding
from sfd_scale.runtime.files import require_output, write_json

Verdict = Literal["differs", "no difference shown", "undecided", "above the floor"]


@dataclass(frozen=True)
class Difference:
    """One score of A and of B (means of groups), the difference B − A, and its interval.

    verdict: undecided: one training each, and the difference is below what another seed moves, or that is not known;
        above the floor: it is above what another seed moves by the literature, and this recipe may vary more.
    seeds: how many seeds of each would decide; None: not asked, or no number would.
    deviations: the standard deviation over the trainings of A and of B; None for one training.
    """

    score: str
    a: float
    b: float
    difference: float
    low: float
    high: float
    verdict: Verdict
    seeds: int | None = None
    deviations: tuple[float | None, float | None] = (None, None)

    @property
    def differs(self) -> bool:
        """Whether the interval excludes zero, and the trainings are enough to say so."""
        return self.verdict == "differs"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All scores of two groups.

    trainings: how many of A and of B. paired_images, paired_seeds: what both groups share.
    basis: what the intervals contain, in a sentence.
    sources: the variance by source, by score, of A and of B.
    """

    trainings: tuple[int, int]
    paired_images: bool
    paired_seeds: bool
    basis: str
    differences: list[Difference]
    sources: tuple[dict[str, list[Component]], dict[str, list[Component]]]
    settings: dict[str, tuple[str, str]]


def compare(
    a: Sequence[str], b: Sequence[str], *, rounds: int = 2000, replicates: Sequence[str] = (), gap: float | None = None,
    out: Path | None = None,
) -> Comparison:  # fmt: skip
    """Compare two results or two groups of them. Prints tables and writes `out`.

    Args:
        a, b: files, folders and patterns, see `groups.results_files`.
        rounds: of the bootstrap over images, which one model each needs.
        replicates: trainings of one recipe with several seeds, whose spread one training each is judged by.
        gap: a share of A, for the number of seeds that would find it; by default the difference that was found.

    Raises:
        ValueError: if they were scored against different references or with different settings.
    """
    if out is not None and distributed.is_main():
        require_output(out)
    left = groups.read_group(a)
    right = groups.read_group(b, left[0].results)
    known = groups.read_group(replicates, left[0].results) if replicates else []
    if len(known) == 1:
        raise ValueError(f"--replicates: {known[0].path} alone; allowed: two or more trainings of one recipe")
    found = compare_groups(left, right, rounds=rounds, replicates=known, gap=gap)
    if distributed.is_main():
        tables.show(found)
        if out is not None:
            data = {"a": list(a), "b": list(b), "level": LEVEL, "rounds": rounds, **_as_json(found)}
            write_json(out, data)
    return found


def compare_groups(
    a: Group, b: Group, *, rounds: int = 2000, replicates: Group = (), gap: float | None = None
) -> Comparison:
    """Compare two groups that were read already."""
    keys = groups.common_scores(a, b, replicates)
    matched = groups.in_order_of_seeds(a, b)
    left, right = (a, b) if matched is None else matched
    one_each = len(a) == len(b) == 1
    models = {groups.weights_of(replicate.results) for replicate in (*a, *b)}
    if one_each and len(models) == 1 and None not in models:
        basis = "one model: the intervals are of sampling"
        found = [_of_sampling(key, a[0], b[0], rounds) for key in keys]
    elif one_each:
        basis = _basis_of_one_each(replicates)
        found = [_one_each(key, a[0], b[0], rounds, replicates, gap) for key in keys]
    else:
        basis = "the intervals are of trainings and sampling" + (
            ", of differences between trainings of the same seeds" if matched else ""
        )
        found = [_of_groups(key, left, right, matched is not None, gap) for key in keys]
    return Comparison(
        trainings=(len(a), len(b)),
        paired_images=all(a[0].same_images(other) for other in (*a, *b)),
        paired_seeds=matched is not None,
        basis=basis,
        differences=found,
        sources=(sources_of(a, keys), sources_of(b, keys)),
        settings=settings_that_differ(a[0].results, b[0].results),
    )


# ------------------------------------------------------------------------------------------------- one model


def difference(name: str, a: Influence, b: Influence, *, paired: bool, rounds: int) -> Difference:
    """B − A with its interval of sampling, by the bootstrap (Efron 1979, Ann. Statist. 7, Sec. 2) of linearised scores.

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
    ends = observed + low, observed + high
    verdict: Verdict = "differs" if not ends[0] <= 0 <= ends[1] else "no difference shown"
    return Difference(name, a.value, b.value, observed, *ends, verdict)


def resampled_means(values: Tensor, stream: str, rounds: int) -> Tensor:
    """Means over `rounds` resamples with replacement (Efron 1979, Sec. 2) of values (N,): (rounds,)."""
    count = len(values)
    draws = (
        torch.randint(count, (count,), generator=seeding.generator(0, f"bootstrap_{stream}", number))
        for number in range(rounds)
    )
    return torch.stack([values[rows].mean() for rows in draws])


def _of_sampling(key: str, a: Replicate, b: Replicate, rounds: int) -> Difference:
    return difference(key, a.influences[key], b.influences[key], paired=a.same_images(b), rounds=rounds)


# ------------------------------------------------------------------------------------------------- one training each


def spread_of_training(key: str, mean: float, replicates: Group) -> Spread | None:
    """How much another seed moves a score: by replicates, as a share of their mean; for FID else by the literature.

    Args:
        mean: of the scores that are compared.
    """
    if replicates:
        values = groups.values(replicates, key)
        found, scale = intervals.spread(values), mean / (sum(values) / len(values))
        return Spread(found.variance * scale**2, found.freedom)
    return Spread((PAPER_VARIATION * mean) ** 2, math.inf) if key == "fid" else None


def _basis_of_one_each(replicates: Group) -> str:
    if replicates:
        return f"one training each, judged by the spread of {len(replicates)} replicates ({replicates[0].path}, ...)"
    floor = intervals.quantile(math.inf) * math.sqrt(2) * PAPER_VARIATION
    return (
        f"one training each. Two trainings of one recipe differ in FID by up to {floor:.1%} in {LEVEL:.0%} of pairs: "
        f"coefficient of variation {PAPER_VARIATION:.1%} on ImageNet ({PAPER}). Of other scores it is not known. "
        "Small models vary more: above that floor, only --replicates of your own say that it differs"
    )


def _one_each(key: str, a: Replicate, b: Replicate, rounds: int, replicates: Group, gap: float | None) -> Difference:
    """Undecided unless the interval of sampling and that of training both exclude zero.

    Only replicates of one's own say that it differs.
    """
    sampling = _of_sampling(key, a, b, rounds)
    found = spread_of_training(key, (sampling.a + sampling.b) / 2, replicates)
    if found is None:
        return dataclasses.replace(sampling, verdict="undecided")
    interval = intervals.single(sampling.difference, found, (1, 1))
    differs = sampling.differs and interval.differs
    above: Verdict = "differs" if replicates else "above the floor"
    wanted = abs(sampling.difference) if gap is None else gap * abs(sampling.a)
    seeds = intervals.seeds_to_decide(wanted, Spread(2 * found.variance, found.freedom), paired=False)
    return dataclasses.replace(
        sampling, low=min(sampling.low, interval.low), high=max(sampling.high, interval.high),
        verdict=above if differs else "undecided", seeds=None if differs and gap is None else seeds,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- several trainings


def _of_groups(key: str, a: Group, b: Group, paired_seeds: bool, gap: float | None) -> Difference:
    interval, pair, shared = group_interval(key, a, b, paired_seeds)
    first, second = groups.values(a, key), groups.values(b, key)
    means = sum(first) / len(first), sum(second) / len(second)
    wanted = abs(interval.difference) if gap is None else gap * abs(means[0])
    seeds = intervals.seeds_to_decide(wanted, pair, shared, paired=paired_seeds)
    deviations = tuple(intervals.spread(side).variance ** 0.5 if len(side) > 1 else None for side in (first, second))
    return Difference(
        key, *means, interval.difference, interval.low, interval.high,
        "differs" if interval.differs else "no difference shown",
        None if interval.differs and gap is None else seeds, (deviations[0], deviations[1]),
    )  # fmt: skip


def group_interval(key: str, a: Group, b: Group, paired_seeds: bool) -> tuple[Interval, Spread, float]:
    """B − A of two groups, one of at least 2 trainings: by Welch, or of pairs with the same seeds in the same order.

    Returns:
        The interval; the variance of a pair of trainings; and the variance by sampling that more seeds do not lower.
    """
    first, second = groups.values(a, key), groups.values(b, key)
    shared = shared_sampling(groups.gram([*a, *b], key), len(a))
    if paired_seeds:
        changes = [two - one for one, two in zip(first, second, strict=True)]
        return intervals.paired(changes, shared), intervals.spread(changes), shared
    spreads = [intervals.spread(side) for side in (first, second) if len(side) > 1]
    pooled = intervals.pooled(spreads)
    pair = Spread(sum(found.variance for found in spreads) * 2 / len(spreads), pooled.freedom)
    if len(spreads) == 2:
        return intervals.welch(first, second, shared), pair, shared
    observed = sum(second) / len(second) - sum(first) / len(first)
    parts = [Spread(pooled.variance * (1 / len(first) + 1 / len(second)), pooled.freedom)]
    return intervals.combined(observed, parts, shared), pair, shared


def sources_of(group: Group, keys: Sequence[str]) -> dict[str, list[Component]]:
    """The variance by source of each score, where a group of three or more knows its seeds."""
    seeds = [replicate.seeds for replicate in group if replicate.seeds is not None]
    if len(group) < 3 or len(seeds) < len(group):
        return {}
    return {
        key: found
        for key in keys
        if (
            found := components(
                groups.values(group, key), seeds, residual_sampling(groups.gram(group, key))
            )
        )
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------- as data


def settings_that_differ(a: Results, b: Results) -> dict[str, tuple[str, str]]:
    """The settings and versions in which two results differ, by dotted key."""
    left, right = (config.flatten({"samples": side.samples, "versions": side.versions}) for side in (a, b))
    keys = dict.fromkeys([*left, *right])
    pairs = {key: (str(left.get(key, "–")), str(right.get(key, "–"))) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _as_json(found: Comparison) -> dict[str, Any]:
    rows = [{**dataclasses.asdict(row), "differs": row.differs} for row in found.differences]
    sources = [
        {key: [dataclasses.asdict(part) for part in parts] for key, parts in side.items()} for side in found.sources
    ]
    return {
        "trainings": list(found.trainings), "paired": found.paired_images, "paired_seeds": found.paired_seeds,
        "basis": found.basis, "scores": rows, "sources": sources, "settings": found.settings,
    }  # fmt: skip


if __name__ == "__main__":
    from eval.__main__ import main

    main("compare")
