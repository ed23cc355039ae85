"""Samplers: order of convergence of Euler, midpoint, Heun and RK4; closed forms; error control of dopri5."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sfd_scale.diffusion.adaptive import Dopri5Config
from sfd_scale.diffusion.conditioning import ClassLabels
from sfd_scale.diffusion.fixed_step import TABLEAUX, FixedStepConfig, FixedStepMethod, snap, trajectory
from sfd_scale.diffusion.flow_ode import SampleResult
from sfd_scale.diffusion.guidance import ClassifierFreeGuidance, Velocity, guided, interval_discontinuities
from sfd_scale.diffusion.latents import LatentLayout
from sfd_scale.diffusion.samplers import SamplerConfig, sample
from sfd_scale.diffusion.schedule import Clocks, SemanticFirstSchedule

LAYOUT = LatentLayout(texture_channels=2, semantic_channels=1, size=4)
LEAD, SYNC = SemanticFirstSchedule(delta_t=0.3), SemanticFirstSchedule(delta_t=0.0)
CALLS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
ORDERS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}


def noise(count: int, layout: LatentLayout = LAYOUT) -> Tensor:
    return torch.randn(count, *layout.shape, generator=torch.Generator().manual_seed(5))


def growth(x: Tensor, t: Clocks, y: Tensor) -> Tensor:
    """dx/dt = y·cos(3t)·x on each part's own clock: x(1) = x(0)·exp(y·sin(3)/3)."""
    return LAYOUT.per_channel(*(torch.cos(3 * part) for part in t), like=x) * y[:, None, None, None] * x


def wave(x: Tensor, t: Clocks, y: Tensor) -> Tensor:
    """A velocity that turns x faster for larger labels, and mixes the parts."""
    turn = LAYOUT.per_channel(*(torch.sin(5 * part) + 1 for part in t), like=x)
    return turn * (y[:, None, None, None] * x.roll(1, dims=1) - x)


def run(
    velocity: Velocity, config: SamplerConfig, count: int = 3, schedule: SemanticFirstSchedule = LEAD
) -> SampleResult:
    return sample(velocity, noise(count), torch.arange(1, count + 1), schedule, LAYOUT, config)


# ------------------------------------------------------------------------------------------- fixed steps


@pytest.mark.parametrize("shift", [0.0, 0.3])
@pytest.mark.parametrize("kind", TABLEAUX)
def test_one_clock_integrates_a_constant_velocity_for_unit_time(kind: FixedStepMethod, shift: float) -> None:
    target = noise(3).flip(0)
    result = run(lambda x, t, y: target, FixedStepConfig(kind=kind, num_steps=13, shift=shift), schedule=SYNC)
    torch.testing.assert_close(result.x, noise(3) + target)
    assert result.nfe.tolist() == [13 * CALLS[kind]] * 3


def test_euler_with_two_clocks_moves_each_part_while_its_clock_runs() -> None:
    # 10 steps of 0.13: texture moves in steps from 0.39 on, semantics in steps that start at 0.91 or before.
    result = run(lambda x, t, y: torch.ones_like(x), FixedStepConfig(num_steps=10))
    gain = LAYOUT.per_channel(7 * 0.13, 8 * 0.13, like=result.x)
    torch.testing.assert_close(result.x, noise(3) + gain)


@pytest.mark.parametrize("kind", TABLEAUX)
def test_orders_of_convergence(kind: FixedStepMethod) -> None:
    """dx/dt = 2t·x², x(0) = 1/2: x(1) = 1."""

    def error(steps: int) -> float:
        start = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64)
        times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        *_, x = trajectory(lambda x, g, y: 2 * g * x * x, start, torch.zeros(1), times, TABLEAUX[kind])
        return abs(x.item() - 1)

    assert math.log2(error(40) / error(80)) == pytest.approx(ORDERS[kind], abs=0.25)


@pytest.mark.parametrize("kind", TABLEAUX)
def test_a_tableau_is_consistent(kind: FixedStepMethod) -> None:
    tableau = TABLEAUX[kind]
    assert sum(tableau.weights) == pytest.approx(1)
    assert [sum(row) for row in tableau.stages] == pytest.approx(list(tableau.times))


def test_texture_keeps_its_noise_until_its_clock_starts() -> None:
    seen: list[tuple[float, Tensor]] = []

    def velocity(x: Tensor, t: Clocks, y: Tensor) -> Tensor:
        seen.append((t.semantic[0].item(), LAYOUT.split(x)[0].clone()))
        return torch.ones_like(x)

    run(velocity, FixedStepConfig(num_steps=26))
    start = LAYOUT.split(noise(3))[0]
    assert all(torch.equal(texture, start) for g, texture in seen if g <= 0.3)
    assert any(not torch.equal(texture, start) for _, texture in seen)


