"""What the parts of the GPU benchmark share: sizes and batches, models on the device, rates."""

from __future__ import annotations

import gc
import inspect
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from benchmarks import harness
from benchmarks.harness import Figure
from benchmarks.peer import NULL_LABEL
from benchmarks.train_step import LAYOUT, randomize
from sfd_scale.engines import fsdp
from sfd_scale.engines.fsdp import FSDPConfig
from sfd_scale.runtime.device import synchronize

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Workload:
    """Sizes and batches. On the CPU: size S with few blocks, to try the code.

    depth: number of blocks, if not that of the size. check_depth: of the models that are compared.
    micro_batches, sampling_batches: the most telling first.
    steps: training steps that are compared.
    """

    device: torch.device
    size: str
    guide: str
    depth: int | None
    check_depth: int
    precision: Literal["bf16", "fp32"]
    micro_batches: tuple[int, ...]
    check_batch: int
    sampling_batches: tuple[int, ...]
    steps: int
    repeats: int

    @property
    def name(self) -> str:
        return f"{self.size}/1"

    def engine(self, **settings: Any) -> FSDPConfig:
        """One rank under FSDP2, in the precision of the workload."""
        return FSDPConfig(sharding="replicate", **{"precision": self.precision, **settings})


def workload(device: torch.device, quick: bool = False) -> Workload:
    if device.type == "cuda":
        return Workload(
            device, "XXL", "B", None, 4, "bf16", micro_batches=(32, 64, 128), check_batch=16,
            sampling_batches=(64, 256), steps=20, repeats=3,
        )  # fmt: skip
    # In float32: not every CPU has fast instructions for bf16.
    return Workload(
        device, "S", "S", 1 if quick else 2, 1 if quick else 2, "fp32", micro_batches=(1,) if quick else (2, 4),
        check_batch=1 if quick else 2, sampling_batches=(1,) if quick else (2,), steps=2 if quick else 3, repeats=1,
    )  # fmt: skip


def on(device: torch.device, make: Callable[[], M]) -> M:
    """A model with small random weights, made on the device."""
    with device:
        model = make()
    randomize(model)
    return model


def start(device: torch.device, count: int) -> tuple[Tensor, Tensor]:
    """Noise and labels of `count` images."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(count, *LAYOUT.shape, generator=generator)
    return noise.to(device), torch.randint(NULL_LABEL, (count,), generator=generator).to(device)


@dataclass(frozen=True)
class Rate:
    """Units/s, and the peak of the allocated memory on a GPU in GiB."""

    value: float
    memory_gib: float | None


def measure(chosen: Workload, work: float, make: Callable[[], Callable[[], object]]) -> Rate:
    """Median rate of the function that `make` returns, with `work` units per call."""
    fresh(chosen.device)
    seconds = harness.race({"it": make()}, chosen.repeats, warmup=2, synchronize=lambda: synchronize(chosen.device))
    return Rate(work / statistics.median(seconds["it"]), peak_gib(chosen.device))


def fresh(device: torch.device) -> None:
    """Free memory, and forget compiled code: other shapes would switch later code to dynamic shapes."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def figure(
    what: str, rate: Rate, peer: Rate | None, unit: str, note: str = "", against: str = "official arithmetic"
) -> Figure:
    """The figure of two rates. Without a peer, the peer's value is unknown."""
    memory = "" if rate.memory_gib is None else f", {rate.memory_gib:.1f} GiB"
    theirs = math.nan if peer is None else peer.value
    return harness.measured(
        f"{what}{note}{memory}", ours=rate.value, peer=theirs, against=against, unit=unit, better="higher"
    )


def compare(mine: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """‖mine - reference‖ / ‖reference‖ over all tensors together."""
    squares = [(mine[name].double() - value.double()).square().sum() for name, value in reference.items()]
    norms = [value.double().square().sum() for value in reference.values()]
    return math.sqrt(float(sum(squares)) / float(sum(norms)))


def missing(names: Sequence[str]) -> str | None:
    """Why something that needs these packages cannot run, or None."""
    absent = [name for name in names if not _installed(name)]
    return f"needs {', '.join(absent)}" if absent else None


def _installed(name: str) -> bool:
    import importlib.util

    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # a stand-in without a spec
        return False


def support_older_torch() -> str | None:
    """Let the engine run under PyTorch before 2.15, whose FSDP2 has no types of single parameters.

    Returns:
        A sentence about the difference, or None under a newer PyTorch.
    """
    if "param_dtype_override_fn" in inspect.signature(MixedPrecisionPolicy).parameters:
        return None

    def without_override(*, param_dtype_override_fn: object, **settings: Any) -> MixedPrecisionPolicy:
        return MixedPrecisionPolicy(**settings)

    vars(fsdp)["MixedPrecisionPolicy"] = without_override
    return f"torch {torch.__version__}: forward has weights of norms and label rows in bf16; 2.15 keeps them in float32"
