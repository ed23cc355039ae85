"""Backward of a block's norms, and of its queries and keys, each in one pass over memory.

The compiler takes two passes for a norm and four for queries and keys: it does not sum over features and over tokens
in one kernel. `backward_kernels` does. Forward consists of plain operators, which the compiler fuses by itself.
Compiled training on a CUDA device uses these functions; everything else uses the layers as they are.

N batch · T tokens · D width · A heads · F features of one head.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sfd_scale.models.layers import modulate, sums_by_sample
from sfd_scale.models.rope import rotate

logger = logging.getLogger(__name__)

LARGEST_WIDTH, LARGEST_HEAD = 2048, 128  # a program keeps a row in registers
_ERROR = 2e-2  # bf16 rounds by 4e-3

_operators = torch.ops.sfd_scale  # of backward_kernels, after `load`
_tried: dict[tuple[int, int], bool] = {}


def applies(x: Tensor, condition: Tensor, heads: int) -> bool:
    """Whether a block uses this module for tokens (N, T, D) and conditions (N, D).

    Conditions of tokens (N, T, D) have other sums.
    """
    usable = sums_by_sample(x.device) and torch.is_grad_enabled() and condition.ndim == 2
    return usable and _tried.get((x.shape[-1], heads), False)


def prepare(shapes: Iterable[tuple[int, int]], device: torch.device) -> None:
    """Try the kernels on the device, once for each (width, heads). `applies` needs it.

    A kernel that fails, or differs from its formula, is reported by one warning and not used.
    """
    for width, heads in shapes:
        if (width, heads) not in _tried:
            reason = unusable(device, width, heads)
            _tried[width, heads] = reason is None
            if reason is None:
                logger.info("backward of width %d with %d heads uses our kernels", width, heads)
            else:
                logger.warning(
                    "backward of width %d with %d heads uses the compiler's kernels: %s", width, heads, reason
                )


def unusable(device: torch.device, width: int, heads: int) -> str | None:
    """Why the kernels cannot be used on the device, or None."""
    if width > LARGEST_WIDTH or width // heads > LARGEST_HEAD:
        return f"own kernels take widths up to {LARGEST_WIDTH} and heads up to {LARGEST_HEAD}"
    try:
        load()
        found = errors(device, width, heads, torch.bfloat16)
    except Exception as error:  # noqa: BLE001 (a compiler, driver or device fails in ways of its own)
        return f"own kernels failed ({type(error).__name__}: {str(error).partition(chr(10))[0][:200]})"
    wrong = (f"own kernels gave {name} an error of {error:.1e}" for name, error in found.items() if not error < _ERROR)
    return next(wrong, None)


def load() -> None:
    """Define the operators. It needs Triton."""
    importlib.import_module("sfd_scale.models.backward_kernels")


# ------------------------------------------------------------------------------------------------- norms


class _ModulatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, scale)
        ctx.eps = eps
        # The residual path goes on from the first output, so that backward adds its gradient. The compiler copies
        # nothing here.
        return x.clone(), _modulated(x, weight, shift, scale, eps, dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        residual, dh = upstream
        dx, sums = _operators.norm_backward(
            residual.contiguous(), dh.contiguous(), x.contiguous(), weight, scale, ctx.eps
        )
        return dx, *_of_norm(sums.sum(2), weight, scale), None, None


class _GatedModulatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, bias: Tensor, weight: Tensor, gate: Tensor, shift: Tensor, scale: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.save_for_backward(x, y, bias, weight, gate, scale)
        ctx.eps = eps
        x = x + gate * y
        return x, _modulated(x, weight, shift, scale, eps, y.dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, y, bias, weight, gate, scale = ctx.saved_tensors
        residual, dh = upstream
        dx, dy, sums = _operators.gated_norm_backward(
            residual.contiguous(), dh.contiguous(), x.contiguous(), y.contiguous(), weight, scale, gate, ctx.eps
        )
        sums = sums.sum(2)
        dbias = (sums[2] * gate[:, 0]).sum(0).to(bias.dtype)
        dgate = sums[3][:, None].to(gate.dtype)
        dweight, dshift, dscale = _of_norm(sums[:2], weight, scale)
        return dx, dy, dbias, dweight, dgate, dshift, dscale, None


def _modulated(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    normed = functional.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)
    return modulate(normed, shift, scale).to(dtype)


def _of_norm(sums: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight, shift and scale, from sums over tokens (2, N, D)."""
    of_dh, of_dh_normed = sums[0][:, None], sums[1][:, None]
    dweight = (of_dh_normed * (1 + scale.float())).sum((0, 1))
    return dweight.to(weight.dtype), of_dh.to(scale.dtype), (of_dh_normed * weight.float()).to(scale.dtype)


