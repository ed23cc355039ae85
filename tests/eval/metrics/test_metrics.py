"""Scores against scipy, torch-fidelity and closed forms, and the known-bad variants that must move them."""

from __future__ import annotations

import inspect
import re
import warnings
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from prdc import compute_prdc
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from eval.metrics import density_coverage as density_coverage_module
from eval.metrics import frechet, influence
from eval.metrics import inception_score as inception_score_module
from eval.metrics import kernel_distance as kernel_distance_module
from eval.metrics import moments as moments_module
from eval.metrics import monge_inception as monge_inception_module
from eval.metrics import precision_recall as neighbours
from eval.metrics.config import MetricsConfig
from eval.metrics.density_coverage import density_coverage
from eval.metrics.frechet import frechet_distance
from eval.metrics.inception_score import inception_score
from eval.metrics.kernel_distance import kernel_distance
from eval.metrics.moments import FeatureMoments, MomentSums, moments
from eval.metrics.monge_inception import directions, monge_inception_distance
from eval.metrics.precision_recall import half_distances, precision_recall, squared_distances
from eval.metrics.sample_warnings import sample_warnings
from sfd_scale.diffusion.conditioning import ClassLabels


def features(count: int, dim: int, seed: int, shift: float = 0.0) -> Tensor:
    """Correlated, clipped at 0 as Inception's are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(99)) / dim**0.5
    return (torch.randn(count, dim, generator=generator) @ mix + 0.4 + shift).clamp(min=0)


def scipy_distance(a: Tensor, b: Tensor) -> float:
    x, y = a.double().numpy(), b.double().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = scipy.linalg.sqrtm(np.cov(x, rowvar=False) @ np.cov(y, rowvar=False))
    trace = np.trace(np.cov(x, rowvar=False) + np.cov(y, rowvar=False) - 2 * root.real)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + trace)


def distance(a: Tensor, b: Tensor) -> float:
    return frechet_distance(moments(a), moments(b))


# ------------------------------------------------------------------------------------------------- FID


def test_frechet_equals_scipy_and_torch_fidelity() -> None:
    a, b = features(500, 64, 0), features(700, 64, 1, shift=0.2)
    ours = distance(a, b)
    assert ours > 1  # two sets that differ
    assert ours == pytest.approx(scipy_distance(a, b), abs=1e-8)
    theirs = fid_statistics_to_metric(
        fid_features_to_statistics(a.double()), fid_features_to_statistics(b.double()), verbose=False
    )["frechet_inception_distance"]
    assert ours == pytest.approx(theirs, abs=1e-8)


def test_frechet_equals_the_definition_of_fd_loss() -> None:
    """FD-loss (arXiv 2604.28190) takes the trace from the eigenvalues of S^½ Σ S^½, S the reference's covariance."""
    a, b = features(500, 64, 0).double().numpy(), features(700, 64, 1, shift=0.2).double().numpy()
    own, real = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(real)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(root @ own @ root).clip(min=0)).sum()
    theirs = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(own) + np.trace(real) - 2 * trace
    assert distance(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(theirs, abs=1e-6)


def test_frechet_with_dead_features_and_few_samples() -> None:
    a, b = features(500, 64, 0), features(500, 64, 1, shift=0.2)
    a[:, 10:20], b[:, 10:20] = 0, 0
    assert distance(a, b) == pytest.approx(scipy_distance(a, b), abs=1e-8)
    few = features(30, 64, 3, shift=0.1)
    assert distance(few, b) == pytest.approx(scipy_distance(few, b), abs=1e-3)


def test_frechet_by_the_matrix_root_of_adm(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    a, b = features(400, 32, 0), features(300, 32, 1, shift=0.2)
    theirs = frechet_distance(moments(a), moments(b), "sqrtm")
    assert theirs == pytest.approx(scipy_distance(a, b), abs=1e-12)
    assert theirs == pytest.approx(distance(a, b), abs=1e-8)
    real, calls = scipy.linalg.sqrtm, []

    def first_fails(product: Any) -> Any:
        calls.append(product)
        return real(product) if len(calls) > 1 else np.full_like(product, np.nan)

    monkeypatch.setattr(scipy.linalg, "sqrtm", first_fails)
    assert frechet_distance(moments(a), moments(b), "sqrtm") == pytest.approx(theirs, abs=1e-3)
    assert "1e-6 is added" in caplog.text and np.abs(calls[1] - calls[0]).max() > 1e-7
    monkeypatch.setattr(scipy.linalg, "sqrtm", lambda product: real(product) + 1j)
    with pytest.raises(ValueError, match=r"metrics\.frechet: sqrtm; .* imaginary parts up to 1; allowed: svd"):
        frechet_distance(moments(a), moments(b), "sqrtm")


def test_frechet_of_gaussians_in_closed_form() -> None:
    # Commuting covariances: |Δμ|² + Σ (√a − √b)².
    first, second = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 1.0, 0.0]).double()
    rotation = torch.linalg.qr(features(3, 3, 5).double())[0]
    a = FeatureMoments(torch.zeros(3).double(), rotation @ first.diag() @ rotation.T, None)
    b = FeatureMoments(torch.tensor([1.0, 2, 2]).double(), rotation @ second.diag() @ rotation.T, None)
    assert frechet_distance(a, b) == pytest.approx(9 + 1 + 1 + 9, abs=1e-9)


