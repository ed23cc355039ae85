"""Whether two results differ: influence functions against scores of really resampled sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eval.comparison.compare import difference, resampled_means, spread_of_training
from eval.comparison.groups import Replicate
from eval.features.extract import FeatureSet
from eval.metrics import influence
from eval.metrics.config import MetricsConfig
from eval.metrics.density_coverage import density_coverage
from eval.metrics.frechet import frechet_distance
from eval.metrics.inception_score import inception_score
from eval.metrics.influence import Influence, frechet_influence, inception_influence, monge_influence, share_influence
from eval.metrics.moments import moments
from eval.metrics.monge_inception import monge_inception_distance
from eval.metrics.precision_recall import precision_recall
from eval.metrics.reference import Reference
from eval.search.sweep import split_values
from tests.eval.metrics.test_metrics import class_logits, features


def resampled(score: Callable[[Tensor], float], rows: Tensor, rounds: int) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.tensor(
        [score(rows[torch.randint(len(rows), (len(rows),), generator=draw)]) for _ in range(rounds)]
    ).double()


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.05, 20.0)])
def test_frechet_influence_is_the_derivative(scales: tuple[float, float]) -> None:
    """One image more moves the score by its influence / N, also along a feature that hardly varies."""
    rows, real = features(4000, 8, 0, shift=0.2), features(4000, 8, 1)
    rows[:, 0], real[:, 0] = scales[0] * rows[:, 0], scales[1] * real[:, 0]
    reference = moments(real)
    found = frechet_influence(rows, reference)
    assert found.value == frechet_distance(moments(rows), reference)
    assert abs(found.per_image.mean().item()) < 1e-12
    for index in (0, 17, 300):
        more = frechet_distance(moments(torch.cat([rows, rows[index : index + 1].expand(2, -1)])), reference)
        assert (more - found.value) * 4002 / 2 == pytest.approx(found.per_image[index].item(), rel=0.05, abs=0.02)


def test_the_influence_on_mind_is_the_derivative() -> None:
    """Other rows in place of some move MIND by the mean of their influences, to first order."""
    rows, reference = features(3000, 6, 0, shift=0.5), features(3000, 6, 1)
    found = monge_influence(rows, reference, 3000, 30)
    assert found.value == monge_inception_distance(rows, reference, 3000, 30)
    assert abs(found.per_image.mean().item()) < 1e-12
    by_size = found.per_image.argsort()
    low, middle, high = by_size[300:310], by_size[1500:1510], by_size[-310:-300]
    for dropped, doubled in ((low, high), (high, low), (high, middle)):
        kept = rows.clone()
        kept[dropped] = rows[doubled]
        moved = monge_inception_distance(kept, reference, 3000, 30) - found.value
        linear = (found.per_image[doubled] - found.per_image[dropped]).sum().item() / 3000
        assert moved == pytest.approx(linear, rel=0.1)
    part = monge_influence(rows, reference, 300, 30).per_image
    assert (part != 0).sum().item() == 300 and part.std().item() > 2 * found.per_image.std().item()


def test_influence_spreads_as_resampled_scores_do() -> None:
    reference = moments(features(3000, 8, 1))
    cases: list[tuple[Influence, Callable[[Tensor], float], Tensor]] = []
    rows = features(1500, 8, 0, shift=0.2)
    cases.append((frechet_influence(rows, reference), lambda x: frechet_distance(moments(x), reference), rows))
    logits = class_logits(torch.arange(1500) % 7, 7) / 2
    images = features(1500, 8, 1)
    mind = lambda x: monge_inception_distance(x, images, 1500, 20)  # noqa: E731
    cases.append((monge_influence(rows, images, 1500, 20), mind, rows))
    cases.append((inception_influence(logits, 1500), lambda x: inception_score(x, 1500).mean, logits))
    for found, score, values in cases:
        real, linear = resampled(score, values, 300), resampled_means(found.per_image, "x", 300)
        assert linear.std().item() == pytest.approx(real.std().item(), rel=0.2)
        # No bias upwards, which sets with copies have.
        assert abs(linear.mean().item()) < 0.2 * linear.std().item()


def test_pairing_finds_what_independent_sets_hide() -> None:
    """The same images with a small change: paired, the interval is far narrower and leaves zero out."""
    rows, reference = features(1000, 8, 0, shift=0.2), moments(features(3000, 8, 1))
    a, b = frechet_influence(rows, reference), frechet_influence(rows + 0.005, reference)
    paired = difference("fid", a, b, paired=True, rounds=400)
    alone = difference("fid", a, b, paired=False, rounds=400)
    assert paired.differs and not alone.differs
    assert paired.difference == alone.difference == b.value - a.value
    assert paired.high - paired.low < 0.3 * (alone.high - alone.low)
    same = difference("fid", a, a, paired=True, rounds=50)
    assert (same.low, same.high) == (0.0, 0.0) and not same.differs


def test_intervals_have_the_width_of_the_normal_distribution() -> None:
    """For the mean of many images: 1.96 standard errors on each side."""
    rows = torch.randn(2000, 2, generator=torch.Generator().manual_seed(3)).double()
    a, b = (Influence(value, column - column.mean()) for value, column in zip((5.0, 7.0), rows.T, strict=True))
    found = difference("fid", a, b, paired=False, rounds=2000)
    assert found.difference == 2.0 and (found.low + found.high) / 2 == pytest.approx(2.0, abs=0.01)
    assert found.high - found.low == pytest.approx(2 * 1.96 * (2 / 2000) ** 0.5, rel=0.06)
    # Two results share the reference images, whatever their own images: equal influences cancel.
    recall = dataclasses.replace(a, of_reference=True)
    shared = difference("recall", recall, dataclasses.replace(recall, value=5.5), paired=False, rounds=50)
    assert (shared.low, shared.high) == (0.5, 0.5)


def test_the_spread_of_replicates_is_a_share_of_their_mean() -> None:
    zeros = torch.zeros(4).double()
    group = [Replicate(Path(), None, None, {"fid": Influence(v, zeros)}) for v in (8.0, 12.0)]  # type: ignore[arg-type]
    # Standard deviation 8 ** 0.5 around 10: of scores about 40, four times as much.
    found = spread_of_training("fid", 40.0, group)
    assert found is not None and (found.variance, found.freedom) == (pytest.approx(8 * 16), 1)
    by_literature = spread_of_training("fid", 40.0, [])
    assert by_literature is not None and by_literature.variance**0.5 == pytest.approx(0.013 * 40)
    assert spread_of_training("sfid", 40.0, []) is None


def test_intervals_cover_as_often_as_they_say() -> None:
    """Two sets of one distribution: about 95% of intervals hold zero."""
    reference = moments(features(3000, 4, 1))
    held = 0
    for seed in range(60):
        a, b = (frechet_influence(features(400, 4, 100 + 2 * seed + side), reference) for side in range(2))
        held += not difference("fid", a, b, paired=False, rounds=200).differs
    assert 51 <= held <= 60


def test_shares_and_unequal_splits() -> None:
    inside = torch.tensor([True, False, True, True])
    assert share_influence(inside).value == 0.75
    logits = class_logits(torch.arange(250) % 5, 5)
    found = inception_influence(logits, 100)
    assert len(found.per_image) == 250 and found.value == inception_score(logits, 100).mean
    # Another row in place of one, in a whole split and in the last one, whose rows weigh twice as much.
    logits = logits / 4
    found = inception_influence(logits, 100)
    for split in (range(100), range(200, 250)):
        low, high = (pick(split, key=lambda row: found.per_image[row].item()) for pick in (min, max))
        changed = logits.clone()
        changed[low] = logits[high]
        moved = inception_score(changed, 100).mean - found.value
        assert moved == pytest.approx((found.per_image[high] - found.per_image[low]).item() / 250, rel=0.1)


def test_shares_of_real_images_are_moved_by_real_images() -> None:
    """Recall and coverage count images of the reference, which two results share; precision and density samples."""
    samples, real = FeatureSet(features(300, 16, 0, shift=0.2), None, None, None, {}), features(200, 16, 1)
    reference = Reference(moments(real), None, real, None, None, {}, Path())
    shares, ratios = precision_recall(samples.pool, real, 3), density_coverage(samples.pool, real, 5)
    expected = {
        influence.precision: (shares.precision, 300, False), influence.recall: (shares.recall, 200, True),
        influence.density: (ratios.density, 300, False), influence.coverage: (ratios.coverage, 200, True),
    }  # fmt: skip
    for of, wanted in expected.items():
        found = of(samples, reference, MetricsConfig())
        assert found is not None and found.per_image.mean().item() == pytest.approx(0, abs=1e-12)
        assert (pytest.approx(found.value), len(found.per_image), found.of_reference) == wanted


def test_values_of_a_sweep() -> None:
    assert split_values("1,2.5,x") == ["1", "2.5", "x"]
    assert split_values("{kind: a, b: [1,2]},null") == ["{kind: a, b: [1,2]}", "null"]
