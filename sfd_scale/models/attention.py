"""Scaled dot-product attention: one call, the kernel chosen once a process and named in the logs.

PyTorch's SDPA dispatches to flash-attention 2 on CUDA by itself; flash-attention 3 and 4 register themselves as its
implementation, so compile, activation checkpointing and the CPU all share this one code path.

N batch · A heads · T tokens · F features of one head.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from sfd_scale.models.layers import RMSNorm
from sfd_scale.models.rope import RotaryEmbedding2D

AttentionBackend = Literal["auto", "sdpa", "flash3", "flash4"]


class Attention(nn.Module):
    """Self-attention with one qkv matrix, optional norm of queries and keys, and rotary positions."""

    def __init__(self, dim: int, num_heads: int, *, qk_norm: Literal["none", "rmsnorm", "layernorm"]) -> None:
        super().__init__()
        self.num_heads = num_heads
        norms = {"none": nn.Identity, "rmsnorm": RMSNorm, "layernorm": nn.LayerNorm}
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


def activate(backend: AttentionBackend, device: torch.device) -> str:
    """Choose the kernel behind SDPA for this process; returns the name of what was chosen.

    `auto` takes flash-attention 4 or 3 where the package is installed and the GPU fit, else SDPA's own choice.

    Raises:
        ValueError: if a kernel asked for by name cannot run here, with the reason.
    """
    if backend not in get_args(AttentionBackend):
        raise ValueError(f"attention: {backend!r}; allowed: {', '.join(get_args(AttentionBackend))}")
    wanted = {"auto": ("FA4", "FA3"), "sdpa": (), "flash3": ("FA3",), "flash4": ("FA4",)}[backend]
    if device.type != "cuda":
        if backend not in ("auto", "sdpa"):
            raise ValueError(f"attention: {backend} needs a CUDA device; allowed here: auto, sdpa")
        return "sdpa"
    reasons = []
    for name in wanted:
        try:
            torch.nn.attention.activate_flash_attention_impl(name)
        except (ImportError, RuntimeError, ValueError, AttributeError) as error:
            reasons.append(f"{name}: {error}")
        else:
            return name
    if reasons and backend != "auto":
        raise ValueError(f"attention: {backend} cannot run here ({'; '.join(reasons)}); allowed: auto, sdpa")
    return "sdpa"


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
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