def test_frechet_with_itself_and_with_other_features() -> None:
    a = features(300, 32, 0)
    assert abs(distance(a, a)) < 1e-8
    with pytest.raises(ValueError, match="32 and of 16"):
        distance(a, a[:, :16])


def test_moments_are_unbiased_and_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    a = features(300, 16, 0)
    found = moments(a)
    np.testing.assert_allclose(found.cov.numpy(), np.cov(a.double().numpy(), rowvar=False), atol=1e-13)
    monkeypatch.setattr(moments_module, "BLOCK", 64)
    assert torch.allclose(moments(a).cov, found.cov, atol=1e-14)
    with pytest.raises(ValueError, match="two images"):
        moments(a[:1])


def test_moment_sums_equal_moments() -> None:
    a, b = features(400, 32, 0, shift=30.0), features(400, 32, 1, shift=30.1)
    sums = MomentSums(32, shift=a[0])
    for part in a.split(37):
        sums.update(part)
    assert sums.finish().count == 400
    assert frechet_distance(sums.finish(), moments(b)) == pytest.approx(distance(a, b), abs=1e-9)


# ------------------------------------------------------------------------------------------------- IS


def class_logits(labels: Tensor, classes: int) -> Tensor:
    noise = torch.randn(len(labels), classes, generator=torch.Generator().manual_seed(7))
    return noise + 8.0 * torch.nn.functional.one_hot(labels, classes)


def test_inception_score_equals_torch_fidelity() -> None:
    logits = class_logits(ClassLabels(20).balanced(0, 1000), 20)
    theirs = isc_features_to_metric(logits, splits=5, shuffle=False)
    ours = inception_score(logits, split=200)
    assert ours.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-10)
    assert ours.std == pytest.approx(theirs["inception_score_std"], rel=1e-8)


def test_inception_score_of_labels_in_class_order_collapses() -> None:
    """What shuffled labels are for: the same images, in class order, score a fraction."""
    shuffled = ClassLabels(100).balanced(0, 2000)
    good = inception_score(class_logits(shuffled, 100), split=200).mean
    bad = inception_score(class_logits(shuffled.sort().values, 100), split=200).mean
    assert bad < 0.2 * good
    # Labels in turn are the opposite mistake: every split is balanced, more than the whole set by chance.
    assert inception_score(class_logits(torch.arange(2000) % 100, 100), split=200).mean > 1.02 * good
    assert any("in class order" in text for text in sample_warnings(2000, 64, 200, shuffled.sort().values))
    assert not any("in class order" in text for text in sample_warnings(2000, 64, 200, shuffled))


def predicted(labels: Tensor, classes: int, accuracy: float, seed: int = 0) -> Tensor:
    """Logits of a classifier that is right for `accuracy` of the samples, and else says any class."""
    generator = torch.Generator().manual_seed(seed)
    right = torch.rand(len(labels), generator=generator) < accuracy
    says = torch.where(right, labels, torch.randint(classes, (len(labels),), generator=generator))
    logits = torch.randn(len(labels), classes, generator=generator)
    logits[torch.arange(len(labels)), says] += 9.0
    return logits


def order_warnings(logits: Tensor, split: int, labels: Tensor | None = None) -> list[str]:
    score = inception_score(logits, split).mean
    return [text for text in sample_warnings(len(logits), 8, split, labels, logits, score) if "class order" in text]


