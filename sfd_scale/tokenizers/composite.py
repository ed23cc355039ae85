"""The composite tokenizer: images to latents and back, by a texture codec, a vision encoder and a semantic codec.

N batch · C latent channels · D feature channels · H, W image · h, w latent grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from sfd_scale.diffusion.latents import DETERMINISTIC_LOGVAR, LatentLayout
from sfd_scale.tokenizers.protocols import (
    Posterior,
    Precision,
    SemanticCodec,
    TextureCodec,
    VisionEncoder,
    in_precision,
)


@dataclass(frozen=True)
class Encoded:
    """latents (N, C, h, w), not normalised; logvar, of that shape, or None; features (N, D, h, w) or None; float32."""

    latents: Tensor
    logvar: Tensor | None
    features: Tensor | None


class FeatureTokenizer:
    """A vision encoder without codecs: features and no latents."""

    def __init__(self, vision: VisionEncoder | None, precision: Precision = "fp32") -> None:
        self.vision, self.precision = vision, precision

    @property
    def fingerprints(self) -> dict[str, str]:
        """Identity of the vision encoder, for the manifest."""
        return {} if self.vision is None else {"vision": self.vision.fingerprint}

    def grid(self, image_size: int) -> int:
        """Height and width of the feature grid of square images of `image_size`."""
        assert self.vision is not None
        return self.vision.grid(image_size)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 → (N, D, h, w) float32."""
        assert self.vision is not None
        with in_precision(self.precision, images.device):
            return self.vision.features(images).float()


class CompositeTokenizer(FeatureTokenizer):
    """Encodes and decodes composite latents.

    A layout without semantic channels needs no semantic codec. A vision encoder without one only gives features.

    Raises:
        ValueError: if the parts do not fit the layout or each other.
    """

    def __init__(
        self,
        texture: TextureCodec,
        vision: VisionEncoder | None,
        semantic: SemanticCodec | None,
        layout: LatentLayout,
        precision: Precision = "fp32",
    ) -> None:
        super().__init__(vision, precision)
        self.texture, self.semantic, self.layout = texture, semantic, layout
        for part, codec, wanted in (
            ("texture", texture.channels, layout.texture_channels),
            ("semantic", 0 if semantic is None else semantic.channels, layout.semantic_channels),
        ):
            if codec != wanted:
                raise ValueError(f"latents.{part}_channels: {wanted}; allowed: {codec}, as tokenizer.{part} has")
        if semantic is not None and (vision is None or vision.dim != semantic.dim):
            given = "none" if vision is None else f"one with {vision.dim} channels"
            raise ValueError(
                f"tokenizer.vision: {given}; allowed: one with {semantic.dim}, as tokenizer.semantic needs"
            )
        if vision is not None and vision.grid(self.image_size) != layout.size:
            raise ValueError(
                f"tokenizer.vision: its grid is {vision.grid(self.image_size)} for images of {self.image_size}; "
                f"allowed: {layout.size}, as latents.size"
            )

    @property
    def image_size(self) -> int:
        """Height and width of the images that give latents of the layout's size."""
        return self.layout.size * self.texture.downsample

    @property
    def fingerprints(self) -> dict[str, str]:
        """Identities of the parts, for the manifest."""
        parts = {"texture": self.texture, "vision": self.vision, "semantic": self.semantic}
        return {name: part.fingerprint for name, part in parts.items() if part is not None}

    def to(self, device: torch.device) -> Self:
        self.texture.to(device)
        for part in (self.vision, self.semantic):
            if part is not None:
                part.to(device)
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> Encoded:
        """Encode (N, 3, H, W) uint8 to posterior means and log-variances, with the vision features.

        Raises:
            ValueError: if the size of the images does not fit the layout.
        """
        if images.shape[1:] != (3, self.image_size, self.image_size):
            size = self.image_size
            raise ValueError(f"images are {tuple(images.shape[1:])}; allowed: (3, {size}, {size})")
        features = None if self.vision is None else self.features(images)
        with in_precision(self.precision, images.device):
            texture = _float32(self.texture.encode(images))
            if self.semantic is None or features is None:
                return Encoded(texture.mean, texture.logvar, features)
            semantic = _float32(self.semantic.encode(features))
        latents = self.layout.join(texture.mean, semantic.mean)
        if texture.logvar is None and semantic.logvar is None:
            return Encoded(latents, None, features)
        return Encoded(latents, self.layout.join(_logvar(texture), _logvar(semantic)), features)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (N, C, h, w), not normalised, to (N, 3, H, W) uint8. Only the texture part is used."""
        texture, _ = self.layout.split(latents)
        return self.texture.decode(texture)


def _float32(posterior: Posterior) -> Posterior:
    return Posterior(posterior.mean.float(), None if posterior.logvar is None else posterior.logvar.float())


def _logvar(posterior: Posterior) -> Tensor:
    return torch.full_like(posterior.mean, DETERMINISTIC_LOGVAR) if posterior.logvar is None else posterior.logvar
