"""From noise to data: fixed-step Runge-Kutta methods and the adaptive dopri5, over the global clock.

A sampler integrates dx/dg = moving(g) · velocity(x, clocks(g), y) from g = 0 to 1 + delta_t. The formulas are named
as in torchdiffeq, whose results they reproduce.

N batch · C channels · H, W latent grid · S stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sfd_scale.config.bounds import at_least
from sfd_scale.diffusion.adaptive import INSIDE, Field, Tolerance, integrate
from sfd_scale.diffusion.guidance import Velocity
from sfd_scale.diffusion.latents import LatentLayout
from sfd_scale.diffusion.schedule import SemanticFirstSchedule


@dataclass(frozen=True, kw_only=True)
class EulerConfig:
    """`num_steps` steps, spaced by `shift` (SemanticFirstSchedule.grid). The authors' `num_steps` counts the points
    of the grid, one more.

    jump: move the nearest points of the grid onto the jumps of the field (where a part starts or stops), so that no
        step crosses one. Across a jump, as the authors step, every method is of first order.
    """

    kind: Literal["euler"] = "euler"
    num_steps: int = 100
    shift: float = 0.0
    jump: bool = False

    def __post_init__(self) -> None:
        at_least(self, num_steps=1)
        if not 0 <= self.shift < float("inf"):
            raise ValueError(f"shift: {self.shift}; allowed: 0 (evenly spaced) and up")


@dataclass(frozen=True, kw_only=True)
class MidpointConfig(EulerConfig):
    """Two evaluations a step."""

    kind: Literal["midpoint"] = "midpoint"  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class Heun2Config(EulerConfig):
    """Two evaluations a step."""

    kind: Literal["heun2"] = "heun2"  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class Heun3Config(EulerConfig):
    """Three evaluations a step."""

    kind: Literal["heun3"] = "heun3"  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class RK4Config(EulerConfig):
    """Four evaluations a step: the 3/8 rule."""

    kind: Literal["rk4"] = "rk4"  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class Dopri5Config:
    """Dormand-Prince 5(4) with error control.

    error_control: `sample` gives every sample its own steps, so that an image does not depend on its batch; `batch`
        takes one norm over the batch, as the authors do.
    jump: end steps where the field jumps (a part starts or stops) and at the end, instead of stepping across. The
        authors step across, beyond the end too, and interpolate back.
    """

    kind: Literal["dopri5"] = "dopri5"
    rtol: float = 1e-3
    atol: float = 1e-6
    error_control: Literal["sample", "batch"] = "sample"
    jump: bool = False

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: {getattr(self, name)}; allowed: above 0")


SamplerConfig = EulerConfig | MidpointConfig | Heun2Config | Heun3Config | RK4Config | Dopri5Config


@dataclass(frozen=True)
class Tableau:
    """Butcher's tableau of an explicit method: stage times (S,), stage weights (S rows below the diagonal), and the
    weights of the step (S,)."""

    times: tuple[float, ...]
    stages: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


# Hairer, Norsett, Wanner: Solving Ordinary Differential Equations I, Sec. II.1, Tables 1.1 and 1.2.
TABLEAUX = {
    "euler": Tableau((0,), ((),), (1,)),
    "midpoint": Tableau((0, 1 / 2), ((), (1 / 2,)), (0, 1)),
    "heun2": Tableau((0, 1), ((), (1,)), (1 / 2, 1 / 2)),
    "heun3": Tableau((0, 1 / 3, 2 / 3), ((), (1 / 3,), (0, 2 / 3)), (1 / 4, 0, 3 / 4)),
    "rk4": Tableau((0, 1 / 3, 2 / 3, 1), ((), (1 / 3,), (-1 / 3, 1), (1, -1, 1)), (1 / 8, 3 / 8, 3 / 8, 1 / 8)),
}


@dataclass(frozen=True)
class SampleResult:
    """x (N, C, H, W) at the end; nfe (N,) int64, the velocity evaluations that each sample took."""

    x: Tensor
    nfe: Tensor


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
        velocity: see guidance.guided; it is called with clocks of shape (N,), and by dopri5 with changing N.
        noise: (N, C, H, W), standard normal, float32. y: (N,) labels.
        kinks: further global times where the velocity jumps (guidance.interval_kinks), for samplers with `jump`.

    Raises:
        FloatingPointError: from dopri5, if the velocity is not finite.
        ValueError: if there are more jumps than steps to end at them.
    """

    def field(x: Tensor, g: Tensor, labels: Tensor) -> Tensor:
        mask = layout.per_channel(*schedule.active_mask(g), like=x)
        return velocity(x, schedule.clocks(g), labels) * mask

    discontinuities = sorted({*schedule.discontinuities(), *discontinuities}) if config.jump else []
    if isinstance(config, Dopri5Config):
        tolerance = Tolerance(config.rtol, config.atol, per_sample=config.error_control == "sample")
        # The end as the float32 grid has it: the clocks of fixed-step methods end there too.
        end = schedule.grid(1)[-1].item()
        return SampleResult(*integrate(field, noise, y, end, discontinuities, tolerance, stop_at_end=config.jump))
    times = snap(schedule.grid(config.num_steps, config.shift), discontinuities)
    x = noise
    for state in trajectory(field, noise, y, times, TABLEAUX[config.kind], INSIDE if config.jump else 0.0):
        x = state
    calls = config.num_steps * len(TABLEAUX[config.kind].times)
    return SampleResult(x, torch.full((len(noise),), calls, device=noise.device))


