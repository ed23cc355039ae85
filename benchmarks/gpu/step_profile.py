"""Part 5: a profile of three training steps: kernels by group, idle gaps, and how far the host is ahead."""

from __future__ import annotations

import functools
import json
import math
import statistics
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.report import Part
from benchmarks.gpu.workload import Workload, fresh
from benchmarks.train_step import our_step
from sfd_scale.models import attention

STEPS = 3
# The first group with a word of a kernel's name counts.
GROUPS = {
    "compiled elementwise": ("triton",),
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "matmul": ("gemm", "nvjet", "cutlass", "cublas", "splitk"),
    "optimizer and EMA": ("multi_tensor", "adam", "lerp", "foreach"),
    "communication": ("nccl",),
    "copies": ("memcpy", "memset", "copy", "cat"),
}
OTHER = "other elementwise"


@dataclass(frozen=True)
class Summary:
    """Times in seconds. span: from the first kernel to the end of the last. busy: in which a kernel ran.

    groups: of each group of kernels. ahead: of each kernel, from its launch to its start, the median and the least.
    """

    span: float
    busy: float
    kernels: int
    groups: dict[str, float]
    ahead_median: float
    ahead_least: float

    @property
    def idle(self) -> float:
        return 1 - self.busy / self.span


def run(part: Part, chosen: Workload) -> None:
    if chosen.device.type != "cuda":
        part.leave_out("profile", "a CPU has no kernels that wait for their launch")
        return
    attention.activate("auto", chosen.device)
    count = chosen.micro_batches[0]
    for label, compiled in (("compiled", True), ("eager", False)):
        what = f"{chosen.name} micro-batch {count}, {label}"
        found = part.run(f"profile of {what}", functools.partial(_profiled, chosen, count, compiled))
        if found is not None:
            _report(part, what, found)


def _report(part: Part, what: str, found: Summary) -> None:
    step = 1000 / STEPS
    for name, seconds in sorted(found.groups.items(), key=lambda entry: -entry[1]):
        part.fact(f"{what}, {name}, ms a step", seconds * step, f"{seconds * step:.2f}")
    part.fact(f"{what}, kernels a step", found.kernels / STEPS)
    part.fact(f"{what}, idle share of the GPU", found.idle, f"{found.idle:.1%} of {found.span * step:.1f} ms a step")
    ahead = (found.ahead_median, found.ahead_least)
    text = "median {:.2f}, least {:.3f}".format(*(1000 * value for value in ahead))
    part.fact(f"{what}, launch before start, ms", [1000 * value for value in ahead], text)


def _profiled(chosen: Workload, count: int, compiled: bool) -> Summary:
    fresh(chosen.device)
    step = our_step(chosen.size, count, chosen.engine(compile=compiled), chosen.depth, read_ahead=True)
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiled.export_chrome_trace(str(path))
        return summary(json.loads(path.read_text(encoding="utf-8"))["traceEvents"])


def summary(events: Iterable[Mapping[str, Any]]) -> Summary:
    """The summary of a trace in Chrome's format, as torch.profiler exports it: times are in µs.

    Raises:
        ValueError: if the trace has no kernels.
    """
    kernels, launches = [], dict[int, float]()
    for event in events:
        kind = event.get("cat")
        if kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            kernels.append(event)
        elif kind in ("cuda_runtime", "cuda_driver"):
            launches[event.get("args", {}).get("correlation", -1)] = event["ts"]
    if not kernels:
        raise ValueError("the profiler recorded no kernels; its access to the GPU's counters may be restricted")
    kernels.sort(key=lambda event: event["ts"])
    groups = dict[str, float]()
    busy, end = 0.0, kernels[0]["ts"]
    for event in kernels:
        groups[group(event["name"])] = groups.get(group(event["name"]), 0.0) + event["dur"] / 1e6
        stop = event["ts"] + event["dur"]
        busy += max(0.0, stop - max(end, event["ts"]))
        end = max(end, stop)
    numbers = ((event, event.get("args", {}).get("correlation")) for event in kernels)
    ahead = [event["ts"] - launches[number] for event, number in numbers if number in launches] or [math.nan]
    span = end - kernels[0]["ts"]
    return Summary(span / 1e6, busy / 1e6, len(kernels), groups, statistics.median(ahead) / 1e6, min(ahead) / 1e6)


def group(kernel: str) -> str:
    """The group of a kernel by its name."""
    name = kernel.lower()
    return next((label for label, words in GROUPS.items() if any(word in name for word in words)), OTHER)
