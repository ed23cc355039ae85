"""The semantic codec: a pretrained SemVAE, which compresses the features of a vision encoder (arXiv 2512.04926).

N batch · T tokens · D feature channels · C latent channels · h, w grid (T = h·w).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor

from sfd_scale.models.semantic_vae import SemanticVAE, SemanticVAEConfig
from sfd_scale.runtime.weight_files import read_weights
from sfd_scale.tokenizers.protocols import Frozen, Posterior, fingerprint, with_weights


@dataclass(frozen=True, kw_only=True)
class SemanticVAECodecConfig:
    """weights: a safetensors file, or an official torch file. Their shapes give all sizes but the number of heads."""

    kind: Literal["semantic_vae"] = "semantic_vae"
    weights: Path
    heads: int = 6


def config_of(state: Mapping[str, Tensor], heads: int) -> SemanticVAEConfig:
    """The settings of a SemanticVAE, from the shapes of its weights.

    Raises:
        ValueError: if these are not the weights of a SemanticVAE.
    """
    last = max(
        (int(n.split(".")[1]) for n in state if n.startswith("encoder.") and n.split(".")[1].isdigit()), default=0
    )
    if last < 3 or "encoder.0.weight" not in state or f"encoder.{last}.weight" not in state:
        raise ValueError("not the weights of a semantic VAE: encoder.0.weight … encoder.N.weight are missing")
    hidden, inside = state["encoder.0.weight"].shape
    bottleneck = state[f"encoder.{last}.weight"].shape[0] // 2
    return SemanticVAEConfig(
        input_dim=inside, bottleneck_dim=bottleneck, hidden_dim=hidden, heads=heads, blocks=last - 2
    )


class SemanticVAECodec(Frozen[SemanticVAE]):
    """A frozen SemanticVAE, applied to feature grids."""

    def __init__(self, model: SemanticVAE) -> None:
        super().__init__(model)
        self.dim, self.channels = model.config.input_dim, model.config.bottleneck_dim
        self.fingerprint = fingerprint("semantic_vae", model.state_dict(), f"heads={model.config.heads}")

    @classmethod
    def load(cls, config: SemanticVAECodecConfig) -> Self:
        state = read_weights(config.weights)
        return cls(with_weights(lambda: SemanticVAE(config_of(state, config.heads)), state, config.weights))

    @torch.no_grad()
    def encode(self, features: Tensor) -> Posterior:
        """(N, D, h, w) → posterior (N, C, h, w)."""
        grid = features.shape[2:]
        mean, logvar = self.model.posterior(features.flatten(2).transpose(1, 2))
        return Posterior(*(part.transpose(1, 2).unflatten(2, grid).contiguous() for part in (mean, logvar)))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) → (N, D, h, w)."""
        tokens = self.model.reconstruct(latents.flatten(2).transpose(1, 2))
        return tokens.transpose(1, 2).unflatten(2, latents.shape[2:])
