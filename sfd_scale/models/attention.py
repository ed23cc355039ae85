"""Scaled dot-product attention. Each process chooses the kernel once; the logs name it.

Flash-attention 3 and 4 register themselves as the flash kernel of PyTorch's SDPA. So compile, activation checkpointing
and the CPU share one code path. Flash-attention 2 is a function of its package, or the copy in PyTorch.

N batch · A heads · T tokens · F features of one head.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from sfd_scale.models import attention_speed, fused_backward
from sfd_scale.models.layers import FusedMatrix, LayerNorm, RMSNorm, TokenLinear, linear
from sfd_scale.models.rope import RotaryEmbedding2D

logger = logging.getLogger(__name__)

AttentionBackend = Literal["auto", "sdpa", "flash2", "flash3", "flash4", "math"]
FlashBackend = Literal["flash2", "flash3", "flash4"]


@dataclass(frozen=True)
class _Flash:
    """The requirements of a flash kernel. registered: its name in torch.nn.attention."""

    module: str
    capabilities: tuple[int, ...]  # major ones
    largest_head: int
    registered: Literal["FA3", "FA4"] | None = None


_FLASH: dict[FlashBackend, _Flash] = {
    "flash3": _Flash("flash_attn_interface", (9,), 256, "FA3"),
    "flash4": _Flash("flash_attn.cute", (9, 10), 128, "FA4"),
    "flash2": _Flash("flash_attn", (8, 9, 10, 11, 12), 256),
}
_HALF = (torch.float16, torch.bfloat16)


class Attention(nn.Module):
    """Self-attention with one qkv matrix, optional norm of queries and keys, and rotary positions."""

    def __init__(self, dim: int, num_heads: int, *, qk_norm: Literal["none", "rmsnorm", "layernorm"]) -> None:
        super().__init__()
        self.num_heads = num_heads
        norms = {"none": nn.Identity, "rmsnorm": RMSNorm, "layernorm": LayerNorm}
        head = () if qk_norm == "none" else (dim // num_heads,)
        self.qkv = TokenLinear(dim, 3 * dim)
        self.q_norm: nn.Module = norms[qk_norm](*head)
        self.k_norm: nn.Module = norms[qk_norm](*head)
        self.proj = TokenLinear(dim, dim)
        self.fused_weights = {"qkv.weight": FusedMatrix(3, num_heads), "proj.weight": FusedMatrix()}

    def forward(self, x: Tensor, rope: RotaryEmbedding2D | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # (N, T, A, F)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rope(q), rope(k)
        return self.proj(attend(q, k, v).flatten(2))  # (N, T, D)

    @property
    def fits_fused_backward(self) -> bool:
        """Whether `with_fused_backward` can be called: with RMS norms, and matrices that are not of float8."""
        layers = (self.qkv, self.proj)
        return isinstance(self.q_norm, RMSNorm) and all(type(layer) is TokenLinear for layer in layers)

    def with_fused_backward(self, x: Tensor, rope: RotaryEmbedding2D) -> Tensor:
        """forward for training (`fused_backward`). The bias of the last matrix gets its gradient by the caller."""
        assert isinstance(self.q_norm, RMSNorm) and isinstance(self.k_norm, RMSNorm)
        weights, eps = (self.q_norm.weight, self.k_norm.weight), (self.q_norm.eps, self.k_norm.eps)
        qkv = linear(x, self.qkv.weight, self.qkv.bias.detach())
        tables = rope.freqs_cos, rope.freqs_sin
        q, k, v = fused_backward.rotated_heads(qkv, self.qkv.bias, *weights, *tables, eps)
        return linear(attend(q, k, v).flatten(2), self.proj.weight, self.proj.bias.detach())


def head_dims(model: nn.Module) -> tuple[int, ...]:
    """The features per head of the attention layers of a model, each number once; empty without such layers."""
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    return tuple(dict.fromkeys(layer.proj.in_features // layer.num_heads for layer in layers))


def shapes(model: nn.Module) -> set[tuple[int, int]]:
    """Width and heads of the attention layers of a model."""
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    return {(layer.proj.in_features, layer.num_heads) for layer in layers}


_flash2: Callable[..., Tensor] | None = None  # the function of the package, if it was chosen


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q·kᵀ / √F)·v by the chosen kernel, (N, T, A, F) each (arXiv 1706.03762, Eq. 1).

    Tokens come before heads, as in the projections. With heads first, SDPA's result would be copied back.
    """
    if _flash2 is not None and q.dtype in _HALF:
        return _flash2(q, k, v)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def installed() -> frozenset[FlashBackend]:
    """The flash-attention packages of this Python."""
    return frozenset(name for name, needs in _FLASH.items() if _is_module(needs.module))


def _is_module(name: str) -> bool:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False
    # flash-attention 4 alone makes `flash_attn` a namespace, which is not flash-attention 2.
    return spec is not None and spec.origin is not None


