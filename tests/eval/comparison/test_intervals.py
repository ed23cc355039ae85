"""Intervals of groups of trainings: against scipy's tests, textbook sample sizes, and how often they hold the truth."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch

from eval.comparison.intervals import Spread, paired, power, quantile, seeds_to_decide, single, spread, welch
from eval.comparison.variance import components, residual_sampling, sampling_gram, shared_sampling
from sfd_scale.runtime.seeds import Seeds

A = [3.1, 2.9, 3.4, 3.0]
B = [2.7, 3.3, 2.2, 2.9]


def test_welch_and_pairs_are_those_of_scipy() -> None:
    found = welch(A, B)
    expected = scipy.stats.ttest_ind(B, A, equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)
    both = paired([b - a for a, b in zip(A, B, strict=True)])
    expected = scipy.stats.ttest_rel(B, A).confidence_interval(0.95)
    assert (both.low, both.high) == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert both.difference == pytest.approx(found.difference)


def test_one_training_takes_the_spread_of_others() -> None:
    """The difference to one more draw of the same distribution, as a prediction interval has it."""
    found = single(0.5, spread(A), (1, 4))
    assert found.margin == pytest.approx(quantile(3) * math.sqrt(spread(A).variance * 1.25))
    assert not found.differs and single(5.0, spread(A), (1, 1)).differs


def test_seeds_to_decide_are_those_of_the_textbook() -> None:
    """80% power at 5%: 17 of each of two groups for an effect of 1; 34 pairs for an effect of one half."""
    assert seeds_to_decide(1.0, Spread(2.0, math.inf), paired=False) == 17
    assert seeds_to_decide(0.5, Spread(1.0, math.inf), paired=True) == 34
    assert power(1.0, 2.0, 17, paired=False) >= 0.8 > power(1.0, 2.0, 16, paired=False)
    # A spread of few replicates may be too small: ask for more.
    assert seeds_to_decide(1.0, Spread(2.0, 4), paired=False) > 17  # type: ignore[operator]
    # Where nearly all variance is shared and known, few seeds cost no degrees of freedom: a normal test.
    assert power(2.8, 0.02, 2, 1.0, paired=False) == pytest.approx(
        scipy.stats.norm.sf(1.96 - 2.8 / 1.01**0.5), abs=1e-3
    )
    # What all trainings share, no seed takes away.
    assert seeds_to_decide(1.0, Spread(2.0, math.inf), 0.5, paired=False) is None
    assert seeds_to_decide(0.0, Spread(2.0, math.inf), paired=False) is None


def test_intervals_of_few_seeds_hold_the_truth_as_often_as_they_say() -> None:
    """Where each group draws images of its own, or all draw the same ones: then their shared error counts once."""
    draw = torch.Generator().manual_seed(0)
    held, without = [0, 0], 0
    rounds, n, images = 600, 3, 2.0
    for _ in range(rounds):
        a, b = (torch.randn(n, generator=draw).tolist() for _ in range(2))
        common = images * torch.randn((), generator=draw).item()
        held[0] += not welch(a, b).differs
        moved = [value + common for value in b]
        held[1] += not welch(a, moved, images**2).differs
        without += not welch(a, moved).differs
    assert all(count / rounds >= 0.935 for count in held), held
    assert without / rounds < 0.87


def test_a_planted_gap_is_found_with_the_seeds_that_were_asked_for() -> None:
    """Pilots of 4 trainings each ask for seeds; that many new trainings find the gap in 80% or more."""
    draw = torch.Generator().manual_seed(1)
    found = rounds = 0
    for _ in range(150):
        pilot = [spread(torch.randn(4, generator=draw).tolist()) for _ in range(2)]
        pair = Spread(pilot[0].variance + pilot[1].variance, 6)
        count = seeds_to_decide(1.5, pair, paired=False)
        assert count is not None
        a, b = torch.randn(count, generator=draw).tolist(), (torch.randn(count, generator=draw) + 1.5).tolist()
        found, rounds = found + welch(a, b).differs, rounds + 1
    assert found / rounds >= 0.8


# ------------------------------------------------------------------------------------------------- by source


def test_variances_are_told_apart_by_the_seeds_that_differ() -> None:
    """Known deviations of 3, 1 and 2; groups in which one part varies, and one in which all do."""
    draw = torch.Generator().manual_seed(2)
    names = ("init", "data", "noise")
    seeds = [Seeds(**{name: number}) for name in names for number in range(1, 40)]
    seeds += [Seeds(init=n, data=n, noise=n) for n in range(100, 140)]
    scale = {"init": 3.0, "data": 1.0, "noise": 2.0}
    effects: dict[tuple[str, int], float] = {}

    def score(one: Seeds) -> float:
        total = 0.0
        for name in names:
            key = (name, getattr(one, name))
            total += effects.setdefault(key, scale[name] * torch.randn((), generator=draw).item())
        return total

    found = {part.source: part.deviation for part in components([score(one) for one in seeds], seeds, 0.0)}
    assert found.keys() == {*names, "all of them", "sampling"} and found["sampling"] == 0.0
    for name in names:
        assert found[name] == pytest.approx(scale[name], rel=0.3), name
    assert found["all of them"] == pytest.approx(14**0.5, rel=0.3)


def test_parts_that_only_vary_together_are_one_source() -> None:
    values = [1.0, 2.0, 4.0]
    together, sampling = components(values, [Seeds.of(n) for n in range(3)], 0.5)
    assert together.source == "init + data + noise" and together.freedom == 2
    assert together.variance == pytest.approx(spread(values).variance - 0.5) and sampling.variance == 0.5
    apart = components([*values, 7.0], [Seeds.of(0), Seeds(init=1), Seeds(init=2), Seeds(data=1, noise=1)], 0.0)
    assert [part.source for part in apart] == ["init", "data + noise", "all of them", "sampling"]
    assert components(values, [Seeds(), Seeds(), Seeds()], 0.0) == []


def test_sampling_that_all_replicates_share_does_not_spread_them() -> None:
    draw = torch.Generator().manual_seed(3)
    moves = list((torch.randn(1, 4000, generator=draw) + 0.5 * torch.randn(6, 4000, generator=draw)).double())
    together, alone = (sampling_gram(moves, lambda one, other, same=same: same) for same in (True, False))
    assert residual_sampling(together) == pytest.approx(0.25 / 4000, rel=0.1)
    assert residual_sampling(alone) == pytest.approx(1.25 / 4000, rel=0.1)
    # Both groups draw the same images: nothing is left of them. Otherwise the spread contains it all.
    assert shared_sampling(together, 3) < 0.02 / 4000 and shared_sampling(alone, 3) == pytest.approx(0, abs=1e-9)
    # Each group draws one set of images: the error that its trainings share is in no spread.
    apart = sampling_gram(moves, lambda one, other: (one < 3) == (other < 3))
    assert shared_sampling(apart, 3) == pytest.approx(2 / 4000, rel=0.1)
