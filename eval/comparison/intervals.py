"""Intervals for the difference of two groups of trainings, and the number of seeds that would decide.

n replicates of one group · m of the other · N images.

The interval is Welch's (1947, Biometrika 34, 28-35). In simulations it holds the true difference as often as it says.
The percentile interval of a hierarchical bootstrap does not with few replicates (`python -m benchmarks.comparison`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import scipy.stats

LEVEL: Final = 0.95
POWER: Final = 0.8
MOST_SEEDS: Final = 1000
# Of FID over trainings with other seeds: SiT on ImageNet at 256 pixels.
PAPER_VARIATION: Final = 0.013
PAPER: Final = "arXiv 2606.20536"


@dataclass(frozen=True)
class Spread:
    """The variance of a score over trainings, and its degrees of freedom; inf: it is taken as known."""

    variance: float
    freedom: float

    def upper(self, confidence: float = POWER) -> float:
        """An upper confidence bound of the variance, for planning from few replicates (Browne 1995, Stat. Med. 14)."""
        if math.isinf(self.freedom):
            return self.variance
        return self.variance * self.freedom / float(scipy.stats.chi2.ppf(1 - confidence, self.freedom))


@dataclass(frozen=True)
class Interval:
    """A difference, its standard error and degrees of freedom."""

    difference: float
    error: float
    freedom: float

    @property
    def margin(self) -> float:
        """Half the width of the interval."""
        return quantile(self.freedom) * self.error

    @property
    def low(self) -> float:
        return self.difference - self.margin

    @property
    def high(self) -> float:
        return self.difference + self.margin

    @property
    def differs(self) -> bool:
        """Whether the interval excludes zero."""
        return not self.low <= 0 <= self.high


def quantile(freedom: float) -> float:
    """Of Student's t, two-sided; of the normal distribution for infinitely many degrees of freedom."""
    upper = (1 + LEVEL) / 2
    return float(scipy.stats.norm.ppf(upper) if math.isinf(freedom) else scipy.stats.t.ppf(upper, freedom))


def spread(values: Sequence[float]) -> Spread:
    """Of the scores of one group: (n,), n of at least 2."""
    mean = sum(values) / len(values)
    return Spread(sum((value - mean) ** 2 for value in values) / (len(values) - 1), len(values) - 1)


def pooled(parts: Sequence[Spread]) -> Spread:
    """One variance of several groups, weighted by their degrees of freedom."""
    freedom = sum(part.freedom for part in parts)
    return Spread(sum(part.variance * part.freedom for part in parts) / freedom, freedom)


def combined(difference: float, parts: Sequence[Spread], shared: float) -> Interval:
    """A difference whose variance is a sum: independent parts, and `shared` without degrees of freedom of its own.

    The degrees of freedom are those of Satterthwaite (1946, Biometrics Bull. 2, 110-114).
    """
    total = sum(part.variance for part in parts) + shared
    below = sum(part.variance**2 / part.freedom for part in parts)
    return Interval(difference, math.sqrt(total), total**2 / below if below > 0 else math.inf)


def welch(a: Sequence[float], b: Sequence[float], shared: float = 0.0) -> Interval:
    """Of the mean of b minus the mean of a: (n,) and (m,), both of at least 2.

    Args:
        shared: variance that all replicates of a group have in common, of the images that they share.
    """
    parts = [Spread(found.variance / len(side), found.freedom) for side, found in ((a, spread(a)), (b, spread(b)))]
    return combined(sum(b) / len(b) - sum(a) / len(a), parts, shared)


def paired(differences: Sequence[float], shared: float = 0.0) -> Interval:
    """Of the mean of differences between replicates of the same seeds: (n,), n of at least 2."""
    found = spread(differences)
    parts = [Spread(found.variance / len(differences), found.freedom)]
    return combined(sum(differences) / len(differences), parts, shared)


def single(difference: float, found: Spread, counts: tuple[int, int]) -> Interval:
    """With a group of one training, whose spread is taken from elsewhere: of the other group, or of replicates.

    Args:
        counts: n and m.
    """
    variance = found.variance * (1 / counts[0] + 1 / counts[1])
    return Interval(difference, math.sqrt(variance), found.freedom)


# ------------------------------------------------------------------------------------------------- planning


def seeds_to_decide(gap: float, pair: Spread, shared: float = 0.0, *, paired: bool) -> int | None:
    """How many seeds of each group would find a difference of `gap` in 80% of comparisons; None: no number would.

    Args:
        pair: the variance of the difference of two trainings, one of each group.
        shared: variance that more seeds do not lower.
        paired: whether the groups will share their seeds.
    """
    variance = pair.upper()
    if gap == 0 or power(gap, variance, MOST_SEEDS, shared, paired=paired) < POWER:
        return None
    low, high = 2, MOST_SEEDS
    while low < high:
        middle = (low + high) // 2
        enough = power(gap, variance, middle, shared, paired=paired) >= POWER
        low, high = (low, middle) if enough else (middle + 1, high)
    return low


def power(gap: float, variance: float, count: int, shared: float = 0.0, *, paired: bool) -> float:
    """How often `count` seeds of each group find a difference of `gap`, with its sign: noncentral t distribution."""
    own = variance / count
    error = math.sqrt(own + shared)
    if error == 0:
        return 1.0
    freedom = (count - 1 if paired else 2 * (count - 1)) * (error**2 / own) ** 2 if own else math.inf
    limit, moved = quantile(freedom), abs(gap) / error
    law = scipy.stats.norm(moved) if math.isinf(freedom) else scipy.stats.nct(freedom, moved)
    return float(law.sf(limit))
