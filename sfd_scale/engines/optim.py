"""AdamW: parameter groups and optimizer state; and the learning-rate schedule, a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sfd_scale.runtime.settings import above, at_least


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """AdamW (arXiv 1711.05101). The defaults are those of SFD's training runs, without weight decay."""

    kind: Literal["adamw"] = "adamw"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        above(self, lr=0, eps=0)
        at_least(self, weight_decay=0)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: {self.betas}; allowed: two numbers in [0, 1)")

    @property
    def description(self) -> str:
        return f"AdamW, learning rate {self.lr:g}, betas {self.betas}"


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning-rate schedule: linear warm-up over `warmup_steps` to the peak, then constant or decaying.

    kind: linear and cosine decay from the end of the warm-up to the last step. wsd (warm-up, stable, decay: arXiv
        2404.06395) decays linearly over the last `decay_steps`, so that a run can be continued from any checkpoint of
        its stable part.
    final: the learning rate of the last step, as a fraction of the peak.
    """

    kind: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    warmup_steps: int = 0
    final: float = 0.0
    decay_steps: int | None = None

    def __post_init__(self) -> None:
        at_least(self, warmup_steps=0)
        if not 0 <= self.final <= 1:
            raise ValueError(f"final: {self.final}; allowed: a fraction of the peak in [0, 1]")
        if self.kind == "constant" and self.final:
            raise ValueError(f"final: {self.final}; allowed: 0 with kind constant, which does not decay")
        if (self.kind == "wsd") != (self.decay_steps is not None) or (self.decay_steps or 1) < 1:
            raise ValueError(f"decay_steps: {self.decay_steps}; allowed: 1 and up with kind wsd, null with any other")


def learning_rate(peak: float, schedule: ScheduleConfig, step: int, total: int) -> float:
    """The learning rate of step 0, 1, …, total - 1. Warm-up step i has (i + 1) / warmup_steps of the peak, never 0."""
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    first = schedule.warmup_steps
    if schedule.decay_steps is not None:
        # The last stable step. The next one is below the peak; the last step is at `final`.
        first = max(first, total - 1 - schedule.decay_steps)
    done = min(max(step - first, 0) / max(total - 1 - first, 1), 1.0)
    falling = 0.5 * (1.0 + math.cos(math.pi * done)) if schedule.kind == "cosine" else 1.0 - done
    return peak * (schedule.final + (1.0 - schedule.final) * falling)


def require_trainable(model: nn.Module) -> None:
    """Raise ValueError for a parameter with requires_grad false: the engines neither shard nor save it."""
    frozen = [name for name, param in model.named_parameters() if not param.requires_grad]
    if frozen:
        raise ValueError(f"parameters with requires_grad false: {', '.join(frozen)}; register constants as buffers")


def is_decayed(name: str, param: Tensor) -> bool:
    """Whether weight decay is for a parameter: for matrices and kernels, not for vectors (biases, norms, gates)."""
    return param.ndim >= 2


def param_groups(
    model: nn.Module,
    config: AdamWConfig,
    chosen: Callable[[str], bool] = lambda name: True,
    lr_scale: float = 1.0,
    decayed: Callable[[str, nn.Parameter], bool] = is_decayed,
) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: those with weight decay, and those without.

    Args:
        chosen: whether a parameter, by its name, belongs to them.
        lr_scale: their learning rate, as a factor of the engine's.
        decayed: whether weight decay is for a parameter, by its name.

    Raises:
        ValueError: for a parameter with requires_grad false.
    """
    require_trainable(model)
    params = {name: param for name, param in model.named_parameters() if chosen(name)}
    if config.weight_decay == 0:
        return [{"params": list(params.values()), "weight_decay": 0.0, "lr_scale": lr_scale}]
    of_kind = {kind: [p for name, p in params.items() if decayed(name, p) == kind] for kind in (True, False)}
    groups = [
        {"params": of_kind[True], "weight_decay": config.weight_decay, "lr_scale": lr_scale},
        {"params": of_kind[False], "weight_decay": 0.0, "lr_scale": lr_scale},
    ]
    return [group for group in groups if group["params"]]


def create_state(optimizer: torch.optim.Optimizer, tensors: Sequence[tuple[Tensor, dict[str, Any]]]) -> None:
    """Create the optimizer's state before the first step, so that a checkpoint can be loaded into it.

    `step` is a tensor for torch's AdamW and a plain int for DeepSpeed's CPU Adam, as these create it themselves.

    Args:
        tensors: what the optimizer updates, each with its parameter group.
    """
    for tensor, group in tensors:
        state = optimizer.state[tensor]
        assert not state, "the optimizer has stepped before its state was created"
        if isinstance(optimizer, torch.optim.AdamW):
            on_device = group.get("fused", optimizer.defaults["fused"])
            state["step"] = torch.zeros((), device=tensor.device if on_device else "cpu")
        else:
            state["step"] = 0
        state["exp_avg"] = torch.zeros_like(tensor)
        if not group.get("orthogonalized"):
            state["exp_avg_sq"] = torch.zeros_like(tensor)


def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set the number of updates in every tensor's state; Adam's bias correction depends on it."""
    for state in optimizer.state.values():
        if isinstance(state["step"], Tensor):
            state["step"].fill_(float(step))
        else:
            state["step"] = step


def step_if_finite(optimizer: torch.optim.AdamW, norm: Tensor) -> None:
    """A step of torch's fused AdamW that changes nothing if `norm` is not finite.

    The kernel decides this on the device, by the flag of loss scaling, so that the host does not wait for the norm.
    """
    optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
    optimizer.step()


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
