"""What a device can do: its peak throughput, bf16 where a CPU is slow at it; values on their way back."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# FLOP/s, dense bf16 without sparsity, from the makers' data sheets. The first name in the device's own counts.
_PEAK = {
    "B200": 2.25e15,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A6000": 155e12,
    "4090": 165e12,
}


def peak_flops(device: torch.device) -> float:
    """FLOP/s of a device in dense bf16; infinite where the table does not know it, so that no MFU is made up."""
    if device.type != "cuda":
        return math.inf
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float:
    """FLOP/s by the name that a GPU gives itself; infinite for one that the table does not know."""
    return next((peak for key, peak in _PEAK.items() if key in name), math.inf)


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of several products of square matrices, as a peak for devices that the table does not know."""
    size, repeats = (8192, 10) if device.type == "cuda" else (768, 10)
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    best = math.inf
    with bf16_products(device):
        for _ in range(repeats):
            _wait(device)
            started = time.perf_counter()
            torch.mm(left, right)
            _wait(device)
            best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best


class HostCopy:
    """A scalar on its way to the host: `item` waits for this copy, not for what the device was given after it."""

    def __init__(self, value: Tensor) -> None:
        self._value, self._copied = value.detach(), None
        if value.device.type == "cuda":
            self._value = torch.empty((), dtype=value.dtype, pin_memory=True).copy_(self._value, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def item(self) -> float:
        if self._copied is not None:
            self._copied.synchronize()
        return self._value.item()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Every operation of the project that multiplies matrices.
_PRODUCTS = frozenset({
    functional.linear, functional.conv2d, functional.scaled_dot_product_attention,
    torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum,
    Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm,
})  # fmt: skip


class Float32Products(TorchFunctionMode):
    """Products of bf16 matrices on the CPU in float32, rounded once at the end, forward and backward.

    It is what a bf16 unit with float32 sums computes. PyTorch's own kernels for CPUs without bf16 instructions are
    exact too but take scalar code: 1.3 GFLOP/s where float32 reaches 65 (one core, AVX2). See `fast_bf16` for others.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS or not any(_is_cpu_bf16(a) for a in (*args, *kwargs.values())):
            return func(*args, **kwargs)
        out = func(*map(_widened, args), **{name: _widened(value) for name, value in kwargs.items()})
        return out.bfloat16()


def _is_cpu_bf16(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16 and value.device.type == "cpu"


def _widened(value: Any) -> Any:
    return value.float() if _is_cpu_bf16(value) else value


def has_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16 products."""
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def fast_bf16(device: torch.device) -> bool:
    """Whether bf16 products run at least as fast as float32 ones.

    On a CPU with AVX-512's bf16 instructions and no matrix unit they do not: 70 GFLOP/s on a core where float32 has 120
    and `Float32Products` 102 (measured on a Xeon by (2048, 384) x (384, 1152)).
    """
    return bool(torch.cpu._is_amx_tile_supported()) if device.type == "cpu" else has_bf16(device)


def ieee_float32() -> contextlib.AbstractContextManager[None]:
    """Products and convolutions of float32 without TF32, which PyTorch takes for convolutions on GPUs by default."""
    return _float32("ieee")


def tf32_float32() -> contextlib.AbstractContextManager[None]:
    """Products and convolutions of float32 on a GPU's tensor cores, which read 10 bits of each mantissa."""
    return _float32("tf32")


@contextlib.contextmanager
def _float32(form: Literal["ieee", "tf32"]) -> Iterator[None]:
    """For the whole process, all its threads."""
    cudnn: Any = torch.backends.cudnn
    backends = (cudnn.conv, torch.backends.cuda.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = form
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value


def same_products() -> contextlib.AbstractContextManager[Any]:
    """What makes products elsewhere take the way that they take here: autograd calls back without function modes."""
    modes = torch.overrides._get_current_function_mode_stack()
    return Float32Products() if any(isinstance(mode, Float32Products) for mode in modes) else contextlib.nullcontext()


@contextlib.contextmanager
def bf16_products(device: torch.device) -> Iterator[None]:
    """Within it, bf16 products take the fastest exact way that the device has."""
    with contextlib.nullcontext() if device.type != "cpu" or fast_bf16(device) else Float32Products():
        yield
