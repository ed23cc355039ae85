"""SemVAE: a transformer VAE that compresses the tokens of a vision encoder (arXiv 2512.04926).

N batch · T tokens · D feature channels · C latent channels · h, w grid (T = h·w).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor, nn

from sfd_scale import seeding
from sfd_scale.checks import at_least
from sfd_scale.models.authors import read_weights
from sfd_scale.tokenizers.codec import DETERMINISTIC_LOGVAR, Frozen, Moments, identity, with_weights

_LOGVAR_BOUNDS = (DETERMINISTIC_LOGVAR, 20.0)


@dataclass(frozen=True, kw_only=True)
class SemanticVAEConfig:
    """The authors' is the default; `blocks` is for each of encoder and decoder."""

    kind: Literal["semantic_vae"] = "semantic_vae"
    input_dim: int = 768
    bottleneck_dim: int = 16
    hidden_dim: int = 768
    heads: int = 6
    blocks: int = 4

    def __post_init__(self) -> None:
        at_least(self, input_dim=1, bottleneck_dim=1, hidden_dim=1, heads=1, blocks=1)
        if self.hidden_dim % self.heads:
            raise ValueError(f"heads: {self.heads}; allowed: divisors of hidden_dim, {self.hidden_dim}")


class TokenBlock(nn.Module):
    """Self-attention and MLP with norms before them: (N, T, hidden) → the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


def _side(inside: int, outside: int, config: SemanticVAEConfig) -> nn.Sequential:
    blocks = [TokenBlock(config.hidden_dim, config.heads) for _ in range(config.blocks)]
    ends = nn.LayerNorm(config.hidden_dim), nn.Linear(config.hidden_dim, outside)
    return nn.Sequential(nn.Linear(inside, config.hidden_dim), *blocks, *ends)


class SemanticVAE(nn.Module):
    """The model that is trained; SemanticVAECodec is how it is used."""

    def __init__(self, config: SemanticVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _side(config.input_dim, 2 * config.bottleneck_dim, config)
        self.decoder = _side(config.bottleneck_dim, config.input_dim, config)

    @property
    def blocks(self) -> nn.ModuleList:
        """The repeated blocks, which engines wrap one by one; a view, their names are those of the two sides."""
        return nn.ModuleList([layer for side in (self.encoder, self.decoder) for layer in side[1:-2]])

    @property
    def _dtype(self) -> torch.dtype:
        first = self.encoder[0]
        assert isinstance(first, nn.Linear)
        return first.weight.dtype

    def posterior(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(N, T, D) → mean and log-variance, (N, T, C) float32 each."""
        mean, logvar = self.encoder(tokens.to(self._dtype)).float().chunk(2, dim=-1)
        return mean, logvar.clamp(*_LOGVAR_BOUNDS)

    def reconstruct(self, latents: Tensor) -> Tensor:
        """(N, T, C) → (N, T, D) float32."""
        return self.decoder(latents.to(self._dtype)).float()

    def forward(self, tokens: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (N, T, D), standard normal noise (N, T, C) → reconstruction, mean, log-variance (arXiv 1312.6114)."""
        mean, logvar = self.posterior(tokens)
        return self.reconstruct(mean + torch.exp(0.5 * logvar) * noise), mean, logvar

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Xavier-uniform matrices, zero biases, unit norms; each parameter from its own generator."""
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, seed))


def initial_value(name: str, shape: torch.Size, seed: int) -> Tensor:
    """The start value of one parameter in its full shape, float32 on the CPU."""
    value = torch.zeros(shape)
    if name.endswith("bias"):
        return value
    if len(shape) == 1:
        return value.fill_(1)
    bound = (6 / sum(shape)) ** 0.5
    return value.uniform_(-bound, bound, generator=seeding.generator(seed, f"init:{name}"))


# -------------------------------------------------------------------------------------------------- codec


@dataclass(frozen=True, kw_only=True)
class SemanticVAECodecConfig:
    """Weights are safetensors, or a torch file of the authors; sizes follow from them, only heads leave no trace."""

    kind: Literal["semantic_vae"] = "semantic_vae"
    weights: Path
    heads: int = 6


def config_of(state: Mapping[str, Tensor], heads: int) -> SemanticVAEConfig:
    """The settings that weights were made with, from their shapes.

    Raises:
        ValueError: if these are not weights of a SemanticVAE.
    """
    last = max(
        (int(n.split(".")[1]) for n in state if n.startswith("encoder.") and n.split(".")[1].isdigit()), default=0
    )
    if last < 3 or "encoder.0.weight" not in state or f"encoder.{last}.weight" not in state:
        raise ValueError("these are not the weights of a semantic VAE: encoder.0.weight … encoder.N.weight is missing")
    hidden, inside = state["encoder.0.weight"].shape
    bottleneck = state[f"encoder.{last}.weight"].shape[0] // 2
    return SemanticVAEConfig(
        input_dim=inside, bottleneck_dim=bottleneck, hidden_dim=hidden, heads=heads, blocks=last - 2
    )


class SemanticVAECodec(Frozen[SemanticVAE]):
    """A trained, frozen SemanticVAE on grids."""

    def __init__(self, model: SemanticVAE) -> None:
        super().__init__(model)
        self.dim, self.channels = model.config.input_dim, model.config.bottleneck_dim
        self.identity = identity("semantic_vae", model.state_dict(), f"heads={model.config.heads}")

    @classmethod
    def load(cls, config: SemanticVAECodecConfig) -> Self:
        state = read_weights(config.weights)
        return cls(with_weights(lambda: SemanticVAE(config_of(state, config.heads)), state, config.weights))

    @torch.no_grad()
    def encode(self, features: Tensor) -> Moments:
        """(N, D, h, w) → moments (N, C, h, w)."""
        grid = features.shape[2:]
        mean, logvar = self.model.posterior(features.flatten(2).transpose(1, 2))
        return Moments(*(part.transpose(1, 2).unflatten(2, grid).contiguous() for part in (mean, logvar)))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) → (N, D, h, w)."""
        tokens = self.model.reconstruct(latents.flatten(2).transpose(1, 2))
        return tokens.transpose(1, 2).unflatten(2, latents.shape[2:])
