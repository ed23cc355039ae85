"""Two-dimensional rotary position embedding (arXiv 2104.09864; over images as in EVA-02, arXiv 2303.11331).

T tokens · A heads · F features of one head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class FixedBuffers(nn.Module):
    """A module with buffers that stay float32 when the model is cast. Positions in bf16 would lose digits."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class RotaryEmbedding2D(FixedBuffers):
    """Rotates pairs of neighbouring features: the first half by the row, the second half by the column."""

    freqs_cos: Tensor  # (T, F)
    freqs_sin: Tensor

    def __init__(self, head_dim: int, side: int, theta: float = 10_000.0) -> None:
        super().__init__()
        self.head_dim, self.side, self.theta = head_dim, side, theta
        cos, sin = self._tables()
        self.register_buffer("freqs_cos", cos)
        self.register_buffer("freqs_sin", sin)

    def _tables(self) -> tuple[Tensor, Tensor]:
        """Cosine and sine of each token's angles, (T, F) each."""
        half, side = self.head_dim // 2, self.side
        frequency = 1.0 / self.theta ** (torch.arange(0, half, 2, dtype=torch.float32)[: half // 2] / half)
        angle = (torch.arange(side, dtype=torch.float32)[:, None] * frequency).repeat_interleave(2, dim=1)
        rows = angle[:, None].expand(side, side, -1)
        columns = angle[None].expand(side, side, -1)
        angles = torch.cat([rows, columns], dim=-1).reshape(side * side, -1)
        return angles.cos(), angles.sin()

    def reset(self) -> None:
        """Fill the tables anew, after a construction on the meta device."""
        cos, sin = self._tables()
        self.freqs_cos.copy_(cos)
        self.freqs_sin.copy_(sin)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, A, F) → the same shape and dtype; computed in float32."""
        return rotate(x, self.freqs_cos, self.freqs_sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of neighbouring features of (N, T, A, F) by angles, whose cosines and sines are (T, F)."""
    # (a, b) turns to (-b, a). The minus stands in the table: the backward of a flip is a flip, which compiled code
    # fuses with the norm's, as it does not that of slices.
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    sign = 2 * torch.arange(2, device=x.device) - 1
    sin = (sin.unflatten(-1, (-1, 2)) * sign).flatten(-2)
    return (x * cos[:, None] + swapped * sin[:, None]).to(x.dtype)