@pytest.mark.parametrize("kind", TABLEAUX)
def test_steps_that_end_at_discontinuities_keep_the_order_of_a_method(kind: FixedStepMethod) -> None:
    """Two clocks and a nonlinear velocity. Steps across the discontinuities make every method first order."""

    def field(x: Tensor, t: Clocks, y: Tensor) -> Tensor:
        return LAYOUT.per_channel(*(torch.sin(3 * part) + 0.5 for part in t), like=x) * torch.sin(x + x.roll(1, dims=1))

    def error(steps: int, jump: bool) -> float:
        return (run(field, FixedStepConfig(kind=kind, num_steps=steps, jump=jump)).x - exact).abs().max().item()

    exact = run(field, FixedStepConfig(kind="rk4", num_steps=260, jump=True)).x
    # Grids of 13 or 26 even steps contain both discontinuities: `jump` only changes on which side they are evaluated.
    assert math.log2(error(13, jump=True) / error(26, jump=True)) > min(ORDERS[kind], 2) - 0.3
    better = {"euler": 1, "midpoint": 1, "heun2": 4, "heun3": 10, "rk4": 100}[kind]
    assert error(13, jump=True) < error(13, jump=False) / better


def test_evaluation_times_are_those_of_the_stages() -> None:
    times = FixedStepConfig(kind="heun3", num_steps=2).evaluation_times(LEAD)
    assert times is not None
    assert times.tolist() == pytest.approx([0.65 * part for part in (0, 1 / 3, 2 / 3, 1, 4 / 3, 5 / 3)])
    assert FixedStepConfig(jump=True).evaluation_times(LEAD) is None


def test_points_of_the_grid_move_onto_discontinuities_and_stay_in_order() -> None:
    times = torch.linspace(0, 1.3, 4)
    assert snap(times, [0.3, 1.0]).tolist() == pytest.approx([0, 0.3, 1.0, 1.3])
    assert snap(times, [0.01, 0.02]).tolist() == pytest.approx([0, 0.01, 0.02, 1.3])
    assert snap(times, [1.28, 1.29]).tolist() == pytest.approx([0, 1.28, 1.29, 1.3])
    assert snap(times, []).tolist() == times.tolist() == torch.linspace(0, 1.3, 4).tolist()
    with pytest.raises(ValueError, match="num_steps: 2; allowed: 3 and up"):
        snap(torch.linspace(0, 1.3, 3), [0.3, 1.0])


# ----------------------------------------------------------------------------------------------- dopri5


@pytest.mark.parametrize("jump", [False, True])
@pytest.mark.parametrize("schedule", [LEAD, SYNC], ids=["lead", "sync"])
def test_both_error_controls_agree_on_a_batch_of_one(schedule: SemanticFirstSchedule, jump: bool) -> None:
    configs = [Dopri5Config(error_control=control, jump=jump) for control in ("sample", "batch")]
    alone, batch = (run(wave, config, count=1, schedule=schedule) for config in configs)
    assert torch.equal(alone.x, batch.x) and torch.equal(alone.nfe, batch.nfe)


@pytest.mark.parametrize("jump", [False, True])
def test_a_sample_does_not_depend_on_its_batch(jump: bool) -> None:
    x, y = noise(4), torch.tensor([1, 9, 2, 5])
    config = Dopri5Config(jump=jump)
    together = sample(wave, x, y, LEAD, LAYOUT, config)
    assert len(set(together.nfe.tolist())) > 1, "the samples should need different numbers of steps"
    for row in range(4):
        alone = sample(wave, x[row : row + 1], y[row : row + 1], LEAD, LAYOUT, config)
        assert alone.nfe.item() == together.nfe[row].item()
        torch.testing.assert_close(alone.x[0], together.x[row], rtol=1e-5, atol=1e-5)


def test_one_norm_over_the_batch_makes_samples_depend_on_it() -> None:
    x, y = noise(2), torch.tensor([1, 9])
    config = Dopri5Config(error_control="batch")
    together = sample(wave, x, y, LEAD, LAYOUT, config)
    alone = sample(wave, x[:1], y[:1], LEAD, LAYOUT, config)
    assert together.nfe[0] == together.nfe[1] > alone.nfe[0]


def test_finished_samples_are_not_evaluated() -> None:
    rows = 0

    def counted(x: Tensor, t: Clocks, y: Tensor) -> Tensor:
        nonlocal rows
        rows += len(x)
        return wave(x, t, y)

    result = sample(counted, noise(4), torch.tensor([1, 9, 2, 5]), LEAD, LAYOUT, Dopri5Config())
    assert rows == result.nfe.sum().item()


def growth_error(rtol: float, schedule: SemanticFirstSchedule, control: Any, jump: bool) -> tuple[float, int]:
    """Largest error relative to the largest value, and the number of evaluations of all samples."""
    config = Dopri5Config(rtol=rtol, atol=rtol, error_control=control, jump=jump)
    result = run(growth, config, schedule=schedule)
    exact = noise(3) * torch.exp(torch.arange(1, 4) * math.sin(3) / 3)[:, None, None, None]
    return ((result.x - exact).abs().max() / exact.abs().max()).item(), int(result.nfe.sum())


