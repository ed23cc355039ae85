"""How matrices are multiplied: TF32 or not, and bf16 on CPUs without fast bf16."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sfd_scale.runtime.device import fast_bf16, synchronize


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of several products of square matrices, as a peak for devices that the table does not know."""
    size, repeats = (8192, 10) if device.type == "cuda" else (768, 10)
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    best = math.inf
    with bf16_matmul_on_cpu(device):
        for _ in range(repeats):
            synchronize(device)
            started = time.perf_counter()
            torch.mm(left, right)
            synchronize(device)
            best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best


# Every operation of the project that multiplies matrices.
_MATMULS = frozenset({
    functional.linear, functional.conv2d, functional.scaled_dot_product_attention,
    torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum,
    Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm,
})  # fmt: skip


class MatmulInFloat32(TorchFunctionMode):
    """Products of bf16 matrices on the CPU in float32, rounded once at the end, forward and backward.

    It is what a bf16 unit with float32 sums computes. PyTorch's own kernels for CPUs without bf16 instructions are
    exact too but take scalar code: 1.3 GFLOP/s where float32 reaches 65 (one core, AVX2). See `fast_bf16` for others.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _MATMULS or not any(_is_cpu_bf16(a) for a in (*args, *kwargs.values())):
            return func(*args, **kwargs)
        out = func(*map(_widened, args), **{name: _widened(value) for name, value in kwargs.items()})
        return out.bfloat16()


def _is_cpu_bf16(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16 and value.device.type == "cpu"


def _widened(value: Any) -> Any:
    return value.float() if _is_cpu_bf16(value) else value


def no_tf32() -> contextlib.AbstractContextManager[None]:
    """Products and convolutions of float32 without TF32, which PyTorch takes for convolutions on GPUs by default."""
    return _float32("ieee")


def allow_tf32() -> contextlib.AbstractContextManager[None]:
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


def inherit_matmul_mode() -> contextlib.AbstractContextManager[Any]:
    """What makes products elsewhere take the way that they take here: autograd calls back without function modes."""
    modes = torch.overrides._get_current_function_mode_stack()
    return MatmulInFloat32() if any(isinstance(mode, MatmulInFloat32) for mode in modes) else contextlib.nullcontext()


@contextlib.contextmanager
def bf16_matmul_on_cpu(device: torch.device) -> Iterator[None]:
    """Within it, bf16 products take the fastest exact way that the device has."""
    with contextlib.nullcontext() if device.type != "cpu" or fast_bf16(device) else MatmulInFloat32():
        yield


@contextmanager
def deterministic_cudnn() -> Iterator[None]:
    """Convolutions on a GPU by one algorithm a shape, that adds up in one order."""
    cudnn: Any = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    try:
        cudnn.deterministic, cudnn.benchmark = True, False
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


@contextmanager
def strict_float32(device: torch.device) -> Iterator[None]:
    """float32 that is float32: no autocast, no TF32 (the default for convolutions), one algorithm a shape.

    Under autocast Inception's features are off by a tenth, and float32 all the same.
    """
    with no_tf32(), deterministic_cudnn(), torch.autocast(device.type, enabled=False):
        yield
