"""Layers of LightningDiT: norms, embeddings, SwiGLU, modulation.

N batch · T tokens · D width · A heads · F features of one head.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from sfd_scale.diffusion.conditioning import Conditioning

MlpKind = Literal["swiglu", "gelu"]


class FusedMatrix(NamedTuple):
    """A weight of a hidden layer, whose rows are `matrices` matrices of equal height, each of them of `heads` heads."""

    matrices: int = 1
    heads: int = 1


def sums_by_sample(device: torch.device) -> bool:
    """Whether gradients of biases and norms are summed over the tokens of a sample, and then over the samples.

    The compiler for GPUs fuses the first sum with the computation of its terms. Without it, a second kernel reads them
    from memory. It changes no result but for the order of sums.
    """
    return device.type == "cuda" and torch.compiler.is_compiling()


class _Linear(torch.autograd.Function):
    """A linear layer of tokens (N, T, D), whose bias gradient is summed by sample."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        (dy,) = upstream
        rows = dy.flatten(0, 1)
        bias = dy.sum(1, dtype=torch.float32).sum(0).to(dy.dtype)
        return (rows @ weight).view_as(x), rows.mT @ x.flatten(0, 1), bias


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x · weightᵀ + bias for tokens (N, T, D)."""
    return _Linear.apply(x, weight, bias) if sums_by_sample(x.device) else functional.linear(x, weight, bias)


class TokenLinear(nn.Linear):
    """A linear layer of tokens (N, T, D)."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """x / rms(x) · weight, computed in float32 (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class RMSNormBySample(RMSNorm):
    """RMSNorm of tokens (N, T, D); compiled for a GPU, the gradient of its weight is summed by sample."""

    def forward(self, x: Tensor) -> Tensor:
        if not sums_by_sample(x.device):
            return super().forward(x)
        # A copy of the weight for each sample, in no memory: its gradient is a sum over tokens.
        weight = self.weight.float().expand(len(x), 1, -1)
        return (functional.rms_norm(x.float(), self.weight.shape, None, self.eps) * weight).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """PyTorch's LayerNorm, computed in float32."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None if p is None else p.float() for p in (self.weight, self.bias))
        return functional.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class TimestepEmbedder(nn.Module):
    """256 sinusoids of the raw t in [0, 1] (cosines first), then an MLP: (N,) → (N, D)."""

    num_sinusoids = 256
    max_period = 10_000.0

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.num_sinusoids, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        half = self.num_sinusoids // 2
        # Always float32: in bf16 neighbouring times become one.
        steps = torch.arange(half, device=t.device, dtype=torch.float32)
        angles = t.float()[:, None] * torch.exp(-math.log(self.max_period) * steps / half)
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=1)
        dtype: torch.dtype = self.mlp[0].weight.dtype  # type: ignore[assignment]
        return self.mlp(sinusoids.to(dtype))


class LabelEmbedder(nn.Module):
    """One row per class, and a last row for the null label of classifier-free guidance: (N,) → (N, D)."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


def condition_embedder(conditioning: Conditioning, dim: int) -> LabelEmbedder:
    """The embedder of a kind of condition: (N, …) → (N, D)."""
    return LabelEmbedder(conditioning.num_classes, dim)


class PatchProjection(nn.Conv2d):
    """The convolution over non-overlapping patches as one matmul: (N, C, H, W) → (N, T, D), row by row.

    A convolution would return (N, D, h, w). As tokens, that is transposed memory. Residual sums keep this layout, and
    every norm would read along the slow axis.
    """

    def forward(self, x: Tensor) -> Tensor:
        side = self.kernel_size[0]
        grid = x.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (N, C, h, p, w, q)
        patches = grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (N, T, C·p·q)
        return functional.linear(patches, self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Non-overlapping patches as tokens, row by row: (N, C, H, W) → (N, T, D)."""

    def __init__(self, patch_size: int, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = PatchProjection(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def unpatchify(tokens: Tensor, patch_size: int, channels: int) -> Tensor:
    """(N, T, p·p·C) → (N, C, H, W), for a square grid."""
    side = math.isqrt(tokens.shape[1])
    grid = tokens.unflatten(1, (side, side)).unflatten(3, (patch_size, patch_size, channels))  # (N, h, w, p, q, C)
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def mlp_hidden(kind: MlpKind, width: int, ratio: float = 4.0) -> int:
    """ratio·width; for SwiGLU two thirds of it: its three matrices then cost as much as the two of a GELU MLP."""
    hidden = int(ratio * width)
    return int(2 / 3 * hidden) if kind == "swiglu" else hidden


# A GPU's matrix units read rows whose length is a multiple of 16 bytes, and are fastest with multiples of 64 elements.
ALIGNMENT = 64


def pads_widths(device: torch.device) -> bool:
    """Whether matmuls of odd widths are padded there. It changes no result but for the order of sums."""
    return device.type == "cuda"


class GateProjection(nn.Linear):
    """The two matrices of SwiGLU's gate and value in one. On a GPU each gets zero rows up to an aligned width."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) → (…, 2·H), for a hidden width of H."""
        spare = -(self.out_features // 2) % ALIGNMENT
        if spare == 0 or not pads_widths(x.device):
            return linear(x, self.weight, self.bias)
        weight = functional.pad(self.weight.unflatten(0, (2, -1)), (0, 0, 0, spare)).flatten(0, 1)
        bias = functional.pad(self.bias.unflatten(0, (2, -1)), (0, spare)).flatten()
        return linear(x, weight, bias)


class OutProjection(nn.Linear):
    """Takes hidden features that are padded with zeros, by as many zero columns."""

    def forward(self, x: Tensor) -> Tensor:
        spare = x.shape[-1] - self.in_features
        weight = self.weight if spare == 0 else functional.pad(self.weight, (0, spare))
        return linear(x, weight, self.bias)


class SwiGLU(nn.Module):
    """silu(x·W1) · (x·W2) · W3, W1 and W2 in one matrix (arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w12 = GateProjection(dim, 2 * hidden)
        self.w3 = OutProjection(hidden, dim)
        self.fused_weights = {"w12.weight": FusedMatrix(2), "w3.weight": FusedMatrix()}

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(functional.silu(gate) * value)


class GeluMlp(nn.Module):
    """The MLP of DiT: GELU in its tanh form."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = TokenLinear(dim, hidden)
        self.fc2 = TokenLinear(hidden, dim)
        self.fused_weights = {"fc1.weight": FusedMatrix(), "fc2.weight": FusedMatrix()}

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))


def modulate(x: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
    """x·(1 + scale) + shift (adaLN, arXiv 2212.09748); all are (N, T, D). T is 1 for one condition per sample."""
    scaled = x * (1 + scale)
    return scaled if shift is None else scaled + shift


def per_token(values: Tensor) -> Tensor:
    """(N, D) → (N, 1, D), one row for all tokens; (N, T, D) is returned unchanged."""
    return values[:, None] if values.ndim == 2 else values


def sincos_position(dim: int, side: int) -> Tensor:
    """The fixed 2-D sin-cos embedding of MAE and DiT, width axis first: (1, side², dim) (arXiv 2111.06377)."""
    omega = 1.0 / 10_000.0 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    rows, columns = torch.meshgrid(*[torch.arange(side, dtype=torch.float64)] * 2, indexing="ij")
    angles = [axis.flatten()[:, None] * omega for axis in (columns, rows)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1).float()[None]
