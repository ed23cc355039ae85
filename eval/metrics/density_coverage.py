"""Density and coverage by nearest neighbours. The ranks share the rows.

They are more robust to single outliers than precision and recall, whose manifolds an outlier enlarges.

N samples · M reference images · D feature channels · k neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eval.metrics.precision_recall import COLUMNS, over_ranks, radii, squared_distances
from sfd_scale.runtime.matmul import strict_float32


class DensityCoverage(NamedTuple):
    density: float
    coverage: float


def density_coverage(samples: Tensor, reference: Tensor, k: int) -> DensityCoverage:
    """Density and coverage (arXiv 2002.09797, Eq. 4 and 5) of samples (N, D) against the reference (M, D).

    All ranks have to call this with the same rows.

    Raises:
        ValueError: if the reference has at most k rows.
    """
    if len(reference) <= k:
        raise ValueError(f"density and coverage with {k} neighbours need more than {k} reference images")
    with strict_float32(samples.device):
        reach = radii(reference, k)
        dense, covered = density_of_samples(samples, reference, reach, k), covered_images(samples, reference, reach)
    return DensityCoverage(dense.mean().item(), covered.double().mean().item())


def density_of_samples(samples: Tensor, reference: Tensor, reach: Tensor, k: int) -> Tensor:
    """How many reference images (M, D) have each sample (N, D) in their neighbourhood, over k: (N,) float64.

    arXiv 2002.09797, Eq. 4. All ranks have to call this.

    Args:
        reach: (M,) squared distances of the reference images to their k-th neighbours; see `radii`.
    """

    def block(part: Tensor) -> Tensor:
        found = torch.zeros(len(part), dtype=torch.int64, device=part.device)
        for others, limit in zip(reference.split(COLUMNS), reach.split(COLUMNS), strict=True):
            found += (squared_distances(part, others) < limit).sum(1)
        return found

    return over_ranks(samples, block).double() / k


def covered_images(samples: Tensor, reference: Tensor, reach: Tensor) -> Tensor:
    """Whether the neighbourhood of each reference image (M, D) has a sample (N, D) in it: (M,) bool.

    arXiv 2002.09797, Eq. 5. All ranks have to call this.

    Args:
        reach: as for `density_of_samples`.
    """

    def block(part: Tensor) -> Tensor:
        nearest = [squared_distances(part, others).amin(1) for others in samples.split(COLUMNS)]
        return torch.stack(nearest).amin(0)

    return over_ranks(reference, block) < reach
