"""Positions on the latent grid: a rotary embedding for queries and keys, and a fixed sin-cos embedding for tokens.

N batch · A heads · T tokens · D head dimension · G side of the token grid (T = G·G).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

THETA = 10000.0
Rotation = tuple[Tensor, Tensor]
"""(cos, sin), each (T, D)."""


class FixedBuffers(nn.Module):
    """A module whose own buffers stay float32 when the model is cast: positions in bfloat16 lose their last digits."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


def rotary_tables(grid: int, head_dim: int) -> Rotation:
    """Angles of the 2-D rotary embedding (arXiv 2403.13298): the first half of D turns by row, the second by column.

    Neighbouring channels form a pair and share one frequency.
    """
    pairs = head_dim // 4
    frequencies = THETA ** (-torch.arange(pairs, dtype=torch.float32) * 2 / (head_dim // 2))
    angles = torch.arange(grid, dtype=torch.float32)[:, None] * frequencies  # (G, D/4)
    angles = angles.repeat_interleave(2, dim=1)  # (G, D/2)
    rows = angles[:, None].expand(grid, grid, -1)
    columns = angles[None].expand(grid, grid, -1)
    table = torch.cat([rows, columns], dim=-1).reshape(grid * grid, head_dim)  # (T, D)
    return table.cos(), table.sin()


class RotaryEmbedding(FixedBuffers):
    """The tables as buffers, under the authors' names."""

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, grid: int, head_dim: int) -> None:
        super().__init__()
        self.grid, self.head_dim = grid, head_dim
        cos, sin = rotary_tables(grid, head_dim)
        self.register_buffer("freqs_cos", cos)
        self.register_buffer("freqs_sin", sin)

    def reset(self) -> None:
        """Fill the tables anew, after a construction on the meta device."""
        cos, sin = rotary_tables(self.grid, self.head_dim)
        self.freqs_cos.copy_(cos)
        self.freqs_sin.copy_(sin)

    def forward(self) -> Rotation:
        return self.freqs_cos, self.freqs_sin


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair of channels of x (N, A, T, D) by its angle, in float32; the dtype of x comes back."""
    cos, sin = rotation
    wide = x.float()
    even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)  # (N, A, T, D/2)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (wide * cos + turned * sin).to(x.dtype)


def sincos_table(grid: int, width: int) -> Tensor:
    """The fixed 2-D embedding of MAE and DiT (arXiv 2111.06377): (1, T, width), the column's half before the row's."""
    position = torch.arange(grid, dtype=torch.float64)
    frequencies = THETA ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = position[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (G, width/2)
    columns = axis[None].expand(grid, grid, -1)
    rows = axis[:, None].expand(grid, grid, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, grid * grid, width).float()
