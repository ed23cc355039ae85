"""Scores of generated images, from features: FID, sFID, IS, KID. Precision and recall are in neighbours.py.

Everything is float64, over rows in the order of image numbers and in blocks of fixed size, so that no number depends
on how many ranks made the features.

N samples · M reference images · D feature channels · K logits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from eval.metrics.precision_recall import Distances
from sfd_scale.runtime import seeding
from sfd_scale.runtime.settings import at_least

logger = logging.getLogger(__name__)
BLOCK = 4096


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """Sizes that a score depends on; the defaults are those of ADM's evaluator.

    is_split: samples of one Inception Score. neighbours, reference_images: of precision and recall.
    kid_subsets, kid_size: how many subsets, and how many images of each set in one; 0 subsets leave KID out.
    mode: `exact` gives the same bits for any number of ranks; `low_memory` adds up moments over ranks, chunk by chunk,
        and moves FID by about 1e-7 at most. Precision, recall and KID still hold the pooled features.
    frechet: `svd`, exact to rounding, or `sqrtm`, the square root of a matrix that ADM's evaluator takes: slower, 1e-9
        away, and up to 1e-4 where there are fewer samples than features.
    distances: of precision and recall; `float16` emulates ADM's evaluator.
    """

    is_split: int = 5000
    neighbours: int = 3
    reference_images: int = 10_000
    kid_subsets: int = 100
    kid_size: int = 1000
    mode: Literal["exact", "low_memory"] = "exact"
    frechet: Literal["svd", "sqrtm"] = "svd"
    distances: Distances = "float32"

    def __post_init__(self) -> None:
        at_least(self, is_split=2, neighbours=1, reference_images=2, kid_subsets=0, kid_size=2)


@dataclass(frozen=True)
class FeatureMoments:
    """Mean (D,) and covariance (D, D) of `count` rows, float64."""

    mean: Tensor
    cov: Tensor
    count: int | None

    def to(self, device: torch.device) -> FeatureMoments:
        return FeatureMoments(self.mean.to(device), self.cov.to(device), self.count)


class InceptionScore(NamedTuple):
    """Mean and standard deviation over the splits, by ADM's rule; `whole_splits` leaves a shorter last split out."""

    mean: float
    std: float
    whole_splits: float


class KernelDistance(NamedTuple):
    mean: float
    std: float


@contextmanager
def one_thread() -> Iterator[None]:
    """Float sums on the CPU depend on the number of threads; under a launcher that is another than without."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------- FID


def moments(features: Tensor) -> FeatureMoments:
    """Mean and covariance (divided by N − 1) of features (N, D) (arXiv 1706.08500, Sec. 3).

    Raises:
        ValueError: for fewer than two rows.
    """
    count, dim = features.shape
    if count < 2:
        raise ValueError(f"a covariance needs two images and more, there are {count}")
    with one_thread():
        mean = torch.zeros(dim, dtype=torch.float64, device=features.device)
        for block in features.split(BLOCK):
            mean += block.double().sum(0)
        mean /= count
        gram = torch.zeros(dim, dim, dtype=torch.float64, device=features.device)
        for block in features.split(BLOCK):
            centred = block.double() - mean
            gram += centred.T @ centred
    return FeatureMoments(mean, gram / (count - 1), count)


class MomentSums:
    """Moments in one pass and little memory, from sums that ranks can add up; within 1e-7 of `moments` for FID.

    The sums are of rows less a fixed `shift`, which keeps the subtraction of squares harmless.
    """

    def __init__(self, dim: int, shift: Tensor | None = None) -> None:
        self.shift = torch.zeros(dim, dtype=torch.float64) if shift is None else shift.double()
        self.sums = torch.zeros(dim + 1, dim + 1, dtype=torch.float64)  # of (1, x)(1, x)ᵀ: count, sum, outer products

    def update(self, features: Tensor) -> None:
        """Add rows (N, D)."""
        rows = torch.nn.functional.pad(features.cpu().double() - self.shift, (1, 0), value=1.0)
        self.sums += rows.T @ rows

    def finish(self) -> FeatureMoments:
        count = int(self.sums[0, 0].item())
        mean = self.sums[0, 1:] / count
        cov = (self.sums[1:, 1:] - count * torch.outer(mean, mean)) / (count - 1)
        return FeatureMoments(mean + self.shift, cov, count)


def frechet_distance(a: FeatureMoments, b: FeatureMoments, root: Literal["svd", "sqrtm"] = "svd") -> float:
    """|μa − μb|² + tr(Σa + Σb − 2·(Σa Σb)^½) (arXiv 1706.08500, Eq. 6).

    tr (Σa Σb)^½ is the sum of the singular values of Fᵀ G for any factors with F Fᵀ = Σa and G Gᵀ = Σb. Unlike roots of
    eigenvalues it is exact to rounding for singular covariances too, and needs no multiple of the identity.

    Args:
        root: how; `sqrtm` is the way of ADM's evaluator, and its result may be a little below 0.

    Raises:
        ValueError: for moments of different features, or where sqrtm finds no real root.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"moments of {len(a.mean)} and of {len(b.mean)} features; they are of two extractors")
    with one_thread():
        if root == "svd":
            trace = torch.linalg.svdvals(_factor(a.cov).T @ _factor(b.cov)).sum()
        else:
            trace = torch.tensor(_trace_of_root(a.cov, b.cov), dtype=torch.float64)
        distance = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * trace
    return float(distance.item())


