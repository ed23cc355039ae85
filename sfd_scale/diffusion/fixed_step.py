"""Explicit Runge-Kutta methods with fixed steps of the global clock.

The methods are named as in torchdiffeq and reproduce its results.

N batch · C channels · H, W latent grid · K steps · S stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sfd_scale.diffusion.flow_ode import INSIDE, Field, FlowODE, SampleResult
from sfd_scale.diffusion.schedule import SemanticFirstSchedule
from sfd_scale.runtime.settings import at_least

FixedStepMethod = Literal["euler", "midpoint", "heun2", "heun3", "rk4"]


@dataclass(frozen=True)
class Tableau:
    """Butcher tableau of an explicit method: stage times (S,), stage weights (S rows below the diagonal), and the
    weights of the step (S,)."""

    times: tuple[float, ...]
    stages: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


# Hairer, Norsett, Wanner: Solving Ordinary Differential Equations I, Sec. II.1, Tables 1.1 and 1.2.
TABLEAUX: dict[FixedStepMethod, Tableau] = {
    "euler": Tableau((0,), ((),), (1,)),
    "midpoint": Tableau((0, 1 / 2), ((), (1 / 2,)), (0, 1)),
    "heun2": Tableau((0, 1), ((), (1,)), (1 / 2, 1 / 2)),
    "heun3": Tableau((0, 1 / 3, 2 / 3), ((), (1 / 3,), (0, 2 / 3)), (1 / 4, 0, 3 / 4)),
    "rk4": Tableau((0, 1 / 3, 2 / 3, 1), ((), (1 / 3,), (-1 / 3, 1), (1, -1, 1)), (1 / 8, 3 / 8, 3 / 8, 1 / 8)),
}


@dataclass(frozen=True, kw_only=True)
class FixedStepConfig:
    """`num_steps` steps, spaced by `shift` (SemanticFirstSchedule.grid).

    The official code's `num_steps` counts the points of the grid: one more than the steps.

    kind: euler takes 1 evaluation per step; midpoint and heun2 take 2, heun3 takes 3. rk4 takes 4: the 3/8 rule.
    jump: move the nearest points of the grid onto the discontinuities of the velocity (where the clock of a part starts
        or stops), so that no step crosses one. The official code steps across them, which makes every method first
        order.
    """

    kind: FixedStepMethod = "euler"
    num_steps: int = 100
    shift: float = 0.0
    jump: bool = False

    def __post_init__(self) -> None:
        at_least(self, num_steps=1)
        if not 0 <= self.shift < float("inf"):
            raise ValueError(f"shift: {self.shift}; allowed: 0 (evenly spaced) and up")

    def solve(self, ode: FlowODE) -> SampleResult:
        """Raises ValueError if `jump` finds more discontinuities than steps to end at them."""
        tableau, x = TABLEAUX[self.kind], ode.noise
        times = snap(ode.schedule.grid(self.num_steps, self.shift), ode.discontinuities if self.jump else ())
        for state in trajectory(ode.field, x, ode.labels, times, tableau, INSIDE if self.jump else 0.0):
            x = state
        return SampleResult(x, torch.full((len(x),), self.num_steps * len(tableau.times), device=x.device))

    def evaluation_times(self, schedule: SemanticFirstSchedule) -> Tensor | None:
        """Global times of the velocity evaluations, (num_steps · S,); None if they depend on the discontinuities."""
        if self.jump:
            return None
        times = schedule.grid(self.num_steps, self.shift)
        stages = torch.tensor(TABLEAUX[self.kind].times)
        return (times[:-1, None] + stages * times.diff()[:, None]).flatten()


def snap(times: Tensor, discontinuities: Sequence[float]) -> Tensor:
    """Move the nearest inner points of the grid (K + 1,) onto the discontinuities; the order stays.

    Raises:
        ValueError: if there are fewer inner points than discontinuities.
    """
    inner = len(times) - 2
    if len(discontinuities) > inner:
        raise ValueError(
            f"num_steps: {inner + 1}; allowed: {len(discontinuities) + 1} and up with jump true, which ends a step "
            "at each discontinuity of the velocity"
        )
    times, taken = times.clone(), 0
    for number, discontinuity in enumerate(discontinuities):
        # Leave one point for each discontinuity that follows.
        free = times[taken + 1 : len(times) - 1 - (len(discontinuities) - 1 - number)]
        taken += 1 + int((free - discontinuity).abs().argmin())
        times[taken] = discontinuity
    return times


def trajectory(
    field: Field, x: Tensor, y: Tensor, times: Tensor, tableau: Tableau, inside: float = 0.0
) -> Iterator[Tensor]:
    """x after each step of an explicit Runge-Kutta method over times (K + 1,): K tensors (N, C, H, W).

    Hairer, Norsett, Wanner: Solving Ordinary Differential Equations I, Sec. II.1, Eq. (1.8). The field is evaluated
    at least `inside` from both ends of a step, so that it is evaluated on the step's side of a discontinuity.
    """
    for start, stop in times.to(x.device).unfold(0, 2, 1):
        step = stop - start
        slopes: list[Tensor] = []
        for time, weights in zip(tableau.times, tableau.stages, strict=True):
            # A last stage is at `stop` itself: the rounding of start + step can cross a discontinuity.
            g = (stop if time == 1 else start + time * step).clamp(start + inside, stop - inside)
            slopes.append(field(_advance(x, step, weights, slopes), g.expand(len(x)), y))
        x = _advance(x, step, tableau.weights, slopes)
        yield x


def _advance(x: Tensor, step: Tensor, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            x = x + step * weight * slope
    return x
