"""The variance of a score over trainings, by source: initial weights, order of data, noise of training, sampling.

n replicates · N images.

Trainings that all differ in the same parts of their seeds spread by the sum of the variances of these parts. So each
kind of set gives a linear equation. They are solved without negative values (Lawson & Hanson 1974, Ch. 23). What parts
do only together counts with each of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfd_scale.runtime.seeds import SEED_PARTS, Seeds


@dataclass(frozen=True)
class Component:
    """One source: the parts of the seed that vary in it, joined where these replicates cannot tell them apart.

    freedom: degrees of freedom of the trainings that show it; None for `sampling`.
    """

    source: str
    variance: float
    freedom: int | None

    @property
    def deviation(self) -> float:
        return self.variance**0.5


def sampling_gram(moves: Sequence[Tensor], same_images: Callable[[int, int], bool]) -> Tensor:
    """The covariance of the sampling errors of n scores: (n, n), of how each image moves each score, (N,) each.

    Args:
        same_images: whether two sets share noise and labels; otherwise their errors are independent.
    """
    count = len(moves)
    gram = torch.zeros(count, count, dtype=torch.float64)
    for one, other in itertools.product(range(count), repeat=2):
        if one == other or same_images(one, other):
            gram[one, other] = moves[one] @ moves[other] / len(moves[one]) ** 2
    return gram


def residual_sampling(gram: Tensor) -> float:
    """The variance that sampling adds to each of n replicates, beside what they share: gram (n, n), n of at least 2."""
    count = len(gram)
    return max(0.0, float((gram.trace() - gram.sum() / count) / (count - 1)))


def shared_sampling(gram: Tensor, first: int) -> float:
    """The variance by sampling of the difference of two groups that their spreads over trainings do not contain.

    Args:
        gram: (n + m, n + m), the replicates of the first group before those of the second.
        first: n.
    """
    groups = gram[:first, :first], gram[first:, first:]
    signs = zip((-1.0, 1.0), groups, strict=True)
    weights = torch.cat([torch.full((len(group),), sign / len(group)).double() for sign, group in signs])
    total = float(weights @ gram @ weights)
    known = [residual_sampling(group) for group in groups if len(group) > 1]
    usual = sum(known) / len(known)
    own = sum((residual_sampling(group) if len(group) > 1 else usual) / len(group) for group in groups)
    return max(0.0, total - own)


def components(values: Sequence[float], seeds: Sequence[Seeds], sampling: float) -> list[Component]:
    """The variance of each source, of (n,) scores and the seeds of their trainings.

    Args:
        sampling: variance that sampling adds to each replicate, see `residual_sampling`.

    Returns:
        Each part of the seed, all that vary together, and sampling. Nothing where no training has another seed.
    """
    found = {apart: _within(values, seeds, apart) for apart in _patterns(seeds)}
    # Few parts first: sets in which one part varies show it by themselves.
    rows = sorted((apart for apart in found if found[apart][1]), key=lambda apart: (len(apart), -found[apart][1]))
    sources = _distinguishable(rows)
    chosen: list[frozenset[str]] = []
    for apart in rows:
        if np.linalg.matrix_rank(_matrix([*chosen, apart], sources)) > len(chosen):
            chosen.append(apart)
    if len(chosen) < len(sources) or not sources:
        return []
    weights = np.sqrt([found[apart][1] for apart in chosen])
    means = np.array([found[apart][0] / found[apart][1] - sampling for apart in chosen])
    solved, _ = scipy.optimize.nnls(_matrix(chosen, sources) * weights[:, None], means * weights)
    parts = [
        Component(" + ".join(source), float(value), min(found[apart][1] for apart in chosen if source[0] in apart))
        for source, value in zip(sources, solved, strict=True)
    ]
    whole = frozenset(part for source in sources for part in source)
    if len(sources) > 1 and whole in rows:
        total, freedom = found[whole]
        parts.append(Component("all of them", max(0.0, total / freedom - sampling), freedom))
    return [*parts, Component("sampling", sampling, None)]


def _apart(one: Seeds, other: Seeds) -> frozenset[str]:
    return frozenset(part for part in SEED_PARTS if getattr(one, part) != getattr(other, part))


def _patterns(seeds: Sequence[Seeds]) -> set[frozenset[str]]:
    return {_apart(one, other) for one, other in itertools.combinations(seeds, 2)} - {frozenset()}


def _within(values: Sequence[float], seeds: Sequence[Seeds], apart: frozenset[str]) -> tuple[float, int]:
    """The sum of squares and the degrees of freedom within sets of trainings that all differ in exactly these parts."""
    sets: list[list[int]] = []
    for number in range(len(values)):
        fitting = (one for one in sets if all(_apart(seeds[number], seeds[other]) == apart for other in one))
        home = next(fitting, None)
        if home is None:
            sets.append([number])
        else:
            home.append(number)
    squares = 0.0
    for one in sets:
        mean = sum(values[number] for number in one) / len(one)
        squares += sum((values[number] - mean) ** 2 for number in one)
    return squares, sum(len(one) - 1 for one in sets)


def _matrix(rows: Sequence[frozenset[str]], sources: Sequence[tuple[str, ...]]) -> NDArray[np.float64]:
    return np.array([[float(source[0] in apart) for source in sources] for apart in rows])


def _distinguishable(rows: Sequence[frozenset[str]]) -> list[tuple[str, ...]]:
    """The parts of the seed that vary, joined where they only vary together."""
    groups: dict[tuple[bool, ...], list[str]] = {}
    for part in SEED_PARTS:
        column = tuple(part in apart for apart in rows)
        if any(column):
            groups.setdefault(column, []).append(part)
    return [tuple(parts) for parts in groups.values()]
