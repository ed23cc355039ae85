"""Attention kernels behind one function.

`auto` and `sdpa` call torch's scaled_dot_product_attention, which chooses a kernel; `auto` also lets `prepare` switch
SDPA to FlashAttention 3 where that runs. `flash3` and `flash4` insist on their kernel inside SDPA, `flash2` calls the
package `flash_attn`, `math` is plain matrix products, to compare with.

N batch · A heads · T tokens · D head dimension.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

logger = logging.getLogger(__name__)

AttentionBackend = Literal["auto", "sdpa", "flash2", "flash3", "flash4", "math"]


@dataclass(frozen=True)
class _Kernel:
    """What a FlashAttention generation needs; `implementation` is its name in torch.nn.attention."""

    module: str
    package: str
    capabilities: tuple[int, ...]
    implementation: str | None


_KERNELS: dict[str, _Kernel] = {
    "flash2": _Kernel("flash_attn", "flash-attn", (8, 9, 10, 12), None),
    "flash3": _Kernel("flash_attn_interface", "flash_attn_3", (9,), "FA3"),
    "flash4": _Kernel("flash_attn.cute", "flash-attn-4", (9, 10), "FA4"),
}


def attention(q: Tensor, k: Tensor, v: Tensor, backend: AttentionBackend) -> Tensor:
    """softmax(q·kᵀ/√D)·v without mask (arXiv 1706.03762, Eq. 1): (N, A, T, D) three times → (N, A, T, D)."""
    if backend == "flash2":
        return _flash2(q, k, v)
    if backend in ("flash3", "flash4"):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v)
    if backend == "math":
        with sdpa_kernel(SDPBackend.MATH):
            return scaled_dot_product_attention(q, k, v)
    return scaled_dot_product_attention(q, k, v)


def _flash2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # The package has tokens before heads.
    out: Tensor = importlib.import_module("flash_attn").flash_attn_func(
        q=q.transpose(1, 2), k=k.transpose(1, 2), v=v.transpose(1, 2)
    )
    return out.transpose(1, 2)


def _missing(backend: AttentionBackend, device: torch.device) -> str | None:
    """Why a backend cannot run on a device, or None."""
    if backend not in _KERNELS:
        return None
    kernel = _KERNELS[backend]
    if device.type != "cuda":
        return f"it needs a CUDA device, this one is {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in kernel.capabilities:
        return f"it needs compute capability {kernel.capabilities}, this GPU has {major}.{minor}"
    try:
        found = importlib.util.find_spec(kernel.module) is not None
    except ModuleNotFoundError:
        found = False
    return None if found else f"the package {kernel.package} is not installed"


def assert_supported(backend: AttentionBackend, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ValueError that says why `backend` cannot run and which ones can."""
    reason = _missing(backend, device)
    if reason is None and backend in _KERNELS and dtype not in (torch.bfloat16, torch.float16):
        reason = f"it computes in 16 bits, not in {dtype}; set engine.precision to bf16"
    if reason is not None:
        raise ValueError(f"attention: {backend}; {reason}; allowed here: auto, sdpa, math")


def prepare(backend: AttentionBackend, device: torch.device, dtype: torch.dtype) -> str:
    """Make `backend` ready in this process, once before the model runs, and say what was chosen and why.

    Raises:
        ValueError: if the backend cannot run here; only `auto` chooses another one, and says so.
    """
    assert_supported(backend, device, dtype)
    wanted: AttentionBackend = "flash3" if backend == "auto" and dtype != torch.float32 else backend
    reason = _missing(wanted, device)
    implementation = _KERNELS[wanted].implementation if wanted in _KERNELS and reason is None else None
    if implementation is not None:
        torch.nn.attention.activate_flash_attention_impl(implementation)  # type: ignore[arg-type]
        chosen = f"attention: {backend}, {implementation} inside SDPA"
    elif reason is not None:
        chosen = f"attention: {backend}, SDPA with torch's own kernels ({wanted} not used: {reason})"
    else:
        chosen = f"attention: {backend}"
    logger.info(chosen)
    return chosen


class _Recorder(TorchDispatchMode):
    """Notes the attention operators that pass."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = str(func)
        if any(part in name for part in ("scaled_dot", "flash", "_softmax")) and name not in self.names:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def describe_attention(
    backend: AttentionBackend, device: torch.device, dtype: torch.dtype, head_dim: int
) -> dict[str, str]:
    """Which operators one small call really runs, and which FlashAttention SDPA would use; for the run record."""
    q = torch.zeros(1, 2, 128, head_dim, device=device, dtype=dtype)
    with torch.no_grad(), _Recorder() as recorder:
        attention(q, q, q, backend)
    return {
        "backend": backend,
        "operators": ", ".join(recorder.names) or "none recorded",
        "flash_implementation": str(torch.nn.attention.current_flash_attention_impl() or "FA2 (torch's own)"),
    }
