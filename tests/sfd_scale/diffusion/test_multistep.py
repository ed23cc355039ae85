"""Adams-Bashforth and exponential multistep solvers: order of convergence on closed forms with two clocks, evaluations
per step, and the restart at the discontinuities of the clocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import get_args

import pytest
import torch
from torch import Tensor

from sfd_scale.diffusion import multistep
from sfd_scale.diffusion.fixed_step import TABLEAUX
from sfd_scale.diffusion.guidance import Velocity
from sfd_scale.diffusion.latents import LatentLayout
from sfd_scale.diffusion.multistep import MultistepConfig, MultistepMethod
from sfd_scale.diffusion.samplers import sample, solver_settings
from sfd_scale.diffusion.schedule import Clocks, SemanticFirstSchedule

LAYOUT = LatentLayout(texture_channels=2, semantic_channels=2, size=2)
LEAD, SYNC = SemanticFirstSchedule(delta_t=0.3), SemanticFirstSchedule(delta_t=0.0)
METHODS: tuple[MultistepMethod, ...] = get_args(MultistepMethod)
MEAN, DEVIATION = 0.7, 0.5


def noise(count: int = 4) -> Tensor:
    draws = torch.randn(count, *LAYOUT.shape, generator=torch.Generator().manual_seed(5))
    return draws.double()


def run(velocity: Velocity, config: MultistepConfig, schedule: SemanticFirstSchedule = LEAD) -> Tensor:
    x = noise()
    result = sample(velocity, x, torch.zeros(len(x)), schedule, LAYOUT, config)
    assert result.nfe.tolist() == [config.num_steps] * len(x)
    return result.x


def gaussian(x: Tensor, t: Clocks, y: Tensor) -> Tensor:
    """The exact velocity towards data from N(MEAN, DEVIATION²): x(1) = MEAN + DEVIATION·x(0)."""
    time = LAYOUT.per_channel(*t, like=x)
    slope = (time * DEVIATION**2 - (1 - time)) / (time**2 * DEVIATION**2 + (1 - time) ** 2)
    return MEAN + slope * (x - time * MEAN)


def coupled(x: Tensor, t: Clocks, y: Tensor) -> Tensor:
    """Semantics decay, and texture moves with them: both parts depend on both clocks."""
    _, semantic = LAYOUT.split(x)
    return LAYOUT.join(semantic, -semantic)


def coupled_end() -> Tensor:
    """s(g) = s·e^(−g) up to g = 1, then it stands still; texture moves by its integral from 0.3 to 1.3."""
    texture, semantic = LAYOUT.split(noise())
    return LAYOUT.join(texture + semantic * (math.exp(-0.3) - 0.7 * math.exp(-1)), semantic * math.exp(-1))


PROBLEMS: dict[str, tuple[Velocity, Callable[[], Tensor]]] = {
    "gaussian": (gaussian, lambda: MEAN + DEVIATION * noise()),
    "coupled": (coupled, coupled_end),
}


def order(problem: str, kind: MultistepMethod, steps: int = 104) -> float:
    velocity, end = PROBLEMS[problem]
    errors = [
        (run(velocity, MultistepConfig(kind=kind, num_steps=count)) - end()).abs().max().item()
        for count in (steps, 2 * steps)
    ]
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_orders_of_convergence_with_two_clocks(problem: str, kind: MultistepMethod) -> None:
    assert order(problem, kind) == pytest.approx(MultistepConfig(kind=kind).order, abs=0.25)


@pytest.mark.parametrize("kind", ["ab2", "ab3"])
def test_a_history_across_the_discontinuities_makes_a_method_first_order(
    kind: MultistepMethod, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 52 steps of 0.025 end at both discontinuities, with and without a restart.
    config = MultistepConfig(kind=kind, num_steps=52)
    restarted = (run(coupled, config) - coupled_end()).abs().max()
    monkeypatch.setattr(multistep, "segments", lambda times, discontinuities: [list(times)])
    across = (run(coupled, config) - coupled_end()).abs().max()
    assert across > 20 * restarted


@pytest.mark.parametrize("kind", ["ab3", "exp_ab3"])
def test_without_the_corrected_first_step_the_order_is_2(
    kind: MultistepMethod, monkeypatch: pytest.MonkeyPatch
) -> None:
    def uncorrected(
        evaluate: Callable[[Tensor, float], Tensor], advance: multistep.Advance, x: Tensor, times: list[float], k: int
    ) -> Tensor:
        history: list[tuple[float, Tensor]] = []
        for start, stop in pairwise(times):
            inside = min(max(start, times[0] + 1e-6), times[-1] - 1e-6)
            history = [(start, evaluate(x, inside)), *history][:k]
            x = advance(x, start, stop, history)
        return x

    monkeypatch.setattr(multistep, "integrate_segment", uncorrected)
    assert order("coupled", kind) < 2.4


@pytest.mark.parametrize("kind", METHODS)
def test_each_step_takes_one_evaluation(kind: MultistepMethod) -> None:
    calls: list[float] = []

    def counted(x: Tensor, t: Clocks, y: Tensor) -> Tensor:
        calls.append(t.semantic[0].item() + t.texture[0].item())
        return coupled(x, t, y)

    for steps in (3, 7, 20):
        calls.clear()
        run(counted, MultistepConfig(kind=kind, num_steps=steps))
        assert len(calls) == steps and calls == sorted(calls)


@pytest.mark.parametrize("kind", METHODS)
def test_a_velocity_that_is_constant_between_discontinuities_is_integrated_exactly(kind: MultistepMethod) -> None:
    def velocity(x: Tensor, t: Clocks, y: Tensor) -> Tensor:
        return torch.full_like(x, 2.0)

    torch.testing.assert_close(run(velocity, MultistepConfig(kind=kind, num_steps=9)), noise() + 2, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["exp_ab2", "exp_ab3"])
@pytest.mark.parametrize("schedule", [LEAD, SYNC], ids=["lead", "sync"])
def test_exponential_methods_are_exact_for_a_prediction_that_is_linear_in_time(
    kind: MultistepMethod, schedule: SemanticFirstSchedule
) -> None:
    """Predicted data that moves from its start to `target`, as its part's clock runs: the path ends at `target`."""
    target = noise().flip(0)

    def velocity(x: Tensor, t: Clocks, y: Tensor) -> Tensor:
        time = LAYOUT.per_channel(*t, like=x)
        return (time * target - x) / (1 - time).clamp(min=1e-9)

    x, rough = (run(velocity, MultistepConfig(kind=name, num_steps=9), schedule) for name in (kind, "ab2"))
    torch.testing.assert_close(x, target, rtol=0, atol=2e-5)
    assert (rough - target).abs().max() > 1e-2


