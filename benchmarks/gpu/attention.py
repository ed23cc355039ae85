"""Part 2: every attention kernel at the shapes of SFD: error, time, and the kernel that ran.

On a GPU the times order `attention: auto`: they are written into sfd_scale/models/attention_speed.json.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.report import Part
from benchmarks.gpu.workload import Workload
from sfd_scale.models import attention, attention_speed
from sfd_scale.models.attention import AttentionBackend
from sfd_scale.runtime.matmul import bf16_matmul_on_cpu

# Tokens, heads and features per head: of XXL, and of XL.
SHAPES = ((256, 24, 64), (256, 16, 72))
TOLERANCE = 2e-2
_HEAD_START = 5_000_000  # cycles, about 3 ms, in which the host launches what is timed


@dataclass(frozen=True)
class Timed:
    """A backend at one shape. kernel: what ran. milliseconds: of forward and backward, the median."""

    backend: str
    head_dim: int
    kernel: str
    error: float
    milliseconds: float


def run(part: Part, chosen: Workload) -> None:
    device = chosen.device
    batch = 32 if device.type == "cuda" else 1
    found: list[Timed] = []
    for shape in SHAPES:
        for backend in get_args(AttentionBackend):
            if backend != "auto":
                what = f"attention {backend}, ({batch}, {', '.join(map(str, shape))})"
                work = functools.partial(_one, part, what, backend, chosen, (batch, *shape))
                timed = part.run(what, work)
                found += [] if timed is None else [timed]
    attention.activate("auto", device)
    if device.type == "cuda":
        record(torch.cuda.get_device_name(device), found)


def record(gpu: str, found: list[Timed]) -> None:
    """Write the times of the right kernels into the table of `attention: auto`."""
    times: attention_speed.Milliseconds = {}
    for timed in found:
        if timed.error <= TOLERANCE and timed.backend != "math":
            times.setdefault(str(timed.head_dim), {})[timed.backend] = round(timed.milliseconds, 4)
    if times:
        attention_speed.record(gpu, times)


def _one(
    part: Part, what: str, backend: AttentionBackend, chosen: Workload, shape: tuple[int, int, int, int]
) -> Timed | None:
    device, head_dim = chosen.device, shape[-1]
    dtype, repeats = (torch.bfloat16, 20) if chosen.precision == "bf16" else (torch.float32, 1)
    try:
        attention.activate(backend, device, (head_dim,))
    except ValueError as refused:
        part.leave_out(what, str(refused))
        return None
    error = attention_error(device, head_dim, dtype)
    kernel = attention.kernel_name(device, dtype, head_dim)
    kernel += "".join(f"; {name}" for name in _gpu_kernels(device, shape))
    timed = Timed(backend, head_dim, kernel, error, statistics.median(_times(device, shape, dtype, repeats)))
    part.check(what, error, TOLERANCE)
    part.fact(f"{what}, forward and backward, ms", timed.milliseconds, f"{timed.milliseconds:.3f} by {kernel}")
    return timed


def _inputs(device: torch.device, shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]


def _step(inputs: list[torch.Tensor], upstream: torch.Tensor) -> None:
    torch.autograd.grad(attention.attend(inputs[0], inputs[1], inputs[2]), inputs, upstream)


def _times(device: torch.device, shape: tuple[int, int, int, int], dtype: torch.dtype, repeats: int) -> list[float]:
    """Milliseconds of forward and backward: of the device alone on a GPU, whose host launches them in advance."""
    inputs = _inputs(device, shape, dtype)
    upstream, times = torch.randn(shape, device=device, dtype=dtype), []
    with bf16_matmul_on_cpu(device):
        for number in range(repeats + 3):
            if device.type == "cuda":
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(_HEAD_START)
                first.record()
                _step(inputs, upstream)
                last.record()
                last.synchronize()
                taken = first.elapsed_time(last)
            else:
                started = time.perf_counter()
                _step(inputs, upstream)
                taken = 1000 * (time.perf_counter() - started)
            times += [taken] if number >= 3 else []
    return times


def _gpu_kernels(device: torch.device, shape: tuple[int, int, int, int]) -> Iterator[str]:
    """The names of the GPU's kernels in forward and backward."""
    if device.type != "cuda":
        return
    inputs, upstream = _inputs(device, shape, torch.bfloat16), torch.randn(shape, device=device, dtype=torch.bfloat16)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        _step(inputs, upstream)
        torch.cuda.synchronize(device)
    names = [event.name for event in profiled.events() if event.device_type.name == "CUDA"]
    for name in dict.fromkeys(names):
        if any(word in name.lower() for word in ("attention", "flash", "fmha", "sdpa", "softmax")):
            yield name[:80]


def attention_error(device: torch.device, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> float:
    """Largest error of output and gradients of attention, each relative to the largest value."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, upstream = (torch.randn(2, 256, 4, head_dim, generator=generator).to(device, dtype) for _ in range(4))
    mine = [t.clone().requires_grad_() for t in (q, k, v)]
    with bf16_matmul_on_cpu(device):
        out = attention.attend(mine[0], mine[1], mine[2])
        out.backward(upstream)
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    queries, keys, values = (t.transpose(1, 2) for t in exact)
    scores = (queries @ keys.transpose(-2, -1)) / math.sqrt(head_dim)
    reference = (scores.softmax(-1) @ values).transpose(1, 2)
    reference.backward(upstream.double())
    pairs = [(out.detach(), reference.detach()), *((a.grad, b.grad) for a, b in zip(mine, exact, strict=True))]
    return max(relative_error(a, b) for a, b in pairs)


def relative_error(value: object, reference: object) -> float:
    """The largest difference of two tensors, relative to the largest value."""
    assert isinstance(value, torch.Tensor) and isinstance(reference, torch.Tensor)
    return float((value.double() - reference.double()).abs().max() / reference.double().abs().max())