def modulated_norm(
    x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x itself, for the residual path, and h = rms_norm(x)·(1 + scale) + shift in `dtype`.

    Args:
        x: (N, T, D). weight: (D,). shift, scale: (N, 1, D).
    """
    return _ModulatedNorm.apply(x, weight, shift, scale, eps, dtype)


def gated_modulated_norm(
    x: Tensor, y: Tensor, bias: Tensor, weight: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x + gate·y, and its norm as in `modulated_norm`, in the dtype of y.

    `bias` (D,) was added to y in the layer before, detached: backward gives its gradient here, where it needs no pass
    of its own.
    """
    return _GatedModulatedNorm.apply(x, y, bias, weight, gate, shift, scale, eps)


# ------------------------------------------------------------------------------------------------- queries and keys


class _RotatedHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, bias: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
        q_eps: float, k_eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        q, k, v = qkv.unflatten(-1, (3, -1, cos.shape[-1])).unbind(2)
        ctx.save_for_backward(q, k, bias, q_weight, k_weight, cos, sin)
        ctx.eps = q_eps, k_eps
        q_normed = functional.rms_norm(q.float(), q_weight.shape, q_weight.float(), q_eps).to(q.dtype)
        k_normed = functional.rms_norm(k.float(), k_weight.shape, k_weight.float(), k_eps).to(k.dtype)
        return rotate(q_normed, cos, sin), rotate(k_normed, cos, sin), v

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        q, k, bias, q_weight, k_weight, cos, sin = ctx.saved_tensors
        q_eps, k_eps = ctx.eps
        dq, dk, dv = upstream
        dqkv, bias_sums, weight_sums = _operators.heads_backward(
            _rows(dq), _rows(dk), _rows(dv), q, k, cos, sin, q_weight, k_weight, q_eps, k_eps
        )
        dbias = bias_sums.sum((0, 1)).to(bias.dtype)
        dweights = weight_sums.sum((0, 1, 2))
        dq_weight, dk_weight = dweights[0].to(q_weight.dtype), dweights[1].to(k_weight.dtype)
        return dqkv, dbias, dq_weight, dk_weight, None, None, None, None


def _rows(x: Tensor) -> Tensor:
    """Attention may return any layout. The kernel needs neighbouring features."""
    return x if x.stride(-1) == 1 else x.contiguous()


def rotated_heads(
    qkv: Tensor, bias: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys with RMS norm and rotation, and values, (N, T, A, F) each.

    Args:
        qkv: (N, T, 3·A·F). bias: (3·A·F,), which was added to it detached; see `gated_modulated_norm`.
        q_weight, k_weight, eps: of the norms. cos, sin: (T, F).
    """
    return _RotatedHeads.apply(qkv, bias, q_weight, k_weight, cos, sin, *eps)


# ------------------------------------------------------------------------------------------------- comparison


def errors(
    device: torch.device, width: int, heads: int, dtype: torch.dtype, samples: int = 2, tokens: int = 70
) -> dict[str, float]:
    """Relative error of each gradient, beside autograd of plain operators in float64, on random numbers."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, of)

    features = width // heads
    x, y = draw(samples, tokens, width, of=torch.float32), draw(samples, tokens, width)
    qkv = draw(samples, tokens, 3 * width)
    shift, scale, gate = draw(samples, 1, 3 * width).chunk(3, dim=-1)
    weight, q_weight, k_weight = (draw(size, of=torch.float32) for size in (width, features, features))
    bias, qkv_bias = torch.zeros_like(weight, dtype=dtype), torch.zeros(3 * width, device=device, dtype=dtype)
    angle = draw(tokens, features // 2, of=torch.float32).repeat_interleave(2, dim=-1)
    cos, sin, eps = angle.cos(), angle.sin(), 1e-6

    def ours(x: Tensor, y: Tensor, qkv: Tensor, *rest: Tensor) -> list[Tensor]:
        bias, qkv_bias, weight, q_weight, k_weight, gate, shift, scale = rest
        outputs = [*modulated_norm(x, weight, shift, scale, eps, dtype)]
        outputs += gated_modulated_norm(x, y, bias, weight, gate, shift, scale, eps)
        return [*outputs, *rotated_heads(qkv, qkv_bias, q_weight, k_weight, cos, sin, (eps, eps))]

    def plain(x: Tensor, y: Tensor, qkv: Tensor, *rest: Tensor) -> list[Tensor]:
        bias, qkv_bias, weight, q_weight, k_weight, gate, shift, scale = rest
        added = x + gate * (y + bias)
        q, k, v = (qkv + qkv_bias).unflatten(-1, (3, heads, features)).unbind(2)
        norms = [modulate(functional.rms_norm(a, weight.shape, weight, eps), shift, scale) for a in (x, added)]
        normed = [functional.rms_norm(a, w.shape, w, eps) for a, w in ((q, q_weight), (k, k_weight))]
        return [x, norms[0], added, norms[1], *(rotate(a, cos.double(), sin.double()) for a in normed), v]

    names = ("x", "y", "qkv", "bias", "qkv bias", "norm weight", "q weight", "k weight", "gate", "shift", "scale")
    inputs = (x, y, qkv, bias, qkv_bias, weight, q_weight, k_weight, gate, shift, scale)
    seeds = [draw(*out.shape, of=out.dtype) for out in ours(*inputs)]
    found, exact = _gradients(ours, inputs, seeds), _gradients(plain, [a.double() for a in inputs], seeds)
    pairs = zip(names, found, exact, strict=True)
    return {name: float((mine.double() - true).norm() / true.norm()) for name, mine, true in pairs}


def _gradients(
    function: Callable[..., list[Tensor]], inputs: Iterable[Tensor], upstream: Iterable[Tensor]
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        leaves = [value.detach().requires_grad_() for value in inputs]
        outputs = function(*leaves)
        return torch.autograd.grad(outputs, leaves, [d.to(out.dtype) for d, out in zip(upstream, outputs, strict=True)])
