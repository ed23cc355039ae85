"""The ordinary differential equation of a flow: dx/dg = mask(g) · velocity(x, clocks(g), y), from g = 0 to 1 + delta_t.

To add a sampler, write one file and add its config to `samplers.SamplerConfig`. The config is a frozen dataclass with a
`kind`, a method `solve(ode) -> SampleResult` and a method `evaluation_times(schedule)`.

N batch · C channels · H, W latent grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sfd_scale.diffusion.guidance import Velocity
from sfd_scale.diffusion.latents import LatentLayout
from sfd_scale.diffusion.schedule import SemanticFirstSchedule

Field = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x (N, C, H, W), global times (N,), labels (N,)) → dx/dg (N, C, H, W)."""

# A solver that ends steps at a discontinuity evaluates the field this far from it, to get the one-sided limit. Float32
# times can represent the distance.
INSIDE = 1e-6


@dataclass(frozen=True)
class FlowODE:
    """An initial value problem: `noise` (N, C, H, W) float32 at g = 0, data at g = schedule.end.

    velocity: see guidance.guided; called with clocks of shape (N,).
    labels: (N,).
    discontinuities: sorted global times at which `field` is discontinuous in g.
    """

    velocity: Velocity
    noise: Tensor
    labels: Tensor
    schedule: SemanticFirstSchedule
    layout: LatentLayout
    discontinuities: tuple[float, ...] = ()

    def field(self, x: Tensor, g: Tensor, labels: Tensor) -> Tensor:
        """dx/dg (N, C, H, W) for any N: 0 on a part of the latent while its clock stands still (arXiv 2512.04926)."""
        mask = self.layout.per_channel(*self.schedule.active_mask(g), like=x)
        return self.velocity(x, self.schedule.clocks(g), labels) * mask


@dataclass(frozen=True)
class SampleResult:
    """x (N, C, H, W) at the end; nfe (N,) int64, the number of velocity evaluations of each sample."""

    x: Tensor
    nfe: Tensor
