"""SemVAE: a transformer VAE that compresses the tokens of a vision encoder (arXiv 2512.04926).

N batch · T tokens · D feature channels · C latent channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sfd_scale.diffusion.latents import DETERMINISTIC_LOGVAR
from sfd_scale.models.layers import FusedMatrix
from sfd_scale.runtime import seeding
from sfd_scale.runtime.settings import at_least

_LOGVAR_BOUNDS = (DETERMINISTIC_LOGVAR, 20.0)


@dataclass(frozen=True, kw_only=True)
class SemanticVAEConfig:
    """The defaults are those of the paper. blocks: of the encoder, and of the decoder."""

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

    @property
    def description(self) -> str:
        return f"{self.kind}, {self.input_dim} → {self.bottleneck_dim} channels, {self.blocks} blocks per side"


class TokenBlock(nn.Module):
    """Self-attention and MLP with norms before them: (N, T, hidden) → the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.fused_weights = {
            "attn.in_proj_weight": FusedMatrix(3, heads), "attn.out_proj.weight": FusedMatrix(),
            "mlp.0.weight": FusedMatrix(), "mlp.2.weight": FusedMatrix(),
        }  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


def _side(inside: int, outside: int, config: SemanticVAEConfig) -> nn.Sequential:
    blocks = [TokenBlock(config.hidden_dim, config.heads) for _ in range(config.blocks)]
    ends = nn.LayerNorm(config.hidden_dim), nn.Linear(config.hidden_dim, outside)
    return nn.Sequential(nn.Linear(inside, config.hidden_dim), *blocks, *ends)


class SemanticVAE(nn.Module):
    """The model to train. SemanticVAECodec uses the trained one."""

    def __init__(self, config: SemanticVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _side(config.input_dim, 2 * config.bottleneck_dim, config)
        self.decoder = _side(config.bottleneck_dim, config.input_dim, config)

    @property
    def blocks(self) -> nn.ModuleList:
        """The repeated blocks, for engines. A view: their names are those of encoder and decoder."""
        return nn.ModuleList([layer for side in (self.encoder, self.decoder) for layer in side[1:-2]])

    def hidden_matrices(self) -> dict[str, FusedMatrix]:
        """The weights of the blocks by name, for optimizers that treat matrices as such; not those of both ends."""
        return {
            f"{prefix}.{name}": matrix
            for prefix, block in self.named_modules()
            if isinstance(block, TokenBlock)
            for name, matrix in block.fused_weights.items()
        }

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
