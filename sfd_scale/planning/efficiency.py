"""The constants of the time model: shares of the maker's figures that kernels reach, and times of the host.

Each constant has a source. `benchmarks/plan_check.py` compares the model with public measurements.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

Source = Literal["measured here", "measured elsewhere", "maker's", "assumed", "given"]


@dataclass(frozen=True)
class Quantity:
    """A number with its origin; `reference` names the command, the paper or the reason."""

    value: float
    unit: str
    source: Source
    reference: str


def _share(value: float, source: Source, reference: str) -> Quantity:
    return Quantity(value, "", source, reference)


_FITTED = "fitted to half of the runs of benchmarks/plan_check.py"
_COUNTED = "counted on the CPU at depth 24, divided by the speed of a server core"


@dataclass(frozen=True)
class Efficiency:
    """Constants of the time model.

    matmul: reached share of the peak for large matmuls. memory: reached share of the bandwidth of GPU memory.
    attention: reached share of the peak for long sequences; at `attention_half` tokens it is half of that.
    fused_bytes, fused_launches: of the elementwise operations of a block, what torch.compile leaves.
    link: of NVLink and the network. near_latency, far_latency: of one hop of a ring within and between nodes.
    contention: of the time of overlapped communication, by how much it slows the computation.
    launch: host time of one kernel. hook_*: host time of an engine for each block and micro-batch. hook_unit: the share
        of FSDP2's that is spent once for each unit of blocks. hook_flat: the share that flat parameters leave.
    step_launches: kernels of the objective and the optimizer's bookkeeping, each micro-batch.
    draw: host time of the random numbers of one sample. read: of reading it, without worker processes.
    kernel: shortest time of a kernel on the GPU.
    """

    matmul: Quantity = _share(0.60, "measured elsewhere", _FITTED)
    memory: Quantity = _share(0.60, "measured elsewhere", _FITTED)
    attention: Quantity = _share(0.40, "measured elsewhere", "FlashAttention-2 on H100 (arXiv 2407.08608, fig. 5)")
    attention_half: Quantity = Quantity(256, "tokens", "assumed", "half of the rate of long sequences at 256 tokens")
    fused_bytes: Quantity = _share(0.189, "measured here", "2.47 of 13.08 GB a block of XXL, by inductor for sm_90")
    fused_launches: Quantity = _share(0.18, "measured here", "32 of 179 launches a block of XXL, by inductor for sm_90")
    link: Quantity = _share(0.80, "measured elsewhere", "NCCL's bus bandwidth on H100: about 360 of 450 GB/s")
    near_latency: Quantity = Quantity(2e-6, "s", "assumed", "one hop of NCCL's ring by NVLink")
    far_latency: Quantity = Quantity(8e-6, "s", "assumed", "one hop of NCCL's ring by InfiniBand")
    collective: Quantity = Quantity(20e-6, "s", "assumed", "start of one collective")
    contention: Quantity = _share(0.15, "assumed", "NCCL's kernels take 16 to 24 of 132 processors")
    kernel: Quantity = Quantity(2e-6, "s", "assumed", "shortest kernel on an H100")
    launch: Quantity = Quantity(15e-6, "s", "measured here", _COUNTED + ": 37 µs a kernel")
    hook_fsdp: Quantity = Quantity(0.87e-3, "s", "measured here", _COUNTED + ": 95 - 41 ms over 25 units")
    hook_reshard: Quantity = Quantity(0.40e-3, "s", "measured here", _COUNTED + ": 120 - 95 ms over 25 units")
    hook_unit: Quantity = _share(0.46, "measured here", "129, 111 and 94 ms at 25, 13 and 7 units; 26 without engine")
    hook_flat: Quantity = _share(0.89, "measured here", "54 of 61 ms of FSDP2, 49 of 55 of ZeRO-1, in one run")
    hook_zero1: Quantity = Quantity(0.51e-3, "s", "measured here", _COUNTED + ": 73 - 41 ms over 25 units")
    hook_zero2: Quantity = Quantity(0.56e-3, "s", "measured here", _COUNTED + ": 76 - 41 ms over 25 units")
    hook_zero3: Quantity = Quantity(3e-3, "s", "assumed", "more than twice FSDP2's: Python hooks at each submodule")
    step_launches: Quantity = Quantity(150, "launches", "assumed", "objective, norm, learning rate, EMA")
    draw: Quantity = Quantity(34e-6, "s", "measured here", "84 µs a sample on the CPU, divided by the server's speed")
    read: Quantity = Quantity(35e-6, "s", "measured here", "benchmarks/loader.py: latents with features, divided so")
    host_memory: Quantity = Quantity(20e9, "bytes/s", "assumed", "of one rank's share of the host's memory bandwidth")
    disk: Quantity = Quantity(2e9, "bytes/s", "assumed", "of one rank's part of a checkpoint, without `background`")
    restart: Quantity = Quantity(600, "s", "assumed", "to notice a failed node, requeue and load")

    def rows(self) -> list[tuple[str, Quantity]]:
        return [(field.name, getattr(self, field.name)) for field in fields(self)]
