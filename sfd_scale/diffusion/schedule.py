"""Two clocks: how far each part of the latent is, while one global clock runs from noise to data.

SFD (arXiv 2512.04926) lets semantics lead texture by `delta_t`. This file alone knows the arithmetic; training and
sampling both go through it. t = 0 is noise, t = 1 is data; g is the global clock, 0 .. 1 + delta_t.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Clocks(NamedTuple):
    """One value for each part, each (N,) or 0-d: times in [0, 1], or whether the part moves."""

    texture: Tensor
    semantic: Tensor


@dataclass(frozen=True, kw_only=True)
class SemanticFirstSchedule:
    """`delta_t` is the lead of semantics; 0 is ordinary flow matching, one clock for both parts."""

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

        Beyond the end, where an adaptive solver may step, the last moving clock runs on past 1.
        """
        if self.synchronous:
            return Clocks(g, g)
        return Clocks((g - self.delta_t).clamp(min=0), g.clamp(max=1))

    def active_mask(self, g: Tensor) -> Clocks:
        """Which part has a velocity at g: semantics while g <= 1, texture from delta_t on (arXiv 2512.04926).

        With one clock both always move.
        """
        if self.synchronous:
            both = torch.ones_like(g, dtype=torch.bool)
            return Clocks(both, both)
        return Clocks(g >= self.delta_t, g <= 1)

    def discontinuities(self) -> tuple[float, ...]:
        """Global times at which a part starts or stops, so that the velocity field jumps (from `moving`)."""
        return tuple(sorted({self.delta_t, 1.0} - {0.0, self.end}))

    def inverse_clock(self, time: float) -> tuple[float, float]:
        """Global times at which the (semantic, texture) clock passes `time` (the inverse of `clocks`)."""
        return time, time + self.delta_t

    def time_from_uniform(self, u: Tensor) -> Tensor:
        """Global times for u in [0, 1], a share of the whole run (arXiv 2512.04926)."""
        return u * self.end

    def progress(self, g: Tensor) -> Tensor:
        """The inverse of `time_from_uniform`: how much of the run (arXiv 2512.04926) has passed, 0 .. 1."""
        return g / self.end

    def grid(self, num_steps: int, shift: float = 0.0) -> Tensor:
        """Global times of `num_steps` steps: (num_steps + 1,) float32, from 0 to the end.

        shift s > 0 moves the times as u → s·u / (1 + (s − 1)·u), u the share of the run (arXiv 2403.03206, Eq. 23);
        s < 1 makes the first steps small. 0 leaves them evenly spaced.
        """
        times = torch.linspace(0, self.end, num_steps + 1)
        if shift == 0:
            return times
        u = times / self.end
        return shift * u / (1 + (shift - 1) * u) * self.end


def logit_normal(normal: Tensor) -> Tensor:
    """Draws of the logit-normal(0, 1) distribution from standard normal ones (arXiv 2403.03206, Eq. 19).

    The authors' training code draws so; their paper writes a uniform law.
    """
    return torch.sigmoid(normal)
