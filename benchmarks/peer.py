"""The baseline: a reimplementation of the arithmetic of the official training and sampling scripts.

Only benchmarks use it. It is slow for the same reasons as the official code: RMSNorm in Python with a float32 weight,
which turns bf16 activations into float32; a rotary embedding that makes three copies; SDPA; autocast; one EMA kernel
per tensor; torch's default AdamW; a wait for the device each step; sampling in float32. The state-dict keys are the
official ones, so that both sides can load the same weights and tests can compare their results.

N batch · T tokens · D width · C channels.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from sfd_scale.models.lightningdit import SIZES
from sfd_scale.models.rope import RotaryEmbedding2D

Precision = Literal["fp32", "bf16"]
TEXTURE, SEMANTIC, SIDE = 32, 16, 16
NULL_LABEL, DELTA_T = 1000, 0.3


class _RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return normed.type_as(x) * self.weight


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm, self.k_norm = _RMSNorm(dim // heads), _RMSNorm(dim // heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = _rotated(self.q_norm(q), cos, sin), _rotated(self.k_norm(k), cos, sin)
        out = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(n, t, d))


def attention(dim: int, heads: int) -> nn.Module:
    """The attention of one block. Its inputs are tokens (N, T, D) and the tables of the rotary embedding."""
    return _Attention(dim, heads)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack((-odd, even), dim=-1).flatten(-2) * sin


class _SwiGLU(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = int(2 / 3 * 4 * dim)
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(functional.silu(gate) * value)


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _RMSNorm(dim), _RMSNorm(dim)
        self.attn, self.mlp = _Attention(dim, heads), _SwiGLU(dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(_modulate(self.norm1(x), shift1, scale1), cos, sin)
        return x + gate2.unsqueeze(1) * self.mlp(_modulate(self.norm2(x), shift2, scale2))


class _FinalLayer(nn.Module):
    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.norm_final, self.linear = _RMSNorm(dim), nn.Linear(dim, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(_modulate(self.norm_final(x), shift, scale))


class _TimestepEmbedder(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float32, device=t.device) / 128)
        angles = t[:, None].float() * frequencies[None]
        return self.mlp(torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1))


class _LabelEmbedder(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(NULL_LABEL + 1, dim)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class _PatchEmbed(nn.Module):
    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Peer(nn.Module):
    """LightningDiT /1 of a named size for composite latents of 256x256 images, with the alignment head.

    Args:
        depth: number of blocks, if not that of the size.
        compiled: torch.compile of the same modules as in the official code: embedders, blocks, final layer.
    """

    pos_embed: Tensor

    def __init__(self, size: str, *, depth: int | None = None, compiled: bool = False) -> None:
        super().__init__()
        layers, dim, heads = SIZES[size]
        channels = TEXTURE + SEMANTIC
        self.x_embedder = _PatchEmbed(channels, dim)
        self.t_embedder_sem, self.t_embedder_tex = _TimestepEmbedder(dim // 2), _TimestepEmbedder(dim // 2)
        self.y_embedder = _LabelEmbedder(dim)
        # The official EMA averages it too.
        self.register_buffer("pos_embed", torch.zeros(1, SIDE**2, dim))
        self.feat_rope = RotaryEmbedding2D(dim // heads, SIDE)  # only for its tables
        self.blocks = nn.ModuleList([_Block(dim, heads) for _ in range(depth or layers)])
        self.final_layer = _FinalLayer(dim, channels)
        self.repa_projector = nn.Sequential(
            nn.Linear(dim, 2048), nn.SiLU(), nn.Linear(2048, 2048), nn.SiLU(), nn.Linear(2048, 768)
        )
        if compiled:
            for module in (self.t_embedder_sem, self.t_embedder_tex, self.y_embedder, *self.blocks, self.final_layer):
                object.__setattr__(module, "forward", torch.compile(module.forward))

    def forward(self, x: Tensor, t_texture: Tensor, t_semantic: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """(N, C, 16, 16), times (N,), labels (N,) → the velocity, and in training mode projected tokens (N, T, 768)."""
        tokens = self.x_embedder(x) + self.pos_embed
        time = torch.cat([self.t_embedder_sem(t_semantic), self.t_embedder_tex(t_texture)], dim=1)
        c, projected = time + self.y_embedder(y), None
        for index, block in enumerate(self.blocks, start=1):
            tokens = block(tokens, c, self.feat_rope.freqs_cos, self.feat_rope.freqs_sin)
            if index == min(2, len(self.blocks)) and self.training:
                projected = self.repa_projector(tokens)
        return self.final_layer(tokens, c).transpose(1, 2).unflatten(2, (SIDE, SIDE)), projected


Loss = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""(model, latents (N, C, 16, 16), features (N, 768, 16, 16), labels (N,)) → the loss; draws noise and times."""


