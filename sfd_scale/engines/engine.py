"""The interface between the trainer and an engine (DeepSpeed or FSDP2), and code that both engines share.

An engine owns the sharded model, its mixed precision, its gradients and its optimizer. The trainer owns the rest:
gradient accumulation, learning-rate schedule, EMA, checkpoints, data. An engine exposes its local fp32 state as
*fragments*. A fragment is a contiguous range of a parameter in row-major order, which fits ZeRO's flat partitions and
FSDP2's row shards. EMA and checkpoints use only fragments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sfd_scale.engines.block_transforms import Checkpointing
from sfd_scale.engines.replica_check import Replicas
from sfd_scale.runtime import distributed


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of every engine.

    precision: of forward and backward. bf16 is mixed precision: master weights, Adam's moments, gradient reduction and
        gradient norms stay fp32.
    grad_clip: largest global gradient norm; null for no clipping.
    activation_checkpointing: what the backward pass recomputes; see block_transforms.prepare_blocks.
    compile: torch.compile of each block.
    flat_parameters: keep the weights of a block in one parameter per dtype; `auto`: those of small blocks, see
        flat_parameters. It changes a result by the rounding of sums alone.
    """

    precision: Literal["bf16", "fp32"] = "bf16"
    grad_clip: float | None = None
    activation_checkpointing: Checkpointing = "none"
    compile: bool = False
    flat_parameters: bool | Literal["auto"] = "auto"

    @property
    def can_flatten(self) -> bool:
        """Whether the engine works with flat parameters under these settings."""
        return True

    def __post_init__(self) -> None:
        if self.grad_clip is not None and not 0 < self.grad_clip < math.inf:
            raise ValueError(f"grad_clip: {self.grad_clip}; allowed: above 0, or null for no clipping")


@dataclass(frozen=True)
class StepResult:
    """Result of an optimizer step: the global gradient norm before clipping, and whether the update was applied."""

    grad_norm: float
    applied: bool


@dataclass(frozen=True)
class Fragment:
    """The range [start, start + n) of one parameter, in row-major order, that this rank updates.

    The tensors are 1-D fp32 views, (n,), of the engine's own memory. After writing to them, call `Engine.after_load`.
    `exp_avg` and `exp_avg_sq` are Adam's moments. A matrix under Muon has its momentum as `exp_avg` and no other.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor | None
    primary: bool  # False if another rank has the same range and saves it

    @property
    def stop(self) -> int:
        return self.start + self.param.numel()


class Engine(Protocol):
    """The interface for the trainer. Every method is a collective: all ranks call it together."""

    device: torch.device
    optimizer_steps: int  # updates applied so far: the trainer's steps without the skipped ones

    @property
    def model(self) -> nn.Module:
        """Call the module itself, not its methods: only `__call__` runs the engine's hooks."""
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate the gradient of one micro-batch.

        Args:
            loss: divided by the number of gradient accumulation steps.
            last: whether this is the last micro-batch of the optimizer step.
        """
        ...

    def step(self, lr: float) -> StepResult:
        """Average gradients over ranks, clip, update, clear. All ranks skip a step whose norm is not finite."""
        ...

    def fragments(self) -> list[Fragment]:
        """This rank's fragments, in the order of the model's parameters; the same objects on every call."""
        ...

    def replicas(self) -> Replicas:
        """The parameters that are replicated on other ranks: their copies must have the same bits."""
        ...

    def set_optimizer_steps(self, steps: int) -> None:
        """Set `optimizer_steps` and Adam's own count, for a resumed run."""
        ...

    def after_load(self) -> None:
        """Copy the fragments, which the caller has changed, to the weights that forward uses."""
        ...

    def describe(self) -> dict[str, Any]:
        """Plain data for the log and environment.json."""
        ...

    def close(self) -> None:
        """Free the engine's memory; it cannot be used afterwards."""
        ...


def ensure_group() -> None:
    """Start a process group of one process if no launcher started one: DeepSpeed and FSDP2 need a group.

    Raises:
        ValueError: if a launcher started several processes, and the process group is missing.
    """
    if dist.is_initialized():
        return
    if distributed.launched():
        raise ValueError(
            "a launcher set WORLD_SIZE and RANK; call sfd_scale.runtime.distributed.init() before making an engine"
        )
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=0, world_size=1)


def check_same_weights(model: nn.Module) -> None:
    """Refuse different weights on different ranks: FSDP2 would silently mix the shards of several models.

    Raises:
        ValueError: on all ranks.
    """
    if distributed.world_size() == 1:
        return
    # Integer sums of the bits are exact in any order, unlike sums of floats.
    digest = 0
    for index, param in enumerate(model.parameters()):
        bits = param.detach().float().contiguous().view(torch.int32)
        digest += (2 * index + 1) * int(bits.sum(dtype=torch.int64))
    if len(set(distributed.all_gather_object(digest))) > 1:
        raise ValueError("initial weights differ between ranks; draw them from the same seed on all ranks")


def check_fragments(fragments: Sequence[Fragment], shapes: dict[str, tuple[int, ...]]) -> None:
    """Start-up self-check: the fragments of all ranks cover every parameter exactly once.

    It catches a DeepSpeed release with another memory layout of ZeRO. For FSDP2 it holds by construction.

    Raises:
        RuntimeError: naming the parameter.
    """
    local = [(f.name, f.start, f.stop) for f in fragments if f.primary]
    ranges: dict[str, list[tuple[int, int]]] = {name: [] for name in shapes}
    for name, start, stop in (part for parts in distributed.all_gather_object(local) for part in parts):
        ranges[name].append((start, stop))
    for name, shape in shapes.items():
        covered = 0
        for start, stop in sorted(ranges[name]):
            if start != covered:
                break
            covered = stop
        if covered != math.prod(shape):
            raise RuntimeError(
                f"engine self-check: the ranks have the ranges {sorted(ranges[name])} of {name}, which has "
                f"{math.prod(shape)} elements; this DeepSpeed or PyTorch release has another memory layout: install "
                "the releases of requirements.lock"
            )


def describe_fragments(fragments: Sequence[Fragment]) -> dict[str, Any]:
    """The part of `Engine.describe` that both engines share."""
    return {
        "world_size": distributed.world_size(),
        "local_elements": sum(f.param.numel() for f in fragments),
        "fragments": len(fragments),
    }