def _trace_of_root(a: Tensor, b: Tensor) -> float:
    """tr (Σa Σb)^½ by scipy; with 1e-6 on both diagonals where that is not finite, and without an imaginary part."""
    one, other = a.cpu().numpy(), b.cpu().numpy()
    root = scipy.linalg.sqrtm(one @ other)
    if not np.isfinite(root).all():
        logger.warning("the product of the covariances has no finite root: 1e-6 is added to their diagonals")
        more = 1e-6 * np.eye(len(one))
        root = scipy.linalg.sqrtm((one + more) @ (other + more))
    largest = float(np.abs(np.imag(np.diagonal(root))).max())
    if not largest < 1e-3:
        raise ValueError(
            f"metrics.frechet: sqrtm; the root of the covariances has imaginary parts up to {largest:.3g}; allowed: svd"
        )
    return float(np.real(np.trace(root)))


def _factor(cov: Tensor) -> Tensor:
    """F (D, D) with F Fᵀ = cov; eigenvalues that rounding made negative are 0."""
    values, vectors = torch.linalg.eigh(cov)
    return vectors * values.clamp(min=0).sqrt()


# ------------------------------------------------------------------------------------------------- IS


def inception_score(logits: Tensor | Iterable[Tensor], split: int) -> InceptionScore:
    """exp of the mean KL(p(y|x) ‖ p(y)) within each split of `split` rows (N, K) (arXiv 1606.03498, Sec. 4).

    As in ADM's evaluator the splits follow the order of rows and the last may be short, which lowers the mean. Rows may
    come in parts of any length, of which only a split is held.
    """
    scores, sizes = [], []
    with one_thread():
        for part in _regrouped([logits] if isinstance(logits, Tensor) else logits, split):
            scores.append(_split_score(part))
            sizes.append(len(part))
    values = torch.tensor(scores, dtype=torch.float64)
    whole = values[[size == split for size in sizes]] if split in sizes else values
    return InceptionScore(values.mean().item(), values.std(correction=0).item(), whole.mean().item())


def _regrouped(parts: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """The same rows in parts of `size`; the last may be shorter."""
    held: list[Tensor] = []
    for part in parts:
        for piece in part.split(size):
            held.append(piece)
            if sum(map(len, held)) >= size:
                rows = torch.cat(held)
                yield rows[:size]
                held = [rows[size:]] if len(rows) > size else []
    if held:
        yield torch.cat(held)


def _split_score(logits: Tensor) -> float:
    """exp(mean Σ p·log p − Σ q·log q), q the mean of p: log_softmax keeps probabilities of 0 finite."""
    total = torch.zeros(logits.shape[1], dtype=torch.float64, device=logits.device)
    negative_entropy = torch.zeros((), dtype=torch.float64, device=logits.device)
    for block in logits.split(BLOCK):
        log_p = block.double().log_softmax(1)
        total += log_p.exp().sum(0)
        negative_entropy += (log_p.exp() * log_p).sum()
    q = total / len(logits)
    marginal = torch.special.xlogy(q, q).sum()
    return float((negative_entropy / len(logits) - marginal).exp().item())


# ------------------------------------------------------------------------------------------------- KID


def kernel_distance(samples: Tensor, reference: Tensor, subsets: int, size: int, seed: int = 0) -> KernelDistance:
    """Unbiased MMD² under (x·y / D + 1)³, over seeded subsets of `size` rows each (arXiv 1801.01401, Sec. 4)."""
    size = min(size, len(samples), len(reference))
    values = []
    with one_thread():
        for number in range(subsets):
            x = samples[_subset(seed, "kid_samples", number, len(samples), size)].double()
            y = reference[_subset(seed, "kid_reference", number, len(reference), size)].double()
            values.append(_squared_mmd(x, y))
    result = torch.stack(values)
    return KernelDistance(result.mean().item(), result.std(correction=0).item())


def _subset(seed: int, stream: str, number: int, count: int, size: int) -> Tensor:
    return torch.randperm(count, generator=seeding.generator(seed, stream, number))[:size]


def _squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    size, dim = x.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / dim + 1) ** 3

    within = sum((k.sum() - k.diagonal().sum() for k in (kernel(x, x), kernel(y, y))), torch.zeros(()).to(x))
    return within / (size * (size - 1)) - 2 * kernel(x, y).mean()


# ------------------------------------------------------------------------------------------------- warnings


def sample_warnings(count: int, dim: int, split: int, labels: Tensor | None) -> list[str]:
    """What makes scores of `count` samples mean less than they seem, in sentences."""
    found = []
    if count <= dim:
        found.append(
            f"{count} samples for {dim} features: the covariance is singular and FID is biased upwards; compare it "
            f"only with FIDs of {count} samples"
        )
    if count < 50_000:
        found.append(f"{count} samples: FID falls and recall moves as samples grow; published values are of 50,000")
    if count % split and count > split:
        found.append(
            f"{count} samples are no multiple of the split of {split}: the last Inception Score is of {count % split} "
            "samples only and lowers the mean; the value over whole splits is beside it"
        )
    if labels is not None and len(labels) > split and _in_runs(labels):
        found.append(
            "labels come in runs of one class: the Inception Score over splits of the file is far too low; shuffle them"
        )
    return found


def _in_runs(labels: Tensor) -> bool:
    """Whether neighbours share their class far more often than chance: true for files in class order."""
    same = (labels[1:] == labels[:-1]).double().mean().item()
    shares = labels.unique(return_counts=True)[1].double() / len(labels)
    return same > shares.square().sum().item() + 0.3