class PeerTraining:
    """The official training step on one device: autocast, AdamW and EMA tensor by tensor, loss.item() each step."""

    def __init__(
        self, model: nn.Module, precision: Precision, lr: float = 1e-4, decay: float = 0.9999, loss: Loss | None = None
    ) -> None:
        self.model, self.precision, self.decay = model.train(), precision, decay
        self.loss = _randomized_loss if loss is None else loss
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, betas=(0.9, 0.999))
        self.ema = average_of(model)
        self.device = next(model.parameters()).device

    def step(self, latents: Tensor, features: Tensor, labels: Tensor) -> float:
        """latents (N, C, 16, 16), features (N, 768, 16, 16), labels (N,) → the loss."""
        with autocast(self.device, self.precision):
            loss = self.loss(self.model, latents, features, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        update_average(self.ema, self.model, self.decay)
        return loss.item()


def autocast(device: torch.device, precision: Precision) -> Any:
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


def _randomized_loss(model: nn.Module, latents: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    labels = torch.where(torch.rand(len(labels), device=labels.device) < 0.1, NULL_LABEL, labels)
    noise, u = torch.randn_like(latents), torch.sigmoid(torch.randn(len(latents), device=latents.device))
    return peer_loss(model, latents, features, labels, noise, u)


def peer_loss(model: nn.Module, latents: Tensor, features: Tensor, labels: Tensor, noise: Tensor, u: Tensor) -> Tensor:
    """The loss for given noise, shaped like the latents, and u (N,), a fraction of the path."""
    g = u * (1 + DELTA_T)
    t_texture, t_semantic = (g - DELTA_T).clamp(min=0), g.clamp(max=1)
    t = torch.cat([
        t_texture[:, None, None, None].expand(-1, TEXTURE, SIDE, SIDE),
        t_semantic[:, None, None, None].expand(-1, SEMANTIC, SIDE, SIDE),
    ], dim=1)  # fmt: skip
    velocity, projected = model(t * latents + (1 - t) * noise, t_texture, t_semantic, labels)
    target = latents - noise
    weight = torch.ones_like(target)
    weight[:, -SEMANTIC:] = 2.0
    square = (weight * (velocity - target) ** 2).flatten(1).mean(1)
    cosine = (1 - functional.cosine_similarity(velocity, target, dim=1)).flatten(1).mean(1)
    tokens = features.flatten(2).transpose(1, 2)
    alignment = (1 - functional.cosine_similarity(projected, tokens, dim=-1)).mean(1)
    return (square + cosine + alignment).mean()


def average_of(model: nn.Module) -> nn.Module:
    """A copy of the model for the EMA; the official code keeps one on every rank."""
    average = deepcopy(model)
    for parameter in average.parameters():
        parameter.requires_grad_(False)
    return average


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    averaged = dict(average.named_parameters())
    for name, parameter in model.named_parameters():
        averaged[name].mul_(decay).add_(parameter.data, alpha=1 - decay)
    averaged_buffers = dict(average.named_buffers())
    if "pos_embed" in averaged_buffers:  # a parameter of the official model, and so averaged
        averaged_buffers["pos_embed"].mul_(decay).add_(dict(model.named_buffers())["pos_embed"], alpha=1 - decay)


# ------------------------------------------------------------------------------------------------ sampling

Field = Callable[[Tensor, Tensor], Tensor]


def field(model: Peer, labels: Tensor, guidance_model: Peer | None = None, scale: float = 1.5) -> Field:
    """dx/dg at global time g (0-d), float32, with AutoGuidance if there is a guidance model."""
    model.eval()

    def at(g: Tensor, x: Tensor) -> Tensor:
        n = len(x)
        t_texture, t_semantic = (g - DELTA_T).clamp(min=0).expand(n), g.clamp(max=1).expand(n)
        velocity, _ = model(x, t_texture, t_semantic, labels)
        if guidance_model is not None:
            worse, _ = guidance_model.eval()(x, t_texture, t_semantic, labels)
            texture, semantic = velocity.split((TEXTURE, SEMANTIC), dim=1)
            worse_texture, worse_semantic = worse.split((TEXTURE, SEMANTIC), dim=1)
            texture = worse_texture + scale * (texture - worse_texture)
            semantic = worse_semantic + scale * (semantic - worse_semantic)
            velocity = torch.cat([texture, semantic], dim=1)
        mask = torch.ones_like(velocity)
        mask[:, :TEXTURE] *= (g >= DELTA_T).float()
        mask[:, TEXTURE:] *= (g <= 1).float()
        return velocity * mask

    return at


@torch.no_grad()
def euler(derivative: Field, noise: Tensor, num_steps: int) -> Tensor:
    """All states of `num_steps` Euler steps, as the official solver returns: (num_steps + 1, N, C, 16, 16)."""
    times = torch.linspace(0, 1 + DELTA_T, num_steps + 1, device=noise.device)
    states = torch.empty((num_steps + 1, *noise.shape), device=noise.device)
    states[0] = noise
    for index in range(num_steps):
        step = times[index + 1] - times[index]
        states[index + 1] = states[index] + step * derivative(times[index], states[index])
    return states
