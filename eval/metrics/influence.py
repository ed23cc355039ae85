"""How much one image moves a score: influence functions, for the intervals of `eval compare`.

A score is linearised around the given images: the mean of the influences over resampled images is the change of the
resampled score. Scores of resampled sets are biased upwards, because such sets contain copies. This has no such bias.

N samples · M reference images · D feature channels · K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eval.features.extract import FeatureSet
from eval.metrics import precision_recall as neighbours
from eval.metrics.config import MetricsConfig
from eval.metrics.density_coverage import covered_images, density_of_samples
from eval.metrics.frechet import frechet_distance
from eval.metrics.inception_score import inception_score
from eval.metrics.moments import BLOCK, FeatureMoments, moments
from eval.metrics.monge_inception import (
    DIRECTIONS,
    SCALE,
    directions,
    drawn_rows,
    monge_inception_distance,
    transport_potentials,
)
from eval.metrics.one_thread import one_thread
from eval.metrics.reference import Reference


@dataclass(frozen=True)
class Influence:
    """A score, and by how much each image moves it, times their number: mean 0.

    per_image: (N,), of the samples; or (M,), of the reference images.
    of_reference: whether it is of the reference images, which two results share.
    """

    value: float
    per_image: Tensor
    of_reference: bool = False


# ------------------------------------------------------------------------------------------------- of features


def frechet_influence(features: Tensor, reference: FeatureMoments) -> Influence:
    """Of the Fréchet distance (arXiv 1706.08500, Eq. 6), for features (N, D).

    d|μ − m|² = 2 (μ − m)·dμ, and dF/dΣ = I − T with T the optimal transport map between the Gaussians,
    T = Σ^−½ (Σ^½ S Σ^½)^½ Σ^−½ (Takatsu 2011, Osaka J. Math. 48, Sec. 2), on the range of Σ.
    """
    own = moments(features)
    values, vectors = torch.linalg.eigh(own.cov)
    kept = values > values.max() * 1e-10
    roots, basis = values[kept].sqrt(), vectors[:, kept]
    inner = (basis * roots).T @ reference.cov @ (basis * roots)
    eigen, turn = torch.linalg.eigh((inner + inner.T) / 2)
    # |(Σ^½ S Σ^½)^¼ Σ^−½ (x − μ)|² for each row.
    whiten = (basis / roots) @ turn * eigen.clamp(min=0).pow(0.25)
    parts = []
    for block in features.split(BLOCK):
        centred = block.double() - own.mean
        shifted = 2 * centred @ (own.mean - reference.mean)
        parts.append(shifted + centred.square().sum(1) - (centred @ whiten).square().sum(1))
    moved = torch.cat(parts)
    return Influence(frechet_distance(own, reference), moved - moved.mean())


def inception_influence(logits: Tensor, split: int) -> Influence:
    """Of the Inception Score (arXiv 1606.03498, Sec. 4) of logits (N, K): in a split, IS · (KL(p_i ‖ q) − its mean)."""
    moved = []
    parts = logits.split(split)
    for part in parts:
        log_p = part.double().log_softmax(1)
        q = log_p.exp().mean(0)
        divergence = (log_p.exp() * (log_p - q.clamp(min=1e-300).log())).sum(1)
        mean = divergence.mean()
        # A split counts the same however many images it has.
        moved.append(mean.exp() * (divergence - mean) * (len(logits) / len(parts) / len(part)))
    return Influence(inception_score(logits, split).mean, torch.cat(moved))


def monge_influence(samples: Tensor, reference: Tensor, count: int, projections: int, seed: int = 0) -> Influence:
    """Of MIND (arXiv 2605.06797) for features (N, D) and (M, D): 0 for rows that it does not draw."""
    (_, rows), (_, real) = drawn_rows(samples, reference, count, seed)
    moved = torch.zeros(len(samples), dtype=torch.float64, device=samples.device)
    with one_thread():
        x, y = samples[rows].double(), reference[real].double()
        for part in directions(projections, x.shape[1], seed).to(x.device).split(DIRECTIONS):
            moved[rows] += transport_potentials(x, y, part).sum(1)
    factor = SCALE * x.shape[1] / projections * len(samples) / len(rows)
    return Influence(monge_inception_distance(samples, reference, count, projections, seed), factor * moved)


def share_influence(inside: Tensor, *, of_reference: bool = False) -> Influence:
    """Of a share of rows (arXiv 1904.06991, Eq. 2): whether each row (N,) is inside, less the share."""
    values = inside.double()
    return Influence(values.mean().item(), values - values.mean(), of_reference)


# ------------------------------------------------------------------------------------------------- of each score
# The functions that the table of scores names. None: features are missing on one side.


def fid(samples: FeatureSet, reference: Reference, settings: MetricsConfig) -> Influence | None:
    """Of FID (arXiv 1706.08500)."""
    return frechet_influence(samples.pool, reference.pool)


def sfid(samples: FeatureSet, reference: Reference, settings: MetricsConfig) -> Influence | None:
    """Of sFID (arXiv 2103.03841)."""
    if samples.spatial is None or reference.spatial is None:
        return None
    return frechet_influence(samples.spatial, reference.spatial)


def inception(samples: FeatureSet, reference: Reference, settings: MetricsConfig) -> Influence | None:
    """Of the Inception Score (arXiv 1606.03498)."""
    return None if samples.logits is None else inception_influence(samples.logits, settings.is_split)


def precision(samples: FeatureSet, reference: Reference, settings: MetricsConfig) -> Influence | None:
    """Of precision (arXiv 1904.06991). All ranks have to call this."""
    if reference.features is None:
        return None
    return share_influence(_inside(samples.pool, reference.features, settings))


def recall(samples: FeatureSet, reference: Reference, settings: MetricsConfig) -> Influence | None:
    """Of recall (arXiv 1904.06991). All ranks have to call this."""
    if reference.features is None:
        return None
    return share_influence(_inside(reference.features, samples.pool, settings), of_reference=True)


def monge(samples: FeatureSet, reference: Reference, settings: MetricsConfig) -> Influence | None:
    """Of MIND (arXiv 2605.06797)."""
    if reference.features is None or not settings.mind_projections:
        return None
    return monge_influence(samples.pool, reference.features, settings.mind_samples, settings.mind_projections)


def density(samples: FeatureSet, reference: Reference, settings: MetricsConfig) -> Influence | None:
    """Of density (arXiv 2002.09797, Eq. 4), a mean over samples. All ranks have to call this."""
    real, k = reference.features, settings.density_neighbours
    if real is None or not k or len(real) <= k:
        return None
    values = density_of_samples(samples.pool, real, neighbours.radii(real, k), k)
    return Influence(values.mean().item(), values - values.mean())


def coverage(samples: FeatureSet, reference: Reference, settings: MetricsConfig) -> Influence | None:
    """Of coverage (arXiv 2002.09797, Eq. 5), a share of the reference images. All ranks have to call this."""
    real, k = reference.features, settings.density_neighbours
    if real is None or not k or len(real) <= k:
        return None
    return share_influence(covered_images(samples.pool, real, neighbours.radii(real, k)), of_reference=True)


def _inside(rows: Tensor, centres: Tensor, settings: MetricsConfig) -> Tensor:
    radii = neighbours.radii(centres, settings.neighbours, settings.distances)
    return neighbours.within(rows, centres, radii, settings.distances)
