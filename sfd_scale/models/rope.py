"""Two-dimensional rotary position embedding (arXiv 2104.09864; over images as in EVA-02, arXiv 2303.11331).

T tokens · F features of one head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RotaryEmbedding2D(nn.Module):
    """Rotates neighbouring pairs of features: the first half of them by the row, the second by the column."""

    freqs_cos: Tensor  # (T, F)
    freqs_sin: Tensor

    def __init__(self, head_dim: int, side: int, theta: float = 10_000.0) -> None:
        super().__init__()
        half = head_dim // 2
        frequency = 1.0 / theta ** (torch.arange(0, half, 2, dtype=torch.float32)[: half // 2] / half)
        angle = (torch.arange(side, dtype=torch.float32)[:, None] * frequency).repeat_interleave(2, dim=1)
        rows = angle[:, None].expand(side, side, -1)
        columns = angle[None].expand(side, side, -1)
        angles = torch.cat([rows, columns], dim=-1).reshape(side * side, -1)
        self.register_buffer("freqs_cos", angles.cos())
        self.register_buffer("freqs_sin", angles.sin())

    def forward(self, x: Tensor) -> Tensor:
        """(N, A, T, F) → the same shape and dtype."""
        pairs = x.unflatten(-1, (-1, 2))
        turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
        return (x * self.freqs_cos + turned * self.freqs_sin).to(x.dtype)
