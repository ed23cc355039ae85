"""Part 1: driver and versions, the sustained rate of a large matmul, and the bandwidth of copies."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable

import torch

from benchmarks import harness
from benchmarks.gpu.report import Part
from benchmarks.gpu.workload import Workload
from sfd_scale.planning.measured import SUSTAINED_COPY, SUSTAINED_MATMUL
from sfd_scale.runtime.device import peak_flops, synchronize

TO_DEVICE = "copy from pinned memory to the GPU, bytes/s"


def run(part: Part, chosen: Workload) -> None:
    part.fact("versions", harness.versions())
    part.run("driver", lambda: part.fact("driver", driver(chosen.device)))
    part.run(SUSTAINED_MATMUL, lambda: _matmul(part, chosen.device))
    part.run(SUSTAINED_COPY, lambda: _copy(part, chosen.device))
    if chosen.device.type == "cuda":
        part.run(TO_DEVICE, lambda: _to_device(part, chosen.device))


def driver(device: torch.device) -> str:
    """Name, driver, memory, clocks and power limit of the GPU, as nvidia-smi prints them."""
    if device.type != "cuda":
        return "no GPU"
    fields = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    cuda = f"CUDA of torch {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{torch.cuda.get_device_name(device)}, {cuda}; nvidia-smi: {type(error).__name__}"
    return f"{done.stdout.strip()}; {cuda}"


def seconds_per_call(work: Callable[[], object], device: torch.device, calls: int, rounds: int = 5) -> float:
    """The median over rounds of several calls each, without a wait between the calls of a round."""
    for _ in range(3):
        work()
    times = []
    for _ in range(rounds):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize(device)
        times.append((time.perf_counter() - started) / calls)
    return statistics.median(times)


def _matmul(part: Part, device: torch.device) -> None:
    """Random numbers: a GPU draws less power for zeros, and is faster then."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    rate = 2 * size**3 / seconds_per_call(lambda: torch.mm(left, right, out=out), device, 20)
    share = rate / peak_flops(device)
    part.fact(
        SUSTAINED_MATMUL,
        rate,
        f"{rate / 1e12:.4g} TFLOP/s for {size}³" + (f", {share:.1%} of the peak" if share else ""),
    )


def _copy(part: Part, device: torch.device) -> None:
    source = torch.ones(2**30 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    rate = moved / seconds_per_call(lambda: target.copy_(source), device, 5)
    part.fact(SUSTAINED_COPY, rate, f"{rate / 1e9:.4g} GB/s, read and written")


def _to_device(part: Part, device: torch.device) -> None:
    source = torch.ones(2**26, pin_memory=True)
    target = torch.empty_like(source, device=device)
    moved = source.numel() * source.element_size()
    rate = moved / seconds_per_call(lambda: target.copy_(source, non_blocking=True), device, 5)
    part.fact(TO_DEVICE, rate, f"{rate / 1e9:.4g} GB/s")
