"""Steps to a score, by hand."""

import math

import pytest

from benchmarks.optimizer_study import interval, ratios, steps_to

CURVE = [(100, 10.0), (200, 6.0), (300, 5.0)]


@pytest.mark.parametrize(("score", "step"), [(10.0, 100), (12.0, 100), (8.0, 150), (6.0, 200), (5.5, 250)])
def test_steps_to_a_score_lie_on_the_line_between_two_checkpoints(score: float, step: float) -> None:
    assert steps_to(CURVE, score) == pytest.approx(step)


def test_a_score_that_is_never_reached_takes_infinitely_many_steps() -> None:
    assert steps_to(CURVE, 4.9) == math.inf


def test_the_ratio_of_a_seed_is_against_the_same_seed() -> None:
    reference = {0: [(100, 12.0), (300, 8.0)], 1: [(100, 9.0), (300, 6.0)]}
    assert ratios({0: CURVE, 1: CURVE}, reference) == pytest.approx([0.5, 2 / 3])
    # Student's quantile for three values is 4.303.
    mean, half = interval([0.5, 0.6, 0.7])
    assert (mean, half) == (pytest.approx(0.6), pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-3))
