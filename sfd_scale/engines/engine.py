"""What the trainer asks of an engine, and what the engines share.

An engine owns the sharded model, its gradients and its optimizer. The trainer owns everything else. Both engines show
their local fp32 state as *fragments*: ZeRO's flat partitions and FSDP2's row shards are all one contiguous range of a
parameter read row by row, so that EMA and checkpoints need to know nothing more about either.
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
    """What every engine is told."""

    precision: Literal["bf16", "fp32"] = "bf16"  # of forward and backward; weights, moments and norms are always fp32
    grad_clip: float | None = None  # largest global gradient norm
    activation_checkpointing: Checkpointing = "none"
    compile: bool = False  # torch.compile of each block

    def __post_init__(self) -> None:
        if self.grad_clip is not None and not 0 < self.grad_clip < math.inf:
            raise ValueError(f"grad_clip: {self.grad_clip}; allowed: above 0, or null for no clipping")


@dataclass(frozen=True)
class StepResult:
    """Outcome of an optimizer step: the global gradient norm before clipping, and whether the step was taken."""

    grad_norm: float
    applied: bool


@dataclass(frozen=True)
class Fragment:
    """The part of one parameter that this rank updates: elements [start, start + n) of it, read row by row.

    The tensors are 1-D fp32 views, (n,), of the engine's own memory: writing to them writes to the engine, which is
    told so by `Engine.after_load`. `exp_avg` and `exp_avg_sq` are Adam's moments.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    primary: bool  # False where another rank holds the same range and is the one to save it

    @property
    def stop(self) -> int:
        return self.start + self.param.numel()


class Engine(Protocol):
    """A few verbs; every one is called by all ranks together."""

    device: torch.device
    optimizer_steps: int  # updates applied so far: with skipped steps, fewer than the trainer's steps

    @property
    def model(self) -> nn.Module:
        """Call it for the forward pass; never a method of it, which would pass the engine's hooks by."""
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of `loss`, already divided by the accumulation; `last` of the optimizer step or not."""
        ...

    def step(self, lr: float) -> StepResult:
        """Average over ranks, clip, update, clear. A gradient norm that is not finite drops the step on all ranks."""
        ...

    def fragments(self) -> list[Fragment]:
        """This rank's fragments, in the order of the model's parameters; the same objects on every call."""
        ...

    def replicas(self) -> Replicas:
        """The parameters of which other ranks hold copies that must have the same bits."""
        ...

    def set_optimizer_steps(self, steps: int) -> None: ...

    def after_load(self) -> None:
        """Bring the weights that forward uses in line with the fragments."""
        ...

    def describe(self) -> dict[str, Any]:
        """Plain facts for logs and environment.json."""
        ...

    def close(self) -> None: ...


def ensure_group() -> None:
    """A process group of this process alone, where no launcher started one: both libraries need some group."""
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
    """Every rank must bring the same weights: FSDP2 would otherwise join shards of different models in silence."""
    if distributed.world_size() == 1:
        return
    # A sum of the bits as integers: exact in any order, so equal weights never differ by rounding.
    digest = 0
    for index, param in enumerate(model.parameters()):
        bits = param.detach().float().contiguous().view(torch.int32)
        digest += (2 * index + 1) * int(bits.sum(dtype=torch.int64))
    if len(set(distributed.all_gather_object(digest))) > 1:
        raise ValueError("the ranks brought different initial weights; draw them from the same seed")


def check_fragments(fragments: Sequence[Fragment], shapes: dict[str, tuple[int, ...]]) -> None:
    """Start-up self-check: the fragments of all ranks cover every parameter exactly once.

    It holds by construction for FSDP2; for ZeRO it guards against a new memory layout in another DeepSpeed release.
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
                f"engine self-check: the ranks hold the ranges {sorted(ranges[name])} of {name}, which has "
                f"{math.prod(shape)} elements; this release of the engine's library lays its state out differently"
            )


def describe_fragments(fragments: Sequence[Fragment]) -> dict[str, Any]:
    return {
        "world_size": distributed.world_size(),
        "local_elements": sum(f.param.numel() for f in fragments),
        "fragments": len(fragments),
    }
