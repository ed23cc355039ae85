from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sfd_scale.engines.optim import (
    AdamWConfig,
    ScheduleConfig,
    create_state,
    learning_rate,
    param_groups,
    set_lr,
    set_step,
    step_if_finite,
)
from tests.helpers.tiny import TinyModel


def rates(schedule: ScheduleConfig, total: int) -> list[float]:
    return [learning_rate(2.0, schedule, step, total) for step in range(total)]


def test_warm_up_is_never_zero_and_ends_at_a_constant_rate() -> None:
    assert rates(ScheduleConfig(), 3) == [2.0, 2.0, 2.0]
    assert rates(ScheduleConfig(warmup_steps=4), 6) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_decaying_schedules_end_at_their_final_fraction() -> None:
    assert rates(ScheduleConfig(kind="linear", warmup_steps=2), 7) == [1.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0]
    cosine = rates(ScheduleConfig(kind="cosine", final=0.1), 5)
    expected = [0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(5)]
    assert cosine == pytest.approx(expected)
    assert cosine[-1] == pytest.approx(0.2)


def test_wsd_is_constant_until_its_last_steps() -> None:
    schedule = ScheduleConfig(kind="wsd", warmup_steps=2, decay_steps=4, final=0.5)
    assert rates(schedule, 10) == [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.75, 1.5, 1.25, 1.0]
    # A longer run has the same stable part, so it can start from its checkpoints.
    assert rates(schedule, 20)[:6] == rates(schedule, 10)[:6]
    assert rates(ScheduleConfig(kind="wsd", warmup_steps=3, decay_steps=50), 5)[-1] == 0.0


def test_the_rate_stays_at_its_final_value_after_the_last_step() -> None:
    assert learning_rate(1.0, ScheduleConfig(kind="linear", final=0.25), 99, 10) == 0.25
    assert learning_rate(1.0, ScheduleConfig(kind="cosine", warmup_steps=10), 10, 10) == 1.0


def test_the_defaults_are_those_of_pytorch() -> None:
    """The official runs change the learning rate and the weight decay alone."""
    defaults = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]).defaults
    assert (AdamWConfig().betas, AdamWConfig().eps) == (defaults["betas"], defaults["eps"])


def test_matrices_decay_and_vectors_do_not() -> None:
    model = TinyModel()
    decayed, kept = param_groups(model, AdamWConfig(weight_decay=0.1))
    assert {p.ndim for p in decayed["params"]} == {2, 4} and decayed["weight_decay"] == 0.1
    assert {p.ndim for p in kept["params"]} == {1} and kept["weight_decay"] == 0.0
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))
    assert len(param_groups(model, AdamWConfig())) == 1


def test_parameters_without_gradients_are_refused_by_name() -> None:
    model = TinyModel()
    model.tail.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"tail\.bias"):
        param_groups(model, AdamWConfig())


def _steps(optimizer: torch.optim.AdamW, param: torch.Tensor, steps: range) -> None:
    for step in steps:
        param.grad = torch.cos(torch.arange(5.0) + step)
        optimizer.step()


@pytest.mark.parametrize("fused", [False, True])
def test_created_state_is_the_state_that_adamw_creates(fused: bool) -> None:
    a, b = torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(5))
    ours, theirs = (torch.optim.AdamW([p], lr=0.1, fused=fused) for p in (a, b))
    create_state(ours, [(a, ours.param_groups[0])])
    assert ours.state[a]["step"].item() == 0
    _steps(ours, a, range(3))
    _steps(theirs, b, range(3))
    assert torch.equal(a, b)
    for key, value in theirs.state[b].items():
        assert torch.equal(ours.state[a][key], value) and ours.state[a][key].device == value.device


def test_step_count_decides_the_bias_correction() -> None:
    results = []
    for count in (0, 3):
        param = torch.nn.Parameter(torch.ones(5))
        optimizer = torch.optim.AdamW([{"params": [param], "lr_scale": 0.5}], lr=0.1)
        create_state(optimizer, [(param, optimizer.param_groups[0])])
        set_step(optimizer, count)
        set_lr(optimizer, 0.02)
        _steps(optimizer, param, range(1))
        assert optimizer.state[param]["step"].item() == count + 1
        results.append(1.0 - param.detach())
    # With zero moments, step 4 is (1 - 0.9) / (1 - 0.9^4) · sqrt((1 - 0.999^4) / (1 - 0.999)) of step 1.
    factor = 0.1 / (1 - 0.9**4) * math.sqrt((1 - 0.999**4) / 0.001)
    weight_decay = 0.01 * 0.01
    torch.testing.assert_close(results[1] - weight_decay, (results[0] - weight_decay) * factor, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "cls,field,value",
    [
        (AdamWConfig, "lr", 0.0),
        (AdamWConfig, "betas", (0.9, 1.0)),
        (AdamWConfig, "eps", 0.0),
        (AdamWConfig, "weight_decay", -0.1),
        (ScheduleConfig, "warmup_steps", -1),
        (ScheduleConfig, "final", 0.5),
        (ScheduleConfig, "decay_steps", 5),
    ],
)
def test_impossible_settings_are_refused_by_name(cls: Any, field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        cls(**{field: value})


@pytest.mark.parametrize("norm", [1.0, math.inf, math.nan])
def test_a_step_with_a_norm_that_is_not_finite_changes_nothing(norm: float) -> None:
    """The kernel decides: a skipped step leaves weights, moments and step count the same, bit for bit."""
    plain, judged = (torch.nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
    optimizers = [torch.optim.AdamW([p], lr=0.1, weight_decay=0.1, fused=True) for p in (plain, judged)]
    for number in range(3):
        plain.grad, judged.grad = (torch.full((7,), number + 1.0) for _ in range(2))
        if number == 1:
            judged.grad.mul_(norm)
        if number != 1 or math.isfinite(norm):
            optimizers[0].step()
        step_if_finite(optimizers[1], judged.grad.norm())
    assert torch.equal(plain, judged)
    states = [optimizer.state[p] for optimizer, p in zip(optimizers, (plain, judged), strict=True)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    assert float(states[1]["step"]) == (3 if math.isfinite(norm) else 2)