@pytest.mark.parametrize(
    ("classes", "count", "split", "accuracy"),
    [(10, 1000, 100, 0.3), (10, 1000, 500, 0.8), (10, 50, 12, 1.0), (2, 60, 20, 1.0), (1000, 4000, 500, 0.7)],
)
def test_class_order_is_seen_without_labels(classes: int, count: int, split: int, accuracy: float) -> None:
    """guided-diffusion#165: an .npz in class order with arr_0 alone. The predictions show the order."""
    labels = torch.arange(count) * classes // count
    logits = predicted(labels, classes, accuracy)
    (text,) = order_warnings(logits, split)
    assert "of neighbours have the same predicted class" in text and "shuffle the images" in text
    shuffled = inception_score(logits[torch.randperm(count, generator=torch.Generator().manual_seed(5))], split).mean
    said = float(re.findall(r"shuffled, it is ([\d.]+)", text)[0])
    assert said == pytest.approx(shuffled, rel=0.12) and said > inception_score(logits, split).mean / 0.9
    assert len(order_warnings(logits, split, labels)) == 1, "with labels there is one warning, not two"
    # Backwards, and with the classes in another order: the same runs.
    assert order_warnings(logits.flip(0), split) and order_warnings(logits.flip(1), split)


@pytest.mark.parametrize(("classes", "count", "split"), [(1, 200, 50), (2, 30, 10), (10, 24, 5), (1000, 2000, 300)])
def test_samples_in_any_other_order_give_no_false_alarm(classes: int, count: int, split: int) -> None:
    for seed in range(10):
        labels = torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed))
        for accuracy in (0.2, 1.0):
            assert not order_warnings(predicted(labels, classes, accuracy, seed), split)
    # Runs that are short beside a split cost nothing: a grid with four of a class in a row.
    runs = torch.randint(10, (500,), generator=torch.Generator().manual_seed(0)).repeat_interleave(4)
    assert not order_warnings(predicted(runs, 10, 1.0), 500)
    # One split has no order.
    assert not order_warnings(predicted(torch.arange(count) * classes // count, classes, 1.0), count)


def test_inception_score_survives_a_certain_class() -> None:
    logits = class_logits(ClassLabels(10).balanced(0, 400), 10)
    logits[3, 2] = 120.0
    assert np.isfinite(inception_score(logits, split=200).mean)


def test_inception_score_of_a_short_last_split() -> None:
    logits = class_logits(ClassLabels(10).balanced(0, 450), 10)
    found = inception_score(logits, split=200)
    parts = [inception_score(part, split=200).mean for part in logits.split(200)]
    assert found.mean == pytest.approx(sum(parts) / 3)
    assert found.whole_splits == pytest.approx(sum(parts[:2]) / 2)
    assert any("multiple" in text for text in sample_warnings(450, 64, 200, None))


def test_inception_score_in_closed_form() -> None:
    # Certain and balanced over K classes: exp(log K) = K.
    logits = 1000.0 * torch.nn.functional.one_hot(torch.arange(50) % 5, 5).double()
    assert inception_score(logits, split=50).mean == pytest.approx(5.0)


# ------------------------------------------------------------------------------------------------- P, R, KID


def torch_fidelity_pr(samples: Tensor, reference: Tensor) -> tuple[float, float]:
    found = prc_features_to_metric(
        samples, reference, prc_neighborhood=3, prc_batch_size=10_000, save_cpu_ram=True, verbose=False
    )
    return found["precision"], found["recall"]


def test_precision_recall_equals_torch_fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, reference = features(700, 32, 0, shift=0.1), features(400, 32, 1)
    found = precision_recall(samples, reference, k=3)
    assert 0.2 < found.precision < 0.98 and 0.2 < found.recall < 0.98
    assert found == pytest.approx(torch_fidelity_pr(samples, reference))
    # Neither rows nor columns of a block matter.
    monkeypatch.setattr(neighbours, "ROWS", 64)
    monkeypatch.setattr(neighbours, "COLUMNS", 50)
    assert precision_recall(samples, reference, k=3) == found


def half_by_numpy(a: Tensor, b: Tensor) -> np.ndarray[Any, Any]:
    """ADM's |u|² − 2·u·v + |v|² with each operation in float16."""
    u, v = a.numpy().astype(np.float16), b.numpy().astype(np.float16)
    norms = [np.square(x).astype(np.float64).sum(1).astype(np.float16) for x in (u, v)]
    product = (u.astype(np.float64) @ v.astype(np.float64).T).astype(np.float16)
    return np.maximum(norms[0][:, None] - np.float16(2) * product + norms[1], np.float16(0)).astype(np.float32)


def test_float16_distances_are_those_of_adm_and_raise_both_scores() -> None:
    # Squared distances about 1,000, as those of Inception features: float16 has steps of 0.5 to 1 there.
    samples, reference = 3.0 * features(1500, 128, 0), 3.0 * features(800, 128, 1)
    found, exact = half_distances(samples, reference), squared_distances(samples, reference)
    assert (found != torch.from_numpy(half_by_numpy(samples, reference))).float().mean() < 0.02
    assert 0.1 < (found - exact).abs().mean() < 1.0
    coarse, fine = precision_recall(samples, reference, 3, "float16"), precision_recall(samples, reference, 3)
    assert 0.001 < coarse.precision - fine.precision < 0.01 and 0.001 < coarse.recall - fine.recall < 0.01
    # What overflows is taken in float32, as there.
    assert torch.equal(half_distances(200 * samples, reference), squared_distances(200 * samples, reference))


def test_precision_recall_swap() -> None:
    samples, reference = features(500, 16, 0, shift=0.3), features(300, 16, 1)
    one, other = precision_recall(samples, reference, 3), precision_recall(reference, samples, 3)
    assert (one.precision, one.recall) == (other.recall, other.precision)
    assert one.precision != one.recall
    with pytest.raises(ValueError, match="more than 3 samples, not 3"):
        precision_recall(samples[:3], reference, 3)


def test_kernel_distance_equals_torch_fidelity() -> None:
    samples, reference = features(200, 32, 0, shift=0.2).double(), features(200, 32, 1).double()
    # One subset that is everything: its order does not matter.
    theirs = kid_features_to_metric(
        samples, reference, kid_subsets=1, kid_subset_size=200, kid_kernel="poly", kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1, rng_seed=0, verbose=False,
    )  # fmt: skip
    ours = kernel_distance(samples, reference, subsets=1, size=200)
    assert ours.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    again = kernel_distance(samples, reference, subsets=5, size=50)
    assert again == kernel_distance(samples, reference, subsets=5, size=50) and again.std > 0


def test_subsets_of_kid_are_independent_and_of_the_smaller_set() -> None:
    # Subsets of one set: MMD² is 0 up to chance. The same rows on both sides would give −2/50 of the mean k(x, x).
    rows = features(400, 32, 0).double()
    same_rows = -2 / 50 * ((rows.square().sum(1) / 32 + 1) ** 3).mean().item()
    assert abs(kernel_distance(rows, rows, subsets=40, size=50).mean) < -0.2 * same_rows
    # A set of 30 allows subsets of 30. Two subsets have the standard deviation |a - b| / 2, as numpy divides by 2.
    few = rows[:30]
    one, two = kernel_distance(few, rows, subsets=1, size=1000), kernel_distance(few, rows, subsets=2, size=1000)
    assert one == kernel_distance(few, rows, subsets=1, size=30) and one.std == 0
    assert kernel_distance(rows, few, subsets=1, size=1000) == kernel_distance(rows, few, subsets=1, size=30)
    second = 2 * two.mean - one.mean
    assert two.std == pytest.approx(abs(one.mean - second) / 2) and two.std > 0


def test_the_border_of_a_neighbourhood_counts_for_precision_and_not_for_density_and_coverage() -> None:
    """On a line, with k = 1: ADM's evaluator compares by <=, the official package of density and coverage by <."""
    reference = torch.tensor([[0.0], [1.0], [4.0]])  # distances to the next: 1, 1, 3
    samples = torch.tensor([[2.0], [7.0], [7.5], [50.0]])  # at the borders of 1 and of 4, and outside
    assert precision_recall(samples, reference, k=1) == (0.5, 1.0)
    theirs = compute_prdc(reference.numpy(), samples.numpy(), nearest_k=1)
    assert density_coverage(samples, reference, k=1) == (theirs["density"], pytest.approx(theirs["coverage"]))
    assert density_coverage(samples, reference, k=1) == (0.25, pytest.approx(1 / 3))


# ------------------------------------------------------------------------------------------------- density, MIND


def test_density_and_coverage_equal_the_official_package(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, reference = features(700, 32, 0, shift=0.3), features(400, 32, 1)
    found = density_coverage(samples, reference, k=MetricsConfig().density_neighbours)  # 5, as in the paper
    theirs = compute_prdc(reference.numpy(), samples.numpy(), nearest_k=5)
    assert 0.2 < found.coverage < 0.98 and found.density > 0.2
    assert found == pytest.approx((theirs["density"], theirs["coverage"]), abs=1e-6)
    same = precision_recall(samples, reference, k=5)
    assert same == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)
    assert density_coverage(samples, reference, k=3) != found
    monkeypatch.setattr(neighbours, "ROWS", 64)
    monkeypatch.setattr(density_coverage_module, "COLUMNS", 50)
    assert density_coverage(samples, reference, k=5) == found
    # The real images themselves: each ball holds its centre and k − 1 neighbours, and by rounding some k-th ones.
    assert density_coverage(reference, reference, k=5) == (pytest.approx(1.0, abs=0.01), 1.0)
    with pytest.raises(ValueError, match="more than 5 reference images"):
        density_coverage(samples, reference[:5], k=5)


def mind_by_numpy(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], drawn: np.ndarray[Any, Any]) -> float:
    """One direction at a time, with the quantiles of both sets."""
    squared = [np.mean((np.sort(x @ u) - np.sort(y @ u)) ** 2) for u in drawn]
    return float(3 * x.shape[1] * np.mean(squared))


def test_mind_is_the_sliced_wasserstein_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, reference = features(300, 32, 0, shift=0.2), features(300, 32, 1)
    found = monge_inception_distance(samples, reference, projections=64)
    expected = mind_by_numpy(samples.double().numpy(), reference.double().numpy(), directions(64, 32).numpy())
    assert found == pytest.approx(expected, rel=1e-12) and found > 0.1
    monkeypatch.setattr(monge_inception_module, "DIRECTIONS", 7)
    assert monge_inception_distance(samples, reference, projections=64) == pytest.approx(found, rel=1e-12)
    assert monge_inception_distance(samples, samples.flip(0), projections=64) == 0  # the order of rows does not matter


def test_mind_in_closed_form() -> None:
    # A shift by s moves each projection by u·s: α · E (u·s)² = 3 · |s|².
    rows, shift = features(200, 16, 0).double(), torch.linspace(-1, 1, 16).double()
    found = monge_inception_distance(rows, rows + shift, projections=40_000)
    assert found == pytest.approx(3 * shift.square().sum().item(), rel=0.02)
    # A scale s: 3 · (s − 1)² · the mean of |x|², for rows with W₂ between x and s·x.
    assert monge_inception_distance(rows, 1.5 * rows, projections=40_000) == pytest.approx(
        3 * 0.25 * rows.square().sum(1).mean().item(), rel=0.02
    )


def test_mind_takes_the_same_number_of_rows_of_both_sets() -> None:
    samples, reference = features(500, 16, 0, shift=0.1), features(300, 16, 1)
    same = [monge_inception_distance(samples, reference, count=count, projections=32) for count in (300, 5000)]
    assert same[0] == same[1] != monge_inception_distance(samples, reference, count=200, projections=32)
    # Both sets draw their own rows: one set beside itself is 0 with all rows alone.
    assert monge_inception_distance(samples, samples, count=200, projections=32) > 0.01
    with pytest.raises(ValueError, match="16 and 8 features"):
        monge_inception_distance(samples, reference[:, :8])


# ------------------------------------------------------------------------------------------------- the rest


def test_few_samples_are_warned_about() -> None:
    found = sample_warnings(1000, 2048, 5000, None)
    assert any("biased upwards" in text for text in found)
    # The covariance of N rows has rank N - 1.
    singular = ["singular" in " ".join(sample_warnings(count, 64, 5000)) for count in (64, 65)]
    assert singular == [True, False]
    assert not sample_warnings(50_000, 2048, 5000, ClassLabels(1000).balanced(0, 50_000))


@pytest.mark.parametrize(
    "field",
    ["is_split", "neighbours", "reference_images", "kid_subsets", "kid_size", "mind_samples", "mind_projections"],
)
def test_config_refuses_nonsense(field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: -1"):
        MetricsConfig(**{field: -1})


def test_every_metric_cites_its_source() -> None:
    public = [
        function
        for module in (
            frechet,
            inception_score_module,
            influence,
            kernel_distance_module,
            moments_module,
            neighbours,
            density_coverage_module,
            monge_inception_module,
        )  # fmt: skip
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
    ]
    unsourced = {function.__name__ for function in public if "arXiv" not in (function.__doc__ or "")}
    assert len(public) > 12 and unsourced == {
        "squared_distances", "half_distances", "over_ranks", "drawn_rows",  # plain arithmetic, ADM's, and no score
        "transport_potentials",  # of a book
    }  # fmt: skip