def evaluation_times(schedule: SemanticFirstSchedule, config: SamplerConfig) -> Tensor | None:
    """Global times at which a fixed-step method asks for the velocity, (num_steps · S,); None where they adapt to the
    field: to its error, or to its jumps."""
    if isinstance(config, Dopri5Config) or config.jump:
        return None
    times = schedule.grid(config.num_steps, config.shift)
    stages = torch.tensor(TABLEAUX[config.kind].times)
    return (times[:-1, None] + stages * times.diff()[:, None]).flatten()


def snap(times: Tensor, discontinuities: Sequence[float]) -> Tensor:
    """The grid (K + 1,) with its nearest inner points moved onto the jumps, in order.

    Raises:
        ValueError: if there are fewer inner points than jumps.
    """
    inner = len(times) - 2
    if len(discontinuities) > inner:
        raise ValueError(
            f"num_steps: {inner + 1}; allowed: {len(discontinuities) + 1} and up to end a step at each jump"
        )
    times, taken = times.clone(), 0
    for number, jump in enumerate(discontinuities):
        # Leave a point for each jump that is still to come.
        free = times[taken + 1 : len(times) - 1 - (len(discontinuities) - 1 - number)]
        taken += 1 + int((free - jump).abs().argmin())
        times[taken] = jump
    return times


def trajectory(
    field: Field, x: Tensor, y: Tensor, times: Tensor, tableau: Tableau, inside: float = 0.0
) -> Iterator[Tensor]:
    """x after each step of an explicit Runge-Kutta method over times (K + 1,): K tensors (N, C, H, W).

    Hairer, Norsett, Wanner: Solving Ordinary Differential Equations I, Sec. II.1, Eq. (1.8). The field is evaluated
    at least `inside` from both ends of a step, to be on the step's side of a jump there.
    """
    for start, stop in times.to(x.device).unfold(0, 2, 1):
        step = stop - start
        slopes: list[Tensor] = []
        for time, weights in zip(tableau.times, tableau.stages, strict=True):
            # A last stage is at `stop` itself, not at start + step, whose rounding can cross a jump of the field.
            g = (stop if time == 1 else start + time * step).clamp(start + inside, stop - inside)
            slopes.append(field(_advance(x, step, weights, slopes), g.expand(len(x)), y))
        x = _advance(x, step, tableau.weights, slopes)
        yield x


def _advance(x: Tensor, step: Tensor, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            x = x + step * weight * slope
    return x
