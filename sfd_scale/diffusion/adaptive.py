"""dopri5: the adaptive Dormand-Prince 5(4) method. Each sample of a batch has its own step size and error control.

With one error norm over the whole batch, and without `jump`, it reproduces torchdiffeq's `dopri5`: the same first step,
step-size controller and interpolation at the end.

N unfinished samples · C channels · H, W latent grid · S = 7 stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from sfd_scale.diffusion.flow_ode import INSIDE, Field, FlowODE, SampleResult
from sfd_scale.diffusion.schedule import SemanticFirstSchedule
from sfd_scale.runtime.settings import above

# Dormand and Prince, J. Comput. Appl. Math. 6 (1980), Table 2. The last stage is the new point (first same as last).
TIMES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
# 5th minus 4th order. The 4th order is torchdiffeq's (Shampine, Math. Comp. 46 (1986)), not that of the 1980 pair.
ERROR = (
    35 / 384 - 1951 / 21600,
    0,
    500 / 1113 - 22642 / 50085,
    125 / 192 - 451 / 720,
    -2187 / 6784 + 12231 / 42400,
    11 / 84 - 649 / 6300,
    -1 / 60,
)
# Weights of the 4th-order value in the middle of a step (Shampine 1986).
MIDDLE = (
    6025192743 / 30085553152 / 2,
    0,
    51252292925 / 65400821598 / 2,
    -2691868925 / 45128329728 / 2,
    187940372067 / 1594534317056 / 2,
    -1776094331 / 19743644256 / 2,
    11237099 / 235043384 / 2,
)
ORDER, SAFETY, GROW, SHRINK = 5, 0.9, 10.0, 0.2


@dataclass(frozen=True, kw_only=True)
class Dopri5Config:
    """Dormand-Prince 5(4) with error control.

    error_control: `sample` chooses the steps of every sample by its own error, so that an image does not depend on its
        batch. `batch` takes one error norm over the batch, as the official code does.
    jump: end steps at the end of the flow and at the discontinuities of the velocity (where the clock of a part starts
        or stops). The official code steps across both and interpolates back from beyond the end.
    """

    kind: Literal["dopri5"] = "dopri5"
    rtol: float = 1e-3
    atol: float = 1e-6
    error_control: Literal["sample", "batch"] = "sample"
    jump: bool = False

    def __post_init__(self) -> None:
        above(self, rtol=0, atol=0)

    def solve(self, ode: FlowODE) -> SampleResult:
        """Raises FloatingPointError if the velocity is not finite."""
        tolerance = Tolerance(self.rtol, self.atol, per_sample=self.error_control == "sample")
        # The float32 end of the grid: the clocks of fixed-step methods end there too.
        end = ode.schedule.grid(1)[-1].item()
        discontinuities = ode.discontinuities if self.jump else ()
        x, nfe = integrate(ode.field, ode.noise, ode.labels, end, discontinuities, tolerance, stop_at_end=self.jump)
        return SampleResult(x, nfe)

    def evaluation_times(self, schedule: SemanticFirstSchedule) -> Tensor | None:
        """None: the times of the velocity evaluations depend on the error."""
        return None


@dataclass(frozen=True)
class Tolerance:
    """Allowed error of an entry, atol + rtol·|x|. The root mean square is over a sample or over the whole batch."""

    rtol: float
    atol: float
    per_sample: bool

    def norm(self, x: Tensor) -> Tensor:
        """Root mean square of (N, C, H, W): (N,) float64. One norm over the batch is repeated N times."""
        squares = x.square().flatten(1).mean(1)
        return (squares if self.per_sample else squares.mean().expand(len(x))).sqrt().double()


@dataclass(frozen=True)
class State:
    """The unfinished samples, one row per sample."""

    row: Tensor  # (N,) int64, index in the result
    y: Tensor  # (N,) int64, label
    x: Tensor  # (N, C, H, W)
    slope: Tensor  # (N, C, H, W), dx/dg at x
    time: Tensor  # (N,) float64
    step: Tensor  # (N,) float64, size of the next step
    phase: Tensor  # (N,) int64, index of the interval between two bounds
    nfe: Tensor  # (N,) int64, velocity evaluations

    def select(self, rows: Tensor) -> State:
        return State(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def integrate(
    field: Field,
    x: Tensor,
    y: Tensor,
    end: float,
    discontinuities: Sequence[float],
    tolerance: Tolerance,
    *,
    stop_at_end: bool,
) -> tuple[Tensor, Tensor]:
    """Integrate dx/dg = field from 0 to `end`: x (N, C, H, W) there, and nfe (N,) int64.

    Hairer, Norsett, Wanner: Solving Ordinary Differential Equations I, Sec. II.4.

    Steps end at each of `discontinuities`, and with `stop_at_end` at the end. Without it the last step goes beyond the
    end, and x is interpolated.

    Raises:
        FloatingPointError: if the field or the step size is not finite.
    """
    last = end if stop_at_end else float("inf")
    bounds = torch.tensor([0.0, *discontinuities, last], dtype=torch.float64, device=x.device)
    inside = bounds if stop_at_end or discontinuities else torch.tensor([-float("inf"), float("inf")]).to(bounds)
    out, calls = torch.empty_like(x), torch.zeros(len(x), dtype=torch.int64, device=x.device)
    state = _start(field, x, y, inside, tolerance)
    while len(state.row):
        state, ended, at_end = _attempt(field, state, bounds, inside, end, tolerance)
        if bool(ended.any()):
            out[state.row[ended]], calls[state.row[ended]] = at_end[ended], state.nfe[ended]
            state = state.select((~ended).nonzero().flatten())
    return out, calls


def _start(field: Field, x: Tensor, y: Tensor, inside: Tensor, tolerance: Tolerance) -> State:
    count = len(x)
    time = torch.zeros(count, dtype=torch.float64, device=x.device)
    whole = torch.zeros(count, dtype=torch.int64, device=x.device)
    slope = field(x, _between(time, whole, inside).to(x.dtype), y)
    state = State(torch.arange(count, device=x.device), y, x, slope, time, time, whole, whole + 2)
    return replace(state, step=_first_step(field, state, inside, tolerance))


def _first_step(field: Field, state: State, inside: Tensor, tolerance: Tolerance) -> Tensor:
    """The first step size, (N,) float64. It takes one evaluation.

    Hairer, Norsett, Wanner: Solving Ordinary Differential Equations I, Sec. II.4, "Starting Step Size".
    """
    scale = tolerance.atol + state.x.abs() * tolerance.rtol
    d0, d1 = tolerance.norm(state.x / scale), tolerance.norm(state.slope / scale)
    small = (d0 < 1e-5) | (d1 < 1e-5)
    h0 = torch.where(small, 1e-6, 0.01 * d0 / d1.clamp(min=1e-300))
    probe = state.x + _wide(h0, state.x) * state.slope
    slope = field(probe, _between(state.time + h0, state.phase, inside).to(state.x.dtype), state.y)
    d2 = tolerance.norm((slope - state.slope) / scale) / h0
    flat = (d1 <= 1e-15) & (d2 <= 1e-15)
    h1 = torch.where(flat, (h0 * 1e-3).clamp(min=1e-6), (0.01 / torch.maximum(d1, d2).clamp(min=1e-300)) ** (1 / ORDER))
    return torch.minimum(100 * h0, h1)


def _attempt(
    field: Field, state: State, bounds: Tensor, inside: Tensor, end: float, tolerance: Tolerance
) -> tuple[State, Tensor, Tensor]:
    """Try one step of every sample.

    Returns the new state, a mask of the samples that have reached the end (N,), and their x there (N, C, H, W).
    """
    stop = bounds[state.phase + 1]
    clipped = state.time + state.step >= stop
    step = torch.where(clipped, stop - state.time, state.step)
    reached = torch.where(clipped, stop, state.time + step)
    slopes, x = _stages(field, state, step, reached, inside)
    ratio = _error_ratio(state.x, x, _weighted(ERROR, slopes, step), tolerance)
    _check(ratio, step, state.time)
    accepted = ratio <= 1
    next_step = step * _factor(ratio)
    # A step that a bound has cut short says little about the next step size.
    next_step = torch.where(accepted & clipped, torch.maximum(next_step, state.step), next_step)
    ended = accepted & (reached >= end)
    at_end = x
    if bool((ended & (reached > end)).any()):
        at_end = _interpolate(state.x, x, slopes, step, (end - state.time) / step)
    crossed = accepted & clipped & ~ended
    took = _wide(accepted, x)
    new = replace(
        state,
        x=torch.where(took, x, state.x),
        slope=torch.where(took, slopes[-1], state.slope),
        time=torch.where(accepted, reached, state.time),
        step=next_step,
        phase=state.phase + crossed.long(),
        nfe=state.nfe + len(STAGES),
    )
    return _restart(field, new, crossed, inside), ended, at_end


def _stages(field: Field, state: State, step: Tensor, reached: Tensor, inside: Tensor) -> tuple[list[Tensor], Tensor]:
    """The slopes of all 7 stages, (N, C, H, W) each, and the new x. The last slope is taken at the new x."""
    slopes, x = [state.slope], state.x
    # As in torchdiffeq, times have the dtype of x, and the end of the step is rounded down once. Both decide on which
    # side of a discontinuity a stage is evaluated.
    start, width, stop = (value.to(x.dtype) for value in (state.time, step, reached))
    stop = torch.nextafter(stop, start)
    for time, weights in zip(TIMES[1:], STAGES, strict=True):
        x = state.x + _weighted(weights, slopes, step)
        g = stop if time == 1 else start + time * width
        slopes.append(field(x, _between(g, state.phase, inside), state.y))
    return slopes, x


def _restart(field: Field, state: State, crossed: Tensor, inside: Tensor) -> State:
    """Evaluate the slope again for samples at a discontinuity: the last stage used the field before it."""
    rows = crossed.nonzero().flatten()
    if len(rows) == 0:
        return state
    part = state.select(rows)
    slope = field(part.x, _between(part.time, part.phase, inside).to(part.x.dtype), part.y)
    return replace(state, slope=state.slope.index_copy(0, rows, slope), nfe=state.nfe + crossed.long())


def _error_ratio(old: Tensor, new: Tensor, error: Tensor, tolerance: Tolerance) -> Tensor:
    return tolerance.norm(error / (tolerance.atol + tolerance.rtol * torch.maximum(old.abs(), new.abs())))


def _factor(ratio: Tensor) -> Tensor:
    """Factor on the step size, (N,): 0.9·ratio^(−1/5) between 0.2 and 10, at least 1 after an accepted step."""
    least = torch.where(ratio < 1, 1.0, SHRINK)
    return (SAFETY / ratio.clamp(min=1e-300) ** (1 / ORDER)).clamp(max=GROW).maximum(least)


def _interpolate(x0: Tensor, x1: Tensor, slopes: list[Tensor], step: Tensor, progress: Tensor) -> Tensor:
    """x at `progress` (N,) of a step: the quartic through both ends, both slopes and the middle (Shampine 1986)."""
    middle = x0 + _weighted(MIDDLE, slopes, step)
    width, s = _wide(step, x0), _wide(progress.clamp(max=1), x0)
    d0, d1 = width * slopes[0], width * slopes[-1]
    cubic = x0 + s * (d0 + s * (3 * (x1 - x0) - 2 * d0 - d1 + s * (2 * (x0 - x1) + d0 + d1)))
    # The cubic through the ends misses the middle by `gap`; s²(1 − s)² is 1/16 there and flat at the ends.
    gap = middle - ((x0 + x1) / 2 + (d0 - d1) / 8)
    return cubic + 16 * gap * (s * (1 - s)).square()


def _weighted(weights: Sequence[float], slopes: list[Tensor], step: Tensor) -> Tensor:
    """step · Σ weight·slope: (N, C, H, W).

    As in torchdiffeq, the step multiplies the weights before the slopes. The terms of the error estimate nearly cancel,
    so that their rounding changes the step sizes.
    """
    scaled = slopes[0].new_tensor(weights) * _wide(step, slopes[0])[..., None]
    return (torch.stack(slopes, -1) * scaled).sum(-1)


def _between(time: Tensor, phase: Tensor, inside: Tensor) -> Tensor:
    """The time, clamped to `INSIDE` from the bounds of its phase. Without bounds it stays."""
    low, high = inside[phase] + INSIDE, inside[phase + 1] - INSIDE
    return torch.minimum(torch.maximum(time, low.to(time.dtype)), high.to(time.dtype))


def _wide(value: Tensor, like: Tensor) -> Tensor:
    """(N,) as (N, 1, 1, 1), with the dtype of `like` unless it is bool."""
    wide = value.reshape(-1, *[1] * (like.ndim - 1))
    return wide if value.dtype == torch.bool else wide.to(like.dtype)


def _check(ratio: Tensor, step: Tensor, time: Tensor) -> None:
    failed = ~(ratio.isfinite() & (time + step > time))
    if bool(failed.any()):
        row = int(failed.nonzero()[0])
        raise FloatingPointError(
            f"dopri5 stopped at global time {time[row].item():.6g}: error {ratio[row].item()}, step "
            f"{step[row].item():.3g}; the model's velocity is not finite, or not smooth enough for rtol and atol"
        )
