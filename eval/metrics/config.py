"""Settings of the scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sfd_scale.runtime.settings import at_least

Distances = Literal["float32", "float16"]


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """Settings that change scores. The defaults are those of ADM's evaluator.

    is_split: samples per split of the Inception Score.
    neighbours, reference_images: of precision and recall.
    kid_subsets, kid_size: the number of subsets of KID, and the images of each set in one subset. 0 subsets: no KID.
    mind_samples, mind_projections: images of each set, and random directions, of MIND. 0 projections: no MIND.
    density_neighbours: of density and coverage. 0: neither of them.
    mode: `exact` gives the same bits for any number of ranks. `low_memory` sums moments over chunks and ranks; it moves
        FID by at most about 1e-7. Precision, recall and KID hold the pooled features in memory in both modes.
    frechet: `svd` is exact to rounding. `sqrtm` is the matrix square root of ADM's evaluator: slower, 1e-9 away from
        `svd`, and up to 1e-4 away with fewer samples than features.
    distances: of precision and recall. `float16` emulates ADM's evaluator.
    """

    is_split: int = 5000
    neighbours: int = 3
    reference_images: int = 10_000
    kid_subsets: int = 100
    kid_size: int = 1000
    mind_samples: int = 5000
    mind_projections: int = 1000
    density_neighbours: int = 5
    mode: Literal["exact", "low_memory"] = "exact"
    frechet: Literal["svd", "sqrtm"] = "svd"
    distances: Distances = "float32"

    def __post_init__(self) -> None:
        at_least(self, is_split=2, neighbours=1, reference_images=2, kid_subsets=0, kid_size=2)
        at_least(self, mind_samples=2, mind_projections=0, density_neighbours=0)
