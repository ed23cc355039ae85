"""A texture codec without training: PCA of square patches, for images that are too small for a texture VAE.

N batch · C components · H, W image · P patch side · h, w patch grid.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from torch import Tensor

from sfd_scale.runtime.settings import at_least
from sfd_scale.tokenizers.pca import ComponentBuffers, fit_components, load_components
from sfd_scale.tokenizers.protocols import Posterior, fingerprint, from_uint8, to_uint8


@dataclass(frozen=True, kw_only=True)
class PatchPCAConfig:
    """weights: a safetensors file from PatchPCA.save."""

    kind: Literal["patch_pca"] = "patch_pca"
    weights: Path


@dataclass(frozen=True, kw_only=True)
class PatchPCAFitConfig:
    """channels: latent channels, at most the 3·patch² values of a patch.

    alignment: weight of the features of tokenizer.vision, relative to the pixels. Above 0, the latents also predict the
        features at the patch (`CovarianceAccumulator.aligned`).
    """

    kind: Literal["patch_pca"] = "patch_pca"
    patch: int = 4
    channels: int = 16
    alignment: float = 0.0

    def __post_init__(self) -> None:
        at_least(self, patch=1, alignment=0)
        if not 1 <= self.channels <= 3 * self.patch**2:
            raise ValueError(f"channels: {self.channels}; allowed: 1 to {3 * self.patch**2} with patch {self.patch}")


def to_patches(images: Tensor, side: int) -> Tensor:
    """(N, 3, H, W) → (N, h, w, 3·P·P)."""
    if images.shape[2] % side or images.shape[3] % side:
        raise ValueError(f"patch: {side}; allowed: divisors of the image size, {tuple(images.shape[2:])}")
    blocks = images.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (N, 3, h, P, w, P)
    return blocks.permute(0, 2, 4, 1, 3, 5).flatten(3)


def from_patches(patches: Tensor, side: int) -> Tensor:
    """(N, h, w, 3·P·P) → (N, 3, H, W)."""
    blocks = patches.unflatten(3, (3, side, side))  # (N, h, w, 3, P, P)
    return blocks.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def patch_rows(images: Tensor, side: int) -> Tensor:
    """(N, 3, H, W) uint8 → (N·h·w, 3·P·P) in [−1, 1]."""
    return to_patches(from_uint8(images), side).flatten(0, 2)


class PatchPCA(ComponentBuffers):
    """The linear codec with the smallest reconstruction error for C values per patch.

    An aligned codec has the smallest weighted error of pixels and vision features.
    """

    @classmethod
    def fit(cls, images: Iterable[Tensor], config: PatchPCAFitConfig) -> Self:
        """Fit batches of images (N, 3, H, W) uint8."""
        return cls(fit_components((patch_rows(batch, config.patch) for batch in images), config.channels))

    @classmethod
    def load(cls, config: PatchPCAConfig) -> Self:
        return cls(load_components(config.weights, "a patch PCA"))

    @property
    def downsample(self) -> int:
        return round((len(self.mean) / 3) ** 0.5)

    @property
    def fingerprint(self) -> str:
        return fingerprint("patch_pca", self.state_dict())

    def encode(self, images: Tensor) -> Posterior:
        """(N, 3, H, W) uint8 → (N, C, h, w)."""
        patches = to_patches(from_uint8(images), self.downsample)
        return Posterior(self.project(patches).movedim(-1, 1).contiguous(), None)

    def decode(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) → (N, 3, H, W) uint8."""
        return to_uint8(from_patches(self.restore(latents.movedim(1, -1)), self.downsample))