@pytest.mark.parametrize("control", ["sample", "batch"])
@pytest.mark.parametrize(("schedule", "jump"), [(SYNC, False), (SYNC, True), (LEAD, True)])
def test_dopri5_meets_its_tolerance(control: Any, schedule: SemanticFirstSchedule, jump: bool) -> None:
    for rtol in (1e-3, 1e-5):
        assert growth_error(rtol, schedule, control, jump)[0] < 5 * rtol


def test_steps_across_discontinuities_miss_the_tolerance() -> None:
    """The error estimate hardly notices a discontinuity inside a step. `jump` exists for this reason."""
    across, calls_across = growth_error(1e-3, LEAD, "batch", jump=False)
    ending, calls_ending = growth_error(1e-3, LEAD, "batch", jump=True)
    assert across > 10 * 1e-3 > ending
    assert calls_ending <= calls_across


def test_a_piecewise_constant_velocity_is_integrated_exactly_with_jump() -> None:
    """A constant velocity has errors only at the discontinuities: with `jump` it is exact and takes few evaluations."""
    target = noise(3).flip(0)
    with_jump, without = (
        run(lambda x, t, y: target[: len(x)], Dopri5Config(error_control="batch", jump=jump)) for jump in (True, False)
    )
    torch.testing.assert_close(with_jump.x, noise(3) + target, rtol=0, atol=2e-6)
    assert (without.x - noise(3) - target).abs().max() > 1e-5
    assert with_jump.nfe[0] < without.nfe[0] / 2


def test_steps_end_at_the_start_of_the_guidance_interval() -> None:
    config = ClassifierFreeGuidance(scale_texture=3.0, scale_semantic=2.0, interval_start=0.25, interval_mode="both")
    velocity = guided(
        lambda x, t_texture, t_semantic, y: (y[:, None, None, None].float().expand_as(x), None),
        config,
        LAYOUT,
        conditioning=ClassLabels(0),
    )
    result = sample(
        velocity,
        noise(1),
        torch.tensor([1]),
        LEAD,
        LAYOUT,
        Dopri5Config(jump=True),
        interval_discontinuities(config, LEAD),
    )
    # Velocity 1 for a quarter of each part's time, then its scale.
    gain = LAYOUT.per_channel(0.25 + 0.75 * 3, 0.25 + 0.75 * 2, like=result.x)
    torch.testing.assert_close(result.x, noise(1) + gain, rtol=0, atol=5e-6)
    assert interval_discontinuities(config, LEAD) == (0.25, 0.55)
    assert interval_discontinuities(dataclasses.replace(config, interval_start=0.0), LEAD) == ()  # guided from noise on


def test_first_step_of_dopri5_is_the_one_of_hairer() -> None:
    """dx/dg = x from x = 1: d0 = d1 = 1/(atol + rtol), h0 = 0.01, d2 = d0·(change of the slope)/h0 = d0."""
    times: list[float] = []

    def field(x: Tensor, t: Clocks, y: Tensor) -> Tensor:
        times.append(t.texture[0].item())
        return x

    config = Dopri5Config(rtol=1e-3, atol=1e-6, jump=False)
    sample(field, torch.ones(1, *LAYOUT.shape), torch.zeros(1), SYNC, LAYOUT, config)
    d = 1 / (1e-3 + 1e-6)
    step = (0.01 / d) ** 0.2
    assert times[:2] == pytest.approx([0, 0.01])
    assert times[2:8] == pytest.approx([step / 5, step * 0.3, step * 0.8, step * 8 / 9, step, step], rel=1e-4)
    assert max(times) > 1, "the last step goes beyond the end"


def test_a_step_that_a_discontinuity_cuts_short_does_not_shorten_the_next_one() -> None:
    """A velocity of 1 has no error: steps of s, 10·s, the rest to the discontinuity, and at once all that is left."""
    tolerance = 1e-5
    first = (0.01 * 2 * tolerance) ** 0.2  # as above, with d0 = d1 = 1/(atol + rtol) and d2 = 0
    config = Dopri5Config(rtol=tolerance, atol=tolerance, jump=True)
    start, end = torch.ones(1, *LAYOUT.shape), (11 * first + 1e-3,)
    result = sample(lambda x, t, y: torch.ones_like(x), start, torch.zeros(1), SYNC, LAYOUT, config, end)
    assert result.nfe.item() == 2 + 4 * 6 + 1  # two for the first step size, six a step, one at the discontinuity


def test_a_velocity_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(FloatingPointError, match="global time 0.*not finite"):
        run(lambda x, t, y: x * float("nan"), Dopri5Config())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedStepConfig(num_steps=0), "num_steps: 0"),
        (lambda: FixedStepConfig(kind="rk4", shift=-1.0), "shift: -1.0"),
        (lambda: Dopri5Config(rtol=0.0), "rtol: 0.0"),
        (lambda: Dopri5Config(atol=float("nan")), "atol: nan"),
    ],
)
def test_impossible_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
