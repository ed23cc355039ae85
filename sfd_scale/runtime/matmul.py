"""Matmul precision: TF32 on or off, and bf16 matmuls on CPUs without fast bf16."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sfd_scale.runtime.device import fast_bf16, synchronize


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measured peak FLOP/s: the best of ten square matmuls. For devices that `peak_flops` does not know."""
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


# All operations of the project that compute matmuls.
_MATMULS = frozenset({
    functional.linear, functional.conv2d, functional.scaled_dot_product_attention,
    torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum,
    Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm,
})  # fmt: skip


class MatmulInFloat32(TorchFunctionMode):
    """Compute bf16 matmuls on the CPU in float32 and round the result once, forward and backward.

    A bf16 matrix unit that accumulates in float32 computes the same. PyTorch's kernels for CPUs without bf16
    instructions are exact too, but scalar: 1.3 GFLOP/s, where float32 has 65 (one core, AVX2). See also `fast_bf16`.
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
    """float32 matmuls and convolutions without TF32. PyTorch's default for convolutions on GPUs is TF32."""
    return _float32("ieee")


def allow_tf32() -> contextlib.AbstractContextManager[None]:
    """float32 matmuls and convolutions in TF32, on a GPU's tensor cores, with 10 bits of each mantissa."""
    return _float32("tf32")


@contextlib.contextmanager
def _float32(form: Literal["ieee", "tf32"]) -> Iterator[None]:
    """Applies to all threads of the process.

    PyTorch refuses to read an old flag (`allow_tf32`) that disagrees with the new ones (`fp32_precision`). Both are
    set, so that other code, such as a feature extractor of the user, can read and write either.
    """
    before = [backend.fp32_precision for backend in _float32_backends()]
    _set_float32((form, form, form))
    try:
        yield
    finally:
        _set_float32(before)


def _float32_backends() -> tuple[Any, Any, Any]:
    cudnn: Any = torch.backends.cudnn
    return cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul


def _set_float32(forms: Sequence[str]) -> None:
    """The precision of convolutions, recurrent layers, matmuls. An old flag resets the new ones, so it comes first."""
    torch.backends.cudnn.allow_tf32 = forms[0] == forms[1] == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = forms[2] == "tf32"
    for backend, form in zip(_float32_backends(), forms, strict=True):
        backend.fp32_precision = form


def inherit_matmul_mode() -> contextlib.AbstractContextManager[Any]:
    """The current matmul mode, for a function that autograd calls later: autograd does not keep function modes."""
    modes = torch.overrides._get_current_function_mode_stack()
    return MatmulInFloat32() if any(isinstance(mode, MatmulInFloat32) for mode in modes) else contextlib.nullcontext()


@contextlib.contextmanager
def bf16_matmul_on_cpu(device: torch.device) -> Iterator[None]:
    """Use `MatmulInFloat32` if the device is a CPU without fast bf16."""
    with contextlib.nullcontext() if device.type != "cpu" or fast_bf16(device) else MatmulInFloat32():
        yield


@contextmanager
def deterministic_cudnn() -> Iterator[None]:
    """Deterministic cuDNN convolutions: one algorithm per shape, one order of summation."""
    cudnn: Any = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    try:
        cudnn.deterministic, cudnn.benchmark = True, False
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


@contextmanager
def strict_float32(device: torch.device) -> Iterator[None]:
    """True float32: no autocast, no TF32, deterministic convolutions.

    Under autocast, features of Inception have an error of 10 %, although their dtype is float32.
    """
    with no_tf32(), deterministic_cudnn(), torch.autocast(device.type, enabled=False):
        yield