def unfit(
    backend: FlashBackend,
    found: Collection[str],
    capability: tuple[int, int] | None,
    head_dims: Collection[int],
    dtype: torch.dtype,
) -> str | None:
    """Why a flash kernel cannot run, or None.

    Args:
        found: the installed packages.
        capability: compute capability; None without a CUDA device.
        head_dims: the features per head of every attention layer; empty if unknown.
        dtype: of queries, keys and values.
    """
    needs = _FLASH[backend]
    if capability is None:
        return "it needs a CUDA device"
    if capability[0] not in needs.capabilities:
        majors = " or ".join(f"{major}.x" for major in needs.capabilities)
        return f"it needs a GPU of compute capability {majors}, this one has {capability[0]}.{capability[1]}"
    if backend not in found:
        return f"it needs the module {needs.module}"
    for head_dim in head_dims:
        if head_dim > needs.largest_head or head_dim % 8:
            return f"it takes heads of multiples of 8 up to {needs.largest_head}, not {head_dim}"
    if dtype not in _HALF:
        return f"it takes bf16 and fp16, not {str(dtype).removeprefix('torch.')}"
    return None


def candidates(
    found: Collection[str],
    capability: tuple[int, int] | None,
    head_dims: Collection[int],
    dtype: torch.dtype,
    gpu: str | None = None,
) -> tuple[list[AttentionBackend], list[str]]:
    """The kernels that `auto` tries, the fastest first and SDPA last, and why it skips the others.

    The arguments are those of `unfit`; `gpu` is its name, for the measured times.
    """
    ranked = ["sdpa"] if capability is None else attention_speed.order(capability, gpu, head_dims)
    # Kernels that the table does not list come after SDPA.
    ranked += [name for name in _FLASH if name not in ranked]
    able: list[AttentionBackend] = []
    reasons: list[str] = []
    for name in _FLASH:
        reason = unfit(name, found, capability, head_dims, dtype)
        if reason is None and ranked.index(name) > ranked.index("sdpa"):
            reason = "sdpa is taken before it on this GPU (attention_speed.json)"
        if reason is None:
            able.append(name)
        else:
            reasons.append(f"{name}: {reason}")
    return [*sorted(able, key=ranked.index), "sdpa"], reasons


def assert_supported(backend: AttentionBackend, device: torch.device) -> None:
    """Raises ValueError that says why `backend` cannot run on the device."""
    if backend not in get_args(AttentionBackend):
        raise ValueError(f"attention: {backend!r}; allowed: {', '.join(get_args(AttentionBackend))}")
    if backend in _FLASH:
        # By name flash2 needs no package: PyTorch has a copy.
        reason = unfit(backend, {*installed(), "flash2"}, _capability(device), (), torch.bfloat16)
        if reason is not None:
            raise ValueError(f"attention: {backend} cannot run here ({reason}); allowed here: auto, sdpa, math")


def activate(
    backend: AttentionBackend,
    device: torch.device,
    head_dims: Collection[int] = (),
    dtype: torch.dtype = torch.bfloat16,
) -> str:
    """Choose the kernel for this process, and return its name.

    `auto` takes the first of `candidates` that loads, and logs why the ones before it failed. `flash2` is the kernel of
    the package, or PyTorch's copy. `math` is plain matmuls, for comparisons. In float32, flash kernels do not work and
    SDPA uses plain matmuls. `kernel_name` tells which kernel runs.

    Args:
        head_dims: features per head in the model (`head_dims`); empty if unknown.
        dtype: of queries, keys and values.

    Raises:
        ValueError: if a kernel that was given by name cannot run here; the message has the reason.
    """
    assert_supported(backend, device)
    _reset()
    tried: list[AttentionBackend] = [backend]
    reasons: list[str] = []
    if backend == "auto":
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        tried, reasons = candidates(installed(), _capability(device), head_dims, dtype, gpu)
    for chosen in tried:
        failure = _load(chosen)
        if failure is None:
            break
        reasons.append(f"{chosen}: {failure}")
    else:
        raise ValueError(f"attention: {backend} cannot run here ({'; '.join(reasons)}); allowed here: auto, sdpa, math")
    if reasons:
        logger.info("attention: %s; %s", chosen, "; ".join(reasons))
    # SDPA may prefer cuDNN's kernel to the given flash kernel. The memory-efficient kernel comes after flash. It is the
    # only fused kernel for float32, and other networks of the process run in float32.
    torch.backends.cuda.enable_flash_sdp(chosen != "math")
    torch.backends.cuda.enable_mem_efficient_sdp(chosen != "math")
    torch.backends.cuda.enable_cudnn_sdp(chosen == "sdpa")
    return chosen


def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _reset() -> None:
    global _flash2
    _flash2 = None
    if torch.nn.attention.current_flash_attention_impl() is not None:
        torch.nn.attention.restore_flash_attention_impl()


def _load(backend: AttentionBackend) -> str | None:
    """Put a flash kernel in the place of the default. Returns the reason of a failure, or None."""
    global _flash2
    needs = next((needs for name, needs in _FLASH.items() if name == backend), None)
    if needs is None:
        return None
    try:
        if needs.registered is not None:
            torch.nn.attention.activate_flash_attention_impl(needs.registered)
        elif _is_module(needs.module):
            _flash2 = importlib.import_module(needs.module).flash_attn_func
    except Exception as error:  # noqa: BLE001 (a package for another GPU or PyTorch fails in ways of its own)
        return f"{type(error).__name__}: {error}"
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
    """The operator that runs for this device, dtype and head size. It is found by one call."""
    q = torch.zeros(1, 16, 1, head_dim, device=device, dtype=dtype)
    with _Recorder() as recorder, torch.no_grad():
        attend(q, q, q)
    return ", ".join(dict.fromkeys(recorder.kernels)) or "math"
