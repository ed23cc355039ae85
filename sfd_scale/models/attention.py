"""Scaled dot-product attention: one call, the kernel chosen once a process and named in the logs.

PyTorch's SDPA dispatches to flash-attention 2 on CUDA by itself; flash-attention 3 and 4 register themselves as its
implementation, so compile, activation checkpointing and the CPU all share this one code path.

N batch · A heads · T tokens · F features of one head.
"""

from __future__ import annotations

import logging
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from sfd_scale.models.layers import LayerNorm, RMSNorm
from sfd_scale.models.rope import RotaryEmbedding2D

logger = logging.getLogger(__name__)

AttentionBackend = Literal["auto", "sdpa", "flash2", "flash3", "flash4", "math"]
# Major compute capabilities, and names in torch.nn.attention.
_CAPABILITIES: dict[str, tuple[int, ...]] = {"flash2": (8, 9, 10, 11, 12), "flash3": (9,), "flash4": (9, 10)}
_PACKAGES: dict[str, Literal["FA3", "FA4"]] = {"flash3": "FA3", "flash4": "FA4"}


class Attention(nn.Module):
    """Self-attention with one qkv matrix, optional norm of queries and keys, and rotary positions."""

    def __init__(self, dim: int, num_heads: int, *, qk_norm: Literal["none", "rmsnorm", "layernorm"]) -> None:
        super().__init__()
        self.num_heads = num_heads
        norms = {"none": nn.Identity, "rmsnorm": RMSNorm, "layernorm": LayerNorm}
        head = () if qk_norm == "none" else (dim // num_heads,)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm: nn.Module = norms[qk_norm](*head)
        self.k_norm: nn.Module = norms[qk_norm](*head)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rope: RotaryEmbedding2D | None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (3, N, A, T, F)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rope(q), rope(k)
        out = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))  # (N, T, D)


def _unsupported(backend: AttentionBackend, device: torch.device) -> str | None:
    """Why a kernel asked for by name cannot run on a device, or None."""
    if backend not in _CAPABILITIES:
        return None
    if device.type != "cuda":
        return "it needs a CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in _CAPABILITIES[backend]:
        return f"it needs a GPU of compute capability {_CAPABILITIES[backend]}, this one has {major}.{minor}"
    return None


def assert_supported(backend: AttentionBackend, device: torch.device) -> None:
    """Raises ValueError that says why `backend` cannot run on the device."""
    if backend not in get_args(AttentionBackend):
        raise ValueError(f"attention: {backend!r}; allowed: {', '.join(get_args(AttentionBackend))}")
    reason = _unsupported(backend, device)
    if reason is not None:
        raise ValueError(f"attention: {backend} cannot run here ({reason}); allowed here: auto, sdpa, math")


def activate(backend: AttentionBackend, device: torch.device) -> str:
    """Choose the kernel behind SDPA for this process; returns the name of what was chosen.

    `auto` takes flash-attention 3 or 4 where the package is installed and the GPU fit, else SDPA's own choice, and
    logs why. `flash2` is PyTorch's built-in kernel, `math` plain matrix products to compare with. SDPA still takes
    plain products where a flash kernel cannot work at all (float32), so `kernel_name` says what really runs.

    Raises:
        ValueError: if a kernel asked for by name cannot run here, with the reason.
    """
    assert_supported(backend, device)
    if torch.nn.attention.current_flash_attention_impl() is not None:
        torch.nn.attention.restore_flash_attention_impl()
    chosen, reasons = "sdpa", []
    for name in ("flash3", "flash4") if backend == "auto" else (backend,):
        reason = _unsupported(name, device) or _register(name)
        if reason is None:
            chosen = name
            break
        reasons.append(f"{name}: {reason}")
    if reasons and backend != "auto":
        raise ValueError(f"attention: {backend} cannot run here ({'; '.join(reasons)}); allowed here: auto, sdpa, math")
    if reasons:
        logger.info("attention: %s; %s", chosen, "; ".join(reasons))
    # SDPA may prefer other fused kernels to the flash kernel that was asked for.
    torch.backends.cuda.enable_flash_sdp(chosen != "math")
    torch.backends.cuda.enable_mem_efficient_sdp(chosen == "sdpa")
    torch.backends.cuda.enable_cudnn_sdp(chosen == "sdpa")
    return chosen


def _register(backend: str) -> str | None:
    """Make SDPA's flash kernel that of a package; the reason why not, or None."""
    if backend not in _PACKAGES:
        return None
    try:
        torch.nn.attention.activate_flash_attention_impl(_PACKAGES[backend])
    except (ImportError, RuntimeError, ValueError) as error:
        return str(error)
    return None


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if "attention" in func.__name__ or "flash" in func.__name__:
            self.kernels.append(func.__name__)
        return func(*args, **(kwargs or {}))


def kernel_name(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The operator that SDPA really runs for this device, dtype and head: found by running it once."""
    q = torch.zeros(1, 1, 16, head_dim, device=device, dtype=dtype)
    with _Recorder() as recorder, torch.no_grad():
        functional.scaled_dot_product_attention(q, q, q)
    return ", ".join(dict.fromkeys(recorder.kernels)) or "math"
