"""The reference of the scores: features of real images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from eval.metrics.moments import FeatureMoments


@dataclass(frozen=True)
class Reference:
    """Real images as the scores need them.

    pool, spatial: moments over all images, for FID and sFID.
    features: (M, P), pooled features of the images for precision, recall and KID. None: there are only statistics.
    grid: (3, H, W) uint8, a picture of some of the images.
    side: of the images in pixels; None: there are only statistics.
    provenance: what determines the reference, as results.json records it.
    file: the file in the cache.
    """

    pool: FeatureMoments
    spatial: FeatureMoments | None
    features: Tensor | None
    grid: Tensor | None
    side: int | None
    provenance: dict[str, Any]
    file: Path
