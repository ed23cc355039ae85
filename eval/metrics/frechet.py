"""The Fréchet distance between Gaussians: FID, sFID, and FD with other features. D feature channels."""

from __future__ import annotations

import logging
from typing import Literal

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from eval.metrics.moments import FeatureMoments
from eval.metrics.one_thread import one_thread

logger = logging.getLogger(__name__)


def frechet_distance(a: FeatureMoments, b: FeatureMoments, root: Literal["svd", "sqrtm"] = "svd") -> float:
    """|μa − μb|² + tr(Σa + Σb − 2·(Σa Σb)^½) (arXiv 1706.08500, Eq. 6).

    tr (Σa Σb)^½ is the sum of the singular values of Fᵀ G, for any factors with F Fᵀ = Σa and G Gᵀ = Σb. This is exact
    to rounding for singular covariances too, unlike roots of eigenvalues, and needs no multiple of the identity.

    Args:
        root: how the trace is computed. `sqrtm` is the way of ADM's evaluator; its result may be slightly below 0.

    Raises:
        ValueError: for moments of different features, or if sqrtm finds no real root.
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
    """tr (Σa Σb)^½ by scipy, without its imaginary part. If the root is not finite, 1e-6 is added to both diagonals."""
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
    """F (D, D) with F Fᵀ = cov. Eigenvalues that rounding made negative count as 0."""
    values, vectors = torch.linalg.eigh(cov)
    return vectors * values.clamp(min=0).sqrt()
