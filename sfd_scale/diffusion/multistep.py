"""Multistep methods: Adams-Bashforth, and its exponential form. Both take one velocity evaluation per step.

A method forgets its history at each discontinuity of the velocity and starts again, because a polynomial through points
on both sides of a discontinuity fits neither.

N batch · C channels · H, W latent grid · K order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from sfd_scale.diffusion import path
from sfd_scale.diffusion.fixed_step import snap
from sfd_scale.diffusion.flow_ode import INSIDE, FlowODE, SampleResult
from sfd_scale.diffusion.latents import LatentLayout
from sfd_scale.diffusion.schedule import SemanticFirstSchedule
from sfd_scale.runtime.settings import at_least

MultistepMethod = Literal["ab2", "ab3", "exp_ab2", "exp_ab3"]
Advance = Callable[[Tensor, float, float, Sequence[tuple[float, Tensor]]], Tensor]
"""(x (N, C, H, W), start and stop of the step, past (time, dx/dg or data prediction), newest first) → x at the stop."""


@dataclass(frozen=True, kw_only=True)
class MultistepConfig:
    """`num_steps` steps, spaced by `shift` (SemanticFirstSchedule.grid); steps end at the discontinuities.

    kind: `ab2` and `ab3` are Adams-Bashforth of order 2 and 3. `exp_ab2` and `exp_ab3` integrate the linear part of the
        velocity exactly, and the predicted data by Adams-Bashforth, as DEIS (arXiv 2204.13902) and DPM-Solver++ (arXiv
        2211.01095) do for diffusion.
    """

    kind: MultistepMethod = "ab2"
    num_steps: int = 20
    shift: float = 0.0

    def __post_init__(self) -> None:
        at_least(self, num_steps=1, shift=0)

    @property
    def order(self) -> int:
        return int(self.kind[-1])

    def solve(self, ode: FlowODE) -> SampleResult:
        """Raises ValueError if there are fewer steps than parts of the path between discontinuities."""
        times = snap(ode.schedule.grid(self.num_steps, self.shift), ode.discontinuities).tolist()
        x = ode.noise
        for part in segments(times, ode.discontinuities):
            if self.kind in ("exp_ab2", "exp_ab3"):
                middle = torch.tensor((part[0] + part[-1]) / 2, dtype=torch.float64)
                advance = exponential_advance(ode.schedule, ode.layout, middle)
                x = integrate_segment(data_prediction(ode), advance, x, part, self.order)
            else:
                x = integrate_segment(velocity(ode), adams_bashforth_advance, x, part, self.order)
        return SampleResult(x, torch.full((len(x),), self.num_steps, device=x.device))

    def evaluation_times(self, schedule: SemanticFirstSchedule) -> Tensor | None:
        """None: the times of the velocity evaluations depend on the discontinuities."""
        return None


def segments(times: Sequence[float], discontinuities: Sequence[float]) -> list[list[float]]:
    """Cut a grid at the discontinuities, which are points of it. Neighbours share the point."""
    cuts = [0, *(min(range(len(times)), key=lambda i: abs(times[i] - d)) for d in discontinuities), len(times) - 1]
    return [list(times[low : high + 1]) for low, high in pairwise(cuts)]


def integrate_segment(
    evaluate: Callable[[Tensor, float], Tensor], advance: Advance, x: Tensor, times: Sequence[float], order: int
) -> Tensor:
    """x at the last of `times`, with one evaluation per step: (N, C, H, W).

    Hairer, Norsett, Wanner: Solving Ordinary Differential Equations I, Sec. III.1 and III.5 (variable steps).

    The history grows from one value to `order`. The first step is of order 1. As soon as the second evaluation is
    there, the trapezoidal rule replaces this step, without a new evaluation (predict, evaluate, correct: PEC). Its
    error is then of order 3 in the step, so that methods of order 3 keep their order.
    """
    history: list[tuple[float, Tensor]] = []
    first, last = x, len(times) - 1
    for number, (start, stop) in enumerate(pairwise(times)):
        g = min(max(start, times[0] + INSIDE), times[last] - INSIDE)
        history = [(start, evaluate(x, g)), *history][:order]
        if number == 1:
            x = advance(first, times[0], start, history)
        x = advance(x, start, stop, history)
    return x


# ------------------------------------------------------------------------------------------ what is extrapolated


def velocity(ode: FlowODE) -> Callable[[Tensor, float], Tensor]:
    """dx/dg (N, C, H, W) at x and global time g."""
    return lambda x, g: ode.field(x, x.new_full((len(x),), g), ode.labels)


def data_prediction(ode: FlowODE) -> Callable[[Tensor, float], Tensor]:
    """The predicted data x + (1 − t)·v of each part, t its own clock (arXiv 2209.03003, Sec. 2): (N, C, H, W)."""

    def evaluate(x: Tensor, g: float) -> Tensor:
        clocks = ode.schedule.clocks(torch.tensor(g, dtype=torch.float64))
        return path.predicted_data(x, velocity(ode)(x, g), ode.layout.per_channel(*clocks, like=x))

    return evaluate


# ------------------------------------------------------------------------------------------------------ one step


def adams_bashforth_advance(x: Tensor, start: float, stop: float, history: Sequence[tuple[float, Tensor]]) -> Tensor:
    """x + ∫ p, with p the polynomial through the past slopes: (N, C, H, W)."""
    step = stop - start
    moments = [step ** (power + 1) / (power + 1) for power in range(len(history))]
    for weight, (_, slope) in zip(node_weights([t - start for t, _ in history], moments), history, strict=True):
        x = x + weight * slope
    return x


def exponential_advance(schedule: SemanticFirstSchedule, layout: LatentLayout, middle: Tensor) -> Advance:
    """The step of exponential Adams-Bashforth methods (Hochbruck and Ostermann 2010, Acta Numerica 19, Sec. 2.5).

    On the straight path v = (D − x)/(1 − t), with D the predicted data. The solution from s to t is
    x(t) = (1 − t)/(1 − s)·x(s) + (1 − t)·∫ D(r)/(1 − r)² dr. A polynomial takes the place of D. Each part has its own
    clock; a part whose clock stands still at `middle` stays.
    """
    active = [bool(mask) for mask in schedule.active_mask(middle)]

    def advance(x: Tensor, start: float, stop: float, history: Sequence[tuple[float, Tensor]]) -> Tensor:
        ends = (schedule.clocks(torch.tensor(g, dtype=torch.float64)) for g in (start, stop))
        keep, weights = [], []
        for moves, left, right in zip(active, *ends, strict=True):
            rest, rest_after = 1 - left.item(), max(1 - right.item(), 0.0)
            moments = exponential_moments(rest, rest_after, len(history)) if moves else [0.0] * len(history)
            keep.append(rest_after / rest if moves else 1.0)
            weights.append(node_weights([time - start for time, _ in history], moments))
        x = layout.per_channel(keep[0], keep[1], like=x) * x
        for texture, semantic, (_, data) in zip(*weights, history, strict=True):
            x = x + layout.per_channel(texture, semantic, like=x) * data
        return x

    return advance


def exponential_moments(rest: float, rest_after: float, count: int) -> list[float]:
    """b·∫ u^k/(a − u)² du from 0 to a − b, for k below `count` (at most 3); a = rest, b = rest_after, both 1 − t.

    They are finite at the end of a part too, where b = 0.
    """
    step = rest - rest_after
    log = rest_after * math.log(rest_after / rest) if rest_after > 0 else 0.0
    return [step / rest, step + log, step * (rest + rest_after) + 2 * rest * log][:count]


def node_weights(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """The weights of values at `nodes` in ∫ p·ω, with p the polynomial through them (Lagrange).

    Args:
        moments: ∫ u^k·ω(u) du for k = 0, 1, …, as many as nodes.
    """
    vandermonde = torch.tensor(nodes, dtype=torch.float64)[None] ** torch.arange(len(nodes))[:, None]
    weights: list[float] = torch.linalg.solve(vandermonde, torch.tensor(moments, dtype=torch.float64)).tolist()
    return weights
