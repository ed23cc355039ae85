"""The samplers of a recipe, from noise to data: Runge-Kutta and multistep methods with fixed steps, and dopri5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from sfd_scale.diffusion.adaptive import Dopri5Config
from sfd_scale.diffusion.fixed_step import TABLEAUX, FixedStepConfig, FixedStepMethod
from sfd_scale.diffusion.flow_ode import FlowODE, SampleResult
from sfd_scale.diffusion.guidance import Velocity
from sfd_scale.diffusion.latents import LatentLayout
from sfd_scale.diffusion.multistep import MultistepConfig, MultistepMethod
from sfd_scale.diffusion.schedule import SemanticFirstSchedule

SamplerConfig = FixedStepConfig | Dopri5Config | MultistepConfig
Solver = FixedStepMethod | MultistepMethod | Literal["dopri5"]


def solver_settings(solver: Solver, num_steps: int) -> SamplerConfig:
    """The settings of a solver by its name; dopri5 chooses its own steps.

    Raises:
        ValueError: for another name.
    """
    if solver == "dopri5":
        return Dopri5Config()
    if solver in ("ab2", "ab3", "exp_ab2", "exp_ab3"):
        return MultistepConfig(kind=solver, num_steps=num_steps)
    if solver in TABLEAUX:
        return FixedStepConfig(kind=solver, num_steps=num_steps)
    names = (*TABLEAUX, *get_args(MultistepMethod), "dopri5")
    raise ValueError(f"solver: {solver}; allowed: {', '.join(names)}")


@torch.no_grad()
def sample(
    velocity: Velocity,
    noise: Tensor,
    y: Tensor,
    schedule: SemanticFirstSchedule,
    layout: LatentLayout,
    config: SamplerConfig,
    discontinuities: Sequence[float] = (),
) -> SampleResult:
    """Integrate the flow from noise to data (arXiv 2512.04926).

    Args:
        velocity: see guidance.guided; it is called with clocks of shape (N,). dopri5 changes N from call to call.
        noise: (N, C, H, W), standard normal, float32.
        y: (N,) labels.
        discontinuities: global times at which the velocity is discontinuous (guidance.interval_discontinuities), in
            addition to the schedule's. Samplers with `jump` end steps there.

    Raises:
        FloatingPointError: from dopri5, if the velocity is not finite.
        ValueError: if a fixed-step sampler with `jump` has fewer steps than it needs to end at the discontinuities.
    """
    ends = tuple(sorted({*schedule.discontinuities(), *discontinuities}))
    return config.solve(FlowODE(velocity, noise, y, schedule, layout, ends))
