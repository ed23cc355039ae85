"""AdamW groups and its state; the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sfd_scale.runtime.settings import above, at_least


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """AdamW (arXiv 1711.05101). The defaults are those of the SFD training runs: no weight decay."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        above(self, lr=0, eps=0)
        at_least(self, weight_decay=0)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: {self.betas}; allowed: two numbers in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """A linear warm-up to the peak, then constant, or falling to `final` of the peak at the last step.

    wsd (warm-up, stable, decay: arXiv 2404.06395) is constant until the last `decay_steps`, over which it falls
    linearly: a run can be prolonged from any checkpoint of its stable part.
    """

    kind: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    warmup_steps: int = 0
    final: float = 0.0
    decay_steps: int | None = None

    def __post_init__(self) -> None:
        at_least(self, warmup_steps=0)
        if not 0 <= self.final <= 1:
            raise ValueError(f"final: {self.final}; allowed: a share of the peak in [0, 1]")
        if self.kind == "constant" and self.final:
            raise ValueError(f"final: {self.final}; allowed: 0 with kind constant, which does not fall")
        if (self.kind == "wsd") != (self.decay_steps is not None) or (self.decay_steps or 1) < 1:
            raise ValueError(f"decay_steps: {self.decay_steps}; allowed: 1 and up with kind wsd, null with any other")


def learning_rate(peak: float, schedule: ScheduleConfig, step: int, total: int) -> float:
    """The rate of step 0, 1, …, total - 1. Warm-up step i has (i + 1) / warmup_steps of the peak, never 0."""
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    first = schedule.warmup_steps
    if schedule.decay_steps is not None:
        # The last stable step: the first step of the decay is below the peak, the last one at `final`.
        first = max(first, total - 1 - schedule.decay_steps)
    done = min(max(step - first, 0) / max(total - 1 - first, 1), 1.0)
    falling = 0.5 * (1.0 + math.cos(math.pi * done)) if schedule.kind == "cosine" else 1.0 - done
    return peak * (schedule.final + (1.0 - schedule.final) * falling)


def param_groups(model: nn.Module, config: AdamWConfig) -> list[dict[str, Any]]:
    """Groups for torch's AdamW: decay on matrices and kernels, none on vectors (biases, norms, gates).

    Raises:
        ValueError: for a parameter without gradients, which no engine here shards or saves.
    """
    frozen = [name for name, param in model.named_parameters() if not param.requires_grad]
    if frozen:
        raise ValueError(f"parameters that are not trained: {', '.join(frozen)}; register constants as buffers")
    params = list(model.parameters())
    if config.weight_decay == 0:
        return [{"params": params, "weight_decay": 0.0}]
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def create_state(optimizer: torch.optim.Optimizer, tensors: list[Tensor]) -> None:
    """Create the Adam state that the first step would create, so that it can be read and loaded before that.

    `step` is a tensor for torch's AdamW and a plain int for DeepSpeed's CPU Adam, as each of them creates it.
    """
    fused = {id(p): group.get("fused") for group in optimizer.param_groups for p in group["params"]}
    for tensor in tensors:
        state = optimizer.state[tensor]
        assert not state, "the optimizer has stepped before its state was created"
        if isinstance(optimizer, torch.optim.AdamW):
            on_device = fused.get(id(tensor), optimizer.defaults["fused"])
            state["step"] = torch.zeros((), device=tensor.device if on_device else "cpu")
        else:
            state["step"] = 0
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(tensor), torch.zeros_like(tensor)


def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set how many updates the moments of every tensor have seen, which Adam's bias correction depends on."""
    for state in optimizer.state.values():
        if isinstance(state["step"], Tensor):
            state["step"].fill_(float(step))
        else:
            state["step"] = step


def step_if_finite(optimizer: torch.optim.AdamW, norm: Tensor) -> None:
    """A step of torch's fused AdamW, which leaves weights, moments and counts as they are where `norm` is not finite.

    The kernel decides it on the device, by the flag that loss scaling uses: the host need not know yet.
    """
    optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
    optimizer.step()


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
