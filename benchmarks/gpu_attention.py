"""Time every attention kernel of a GPU at the shapes of SFD, and order `attention: auto` by the times.

`python -m benchmarks.gpu_attention` prints error and time of each kernel and writes the times into
sfd_scale/models/attention_speed.json. Needs torch and numpy alone. `--device cpu` tries the code and writes nothing.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from sfd_scale.models import attention, attention_speed
from sfd_scale.models.attention import AttentionBackend
from sfd_scale.runtime.device import synchronize
from sfd_scale.runtime.matmul import bf16_matmul_on_cpu

# Tokens, heads and features per head: of XXL, and of XL.
SHAPES = ((256, 24, 64), (256, 16, 72))
TOLERANCE = 2e-2


@dataclass(frozen=True)
class Timed:
    """A kernel at one shape. kernel: the operator that ran. milliseconds: of forward and backward, the median."""

    backend: str
    head_dim: int
    kernel: str
    error: float
    milliseconds: float


def kernels(device: torch.device, batch: int, repeats: int = 20) -> Iterator[Timed | str]:
    """Each kernel at each shape, as soon as it is timed; or a sentence about why it cannot run."""
    backends: list[AttentionBackend] = [name for name in get_args(AttentionBackend) if name != "auto"]
    for tokens, heads, head_dim in SHAPES:
        for backend in backends:
            try:
                attention.activate(backend, device, (head_dim,))
            except ValueError as refused:
                yield f"head dim {head_dim}: {refused}"
                continue
            try:
                kernel = attention.kernel_name(device, torch.bfloat16, head_dim)
                error = attention_error(device, head_dim)
                times = _times(device, (batch, tokens, heads, head_dim), repeats)
            except Exception as problem:  # noqa: BLE001 (a kernel may load and fail to run; the others go on)
                kernel, error, times = f"{type(problem).__name__}: {problem}", math.inf, [math.nan]
            yield Timed(backend, head_dim, kernel, error, statistics.median(times))
    attention.activate("auto", device)


def _times(device: torch.device, shape: tuple[int, int, int, int], repeats: int) -> list[float]:
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    upstream, times = torch.randn(shape, device=device, dtype=torch.bfloat16), []
    with bf16_matmul_on_cpu(device):
        for number in range(repeats + 3):
            synchronize(device)
            started = time.perf_counter()
            attention.attend(q, k, v).backward(upstream)
            synchronize(device)
            if number >= 3:
                times.append(1000 * (time.perf_counter() - started))
    return times


def attention_error(device: torch.device, head_dim: int) -> float:
    """Largest error of output and gradients of bf16 attention, each relative to the largest value."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, upstream = (torch.randn(2, 256, 4, head_dim, generator=generator).bfloat16().to(device) for _ in range(4))
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


def measure(device: torch.device, batch: int, repeats: int = 20) -> list[Timed]:
    """Time all kernels, print each, and on a GPU record the times of those that are right."""
    found: list[Timed] = []
    for timed in kernels(device, batch, repeats):
        if isinstance(timed, str):
            print(timed, flush=True)
            continue
        found.append(timed)
        verdict = "ok" if timed.error <= TOLERANCE else "FAILED"
        print(
            f"head dim {timed.head_dim}, {timed.backend}: {timed.milliseconds:.3f} ms forward and backward, "
            f"{timed.kernel}, worst error {timed.error:.1e}: {verdict}",
            flush=True,
        )
    times: attention_speed.Milliseconds = {}
    for timed in found:
        if timed.error <= TOLERANCE and timed.backend != "math":
            times.setdefault(str(timed.head_dim), {})[timed.backend] = round(timed.milliseconds, 4)
    if device.type == "cuda":
        attention_speed.record(torch.cuda.get_device_name(device), times)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 if a kernel's error is too large."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=get_args(Literal["cuda", "cpu"]))
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; give --device cpu to try the code")
    found = measure(device, 32 if device.type == "cuda" else 1, 20 if device.type == "cuda" else 1)
    return 1 if any(timed.error > TOLERANCE for timed in found) else 0


if __name__ == "__main__":
    sys.exit(main())
