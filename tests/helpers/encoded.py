"""A small composite tokenizer, and digits that it has encoded, for tests of the data."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from sfd_scale.data.encode import StoreConfig, encode
from sfd_scale.data.manifest import Manifest
from sfd_scale.data.sources import DigitsConfig, Source, ToyImages
from sfd_scale.diffusion.latents import LatentLayout
from sfd_scale.tokenizers.composite import CompositeTokenizer, FeatureTokenizer
from sfd_scale.tokenizers.patch_pca import PatchPCA, PatchPCAFitConfig
from sfd_scale.tokenizers.pca import FeaturePCA
from sfd_scale.tokenizers.protocols import Posterior, from_uint8

LAYOUT = LatentLayout(texture_channels=6, semantic_channels=3, size=8)


class Pooled:
    """A vision encoder: the mean colour of each patch and its square, (N, 6, 8, 8) for images of 32x32."""

    dim, fingerprint = 6, "pooled:1"

    def grid(self, image_size: int) -> int:
        return image_size // 4

    def features(self, images: Tensor) -> Tensor:
        mean = functional.avg_pool2d(from_uint8(images), 4)
        return torch.cat([mean, mean.square()], dim=1)

    def to(self, device: torch.device) -> Self:
        return self


class Blurred(PatchPCA):
    """A patch PCA with a posterior variance that differs by channel."""

    def encode(self, images: Tensor) -> Posterior:
        mean = super().encode(images).mean
        return Posterior(mean, torch.arange(6.0).view(6, 1, 1).sub(8).expand_as(mean))


@functools.cache
def tokenizer(variance: bool = False) -> CompositeTokenizer:
    images = torch.stack([ToyImages(DigitsConfig())[i][0] for i in range(64)])
    codec = Blurred if variance else PatchPCA
    texture = codec.fit([images], PatchPCAFitConfig(patch=4, channels=6))
    semantic = FeaturePCA.fit([Pooled().features(images)], channels=3)
    return CompositeTokenizer(texture, Pooled(), semantic, LAYOUT)


def digits(count: int) -> ToyImages:
    return ToyImages(DigitsConfig(num_images=count, seed=3))


def encode_digits(out: Path, count: int = 40, source: Source | None = None, **store: Any) -> Manifest:
    """Encode digits in chunks of 8."""
    settings = StoreConfig(**{"chunk": 8, "batch": 4, **store})
    codec: FeatureTokenizer | None = None
    if settings.latents != "none":
        codec = tokenizer(settings.latents == "moments")
    elif settings.features != "none":
        codec = FeatureTokenizer(Pooled())
    recipe = {"name": "digits", "count": count, "store": settings}
    return encode(digits(count) if source is None else source, codec, settings, out, recipe)


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its path inside."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
