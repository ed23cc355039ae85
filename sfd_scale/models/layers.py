"""The parts of a LightningDiT block. Norms and time features are computed in float32 whatever the weights' dtype.

N batch · T tokens · D width · A heads.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from sfd_scale.models.attention import AttentionBackend, attention
from sfd_scale.models.rope import Rotation, rotate

NormKind = Literal["rms", "layer"]
MlpKind = Literal["swiglu", "gelu"]
FREQUENCIES = 256
MAX_PERIOD = 10000.0


class RMSNorm(nn.Module):
    """x / rms(x), times a learned scale (arXiv 1910.07467), over the last axis."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) → the same shape and dtype."""
        return functional.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm, computed in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) → the same shape and dtype."""
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return functional.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


def token_norm(kind: NormKind, dim: int) -> nn.Module:
    """The norm before attention, MLP and output; adaLN scales a LayerNorm, so that one has no weights of its own."""
    return RMSNorm(dim) if kind == "rms" else LayerNorm(dim, eps=1e-6, elementwise_affine=False)


def head_norm(kind: NormKind, dim: int) -> nn.Module:
    """The norm of each head's queries and keys."""
    return RMSNorm(dim) if kind == "rms" else LayerNorm(dim, eps=1e-5)


def modulate(x: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
    """adaLN (arXiv 2212.09748, Sec. 3.2): x (N, T, D) scaled and shifted by (N, D)."""
    scaled = x * (1 + scale[:, None])
    return scaled if shift is None else scaled + shift[:, None]


class SwiGLU(nn.Module):
    """silu(x·w1) · (x·w2) · w3 with w1, w2 fused (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(functional.silu(gate) * value)


class GeluMlp(nn.Module):
    """Two linears with the tanh form of GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))


def mlp_hidden(kind: MlpKind, width: int) -> int:
    """4·width, or two thirds of it for SwiGLU, whose three matrices then cost what GELU's two do."""
    return int(2 / 3 * 4 * width) if kind == "swiglu" else 4 * width


def make_mlp(kind: MlpKind, width: int) -> nn.Module:
    hidden = mlp_hidden(kind, width)
    return SwiGLU(width, hidden) if kind == "swiglu" else GeluMlp(width, hidden)


class Attention(nn.Module):
    """Self-attention with normed and rotated queries and keys."""

    def __init__(self, width: int, heads: int, norm: NormKind | None, backend: AttentionBackend) -> None:
        super().__init__()
        self.heads, self.backend = heads, backend
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.Identity() if norm is None else head_norm(norm, width // heads)
        self.k_norm = nn.Identity() if norm is None else head_norm(norm, width // heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        """(N, T, D) → (N, T, D)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (N, T, 3, A, D/A)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (N, A, T, D/A) each
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return self.proj(attention(q, k, v, self.backend).transpose(1, 2).flatten(2))


def time_features(t: Tensor) -> Tensor:
    """Sinusoids of the raw time, cosines first: (N,) → (N, 256) float32."""
    half = FREQUENCIES // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedder(nn.Module):
    """(N,) times → (N, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(time_features(t).to(dtype))


class LabelEmbedder(nn.Module):
    """(N,) class indices → (N, width). The last row, index num_classes, is the null class of guidance."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class PatchEmbedder(nn.Module):
    """(N, C, H, W) → (N, T, width), row by row."""

    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class FinalLayer(nn.Module):
    """Tokens to pixels of their patch: (N, T, D) → (N, T, patch·patch·C)."""

    def __init__(self, width: int, out: int, norm: NormKind) -> None:
        super().__init__()
        self.norm_final = token_norm(norm, width)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))
