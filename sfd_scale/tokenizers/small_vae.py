"""The texture codec of the quickstart: a small VAE, trained on the images themselves.

N batch · C latent channels · H, W image · h, w latent grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor

from sfd_scale.tokenizers.protocols import (
    Frozen,
    Posterior,
    fingerprint,
    from_uint8,
    read_safetensors,
    to_uint8,
    with_weights,
)
from sfd_scale.toy.small_vae import SmallVAE, config_of


@dataclass(frozen=True, kw_only=True)
class SmallVAECodecConfig:
    """weights: a safetensors export of a trained SmallVAE. Their shapes give all sizes."""

    kind: Literal["small_vae"] = "small_vae"
    weights: Path


class SmallVAECodec(Frozen[SmallVAE]):
    """A frozen SmallVAE."""

    def __init__(self, model: SmallVAE) -> None:
        super().__init__(model)
        self.channels, self.downsample = model.config.latent_channels, model.config.downsample
        self.fingerprint = fingerprint("small_vae", model.state_dict())

    @classmethod
    def load(cls, config: SmallVAECodecConfig) -> Self:
        state = read_safetensors(config.weights, "a small_vae")
        return cls(with_weights(lambda: SmallVAE(config_of(state)), state, config.weights))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Posterior:
        """(N, 3, H, W) uint8 → posterior (N, C, h, w) float32."""
        return Posterior(*self.model.posterior(from_uint8(images)))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) → (N, 3, H, W) uint8."""
        return to_uint8(self.model.reconstruct(latents.float()))