def test_moments_of_the_exponential_methods_are_their_integrals() -> None:
    for a, b in ((1.0, 0.7), (0.4, 0.1), (0.2, 0.0)):
        u = torch.linspace(0, a - b, 200_001, dtype=torch.float64)
        # With b = 0 the integrand is singular at the end, where b·∫ tends to (a − b)^k: take a small b.
        rest = max(b, 1e-4)
        u = u * (a - rest) / (a - b)
        exact = [rest * torch.trapezoid(u**k / (a - u) ** 2, u).item() for k in range(3)]
        assert multistep.exponential_moments(a, b, 3) == pytest.approx(exact, rel=0, abs=5e-3 if b == 0 else 1e-8)


def test_uneven_steps_get_the_textbook_weights() -> None:
    """Hairer, Norsett, Wanner: Solving Ordinary Differential Equations I, Sec. III.1, Eq. (1.5), for even steps."""
    ones = [1.0, 1 / 2, 1 / 3]
    assert multistep.node_weights([0, -1, -2], ones) == pytest.approx([23 / 12, -16 / 12, 5 / 12])
    assert multistep.node_weights([0, -0.5], ones[:2]) == pytest.approx([2.0, -1.0])


def test_too_few_steps_and_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="num_steps: 2; allowed: 3 and up"):
        run(coupled, MultistepConfig(num_steps=2))
    for wrong in ({"num_steps": 0}, {"shift": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            MultistepConfig(**wrong)  # type: ignore[arg-type]


def test_every_solver_has_settings_by_its_name() -> None:
    for name in (*TABLEAUX, *METHODS, "dopri5"):
        settings = solver_settings(name, 7)  # type: ignore[arg-type]
        assert settings.kind == name and (name == "dopri5" or settings.num_steps == 7)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="solver: rk5; allowed: euler"):
        solver_settings("rk5", 7)  # type: ignore[arg-type]
