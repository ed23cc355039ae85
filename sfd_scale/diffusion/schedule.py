"""The two clocks of semantic-first diffusion (arXiv 2512.04926), and the global clock that drives them.

Semantics lead texture by `delta_t`. Each part has its own time t: 0 is noise, 1 is data. The global time g runs from 0
to 1 + delta_t. Training and sampling both convert times here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Clocks(NamedTuple):
    """One value per part, each (N,) or 0-d: times in [0, 1], or masks of whether the part's clock runs."""

    texture: Tensor
    semantic: Tensor


@dataclass(frozen=True, kw_only=True)
class SemanticFirstSchedule:
    """`delta_t` is the lead of semantics. 0 is ordinary flow matching, with one clock for both parts."""

    delta_t: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.delta_t <= 1:
            raise ValueError(f"delta_t: {self.delta_t}; allowed: 0 (both parts together) to 1 (one after the other)")

    @property
    def synchronous(self) -> bool:
        return self.delta_t == 0

    @property
    def end(self) -> float:
        """The last global time."""
        return 1 + self.delta_t

    def clocks(self, g: Tensor) -> Clocks:
        """t_semantic = min(g, 1), t_texture = max(g − delta_t, 0) (arXiv 2512.04926).

        An adaptive solver may step beyond the end. There the texture clock continues past 1.
        """
        if self.synchronous:
            return Clocks(g, g)
        return Clocks((g - self.delta_t).clamp(min=0), g.clamp(max=1))

    def active_mask(self, g: Tensor) -> Clocks:
        """Whether each part's clock runs at g: semantics while g <= 1, texture from delta_t on (arXiv 2512.04926).

        With one clock both masks are always true.
        """
        if self.synchronous:
            both = torch.ones_like(g, dtype=torch.bool)
            return Clocks(both, both)
        return Clocks(g >= self.delta_t, g <= 1)

    def discontinuities(self) -> tuple[float, ...]:
        """Global times at which `active_mask` changes: the velocity field is discontinuous there."""
        return tuple(sorted({self.delta_t, 1.0} - {0.0, self.end}))

    def inverse_clock(self, time: float) -> tuple[float, float]:
        """Global times at which the semantic and the texture clock reach `time`; the inverse of `clocks`."""
        return time, time + self.delta_t

    def time_from_uniform(self, u: Tensor) -> Tensor:
        """Global times for u in [0, 1], a fraction of the whole path (arXiv 2512.04926)."""
        return u * self.end

    def progress(self, g: Tensor) -> Tensor:
        """Fraction of the path at global time g, 0 .. 1; the inverse of `time_from_uniform` (arXiv 2512.04926)."""
        return g / self.end

    def grid(self, num_steps: int, shift: float = 0.0) -> Tensor:
        """Global times of `num_steps` steps: (num_steps + 1,) float32, from 0 to the end.

        shift s > 0 maps u → s·u / (1 + (s − 1)·u), u the fraction of the path (arXiv 2403.03206, Eq. 23); s < 1 makes
        the first steps small. 0 leaves the times evenly spaced.
        """
        times = torch.linspace(0, self.end, num_steps + 1)
        if shift == 0:
            return times
        u = times / self.end
        return shift * u / (1 + (shift - 1) * u) * self.end


def logit_normal(normal: Tensor) -> Tensor:
    """Turn standard normal draws into draws of the logit-normal(0, 1) distribution (arXiv 2403.03206, Eq. 19).

    The official training code samples times from it; the paper writes a uniform distribution.
    """
    return torch.sigmoid(normal)
