"""Triton kernels of backward, and their operators in `torch.ops.sfd_scale`. Only `fused_backward` imports this module.

Each program reads some tokens of one sample once. It sums over features for its tokens, and over its tokens for each
feature. It stores the latter sums, and the caller adds them up. Nothing is added atomically: equal inputs give equal
bits.

N batch · T tokens · D width · A heads · F features of one head · C chunks of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

# Fewer tokens per program would fill more processors, and more sums would be stored.
_PROGRAMS = 128
_NORM_TOKENS = (64, 32, 16)
_NORM_ROWS, _GATED_NORM_ROWS = 4, 2  # tokens that a program reads at once: as many as its registers hold
_HEAD_TOKENS, _HEAD_ROWS = 128, 16


def _norm_tokens(samples: int, tokens: int) -> int:
    """Tokens per program: the most that still give a GPU enough programs."""
    enough = (count for count in _NORM_TOKENS if samples * triton.cdiv(tokens, count) >= _PROGRAMS)
    return next(enough, _NORM_TOKENS[-1])


@triton.jit
def _norm(
    upstream, dh, x, y, weight, scale, gate, dx, dy, sums,
    tokens, width, scale_stride, gate_stride, eps,
    GATED: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    sample, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    samples, chunks = tl.num_programs(0).to(tl.int64), tl.num_programs(1)
    column = tl.arange(0, COLUMNS)
    inside = column < width
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    factor *= 1.0 + tl.load(scale + sample * scale_stride + column, mask=inside, other=0.0).to(tl.float32)
    sum_dh = tl.zeros((COLUMNS,), tl.float32)
    sum_dh_normed = tl.zeros((COLUMNS,), tl.float32)
    if GATED:
        opening = tl.load(gate + sample * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
        sum_dx = tl.zeros((COLUMNS,), tl.float32)
        sum_dx_y = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, TOKENS, ROWS):
        token = chunk * TOKENS + first + tl.arange(0, ROWS)
        at = (sample * tokens + token)[:, None] * width + column[None]
        mask = (token < tokens)[:, None] & inside[None]
        d = tl.load(dh + at, mask=mask, other=0.0).to(tl.float32)
        row = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        if GATED:
            branch = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
            row += opening[None] * branch
        residual = tl.load(upstream + at, mask=mask, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(row * row, 1) / width + eps)
        normed = row * inverse[:, None]
        scaled = d * factor[None]
        shared = tl.sum(scaled * normed, 1) / width
        change = residual + (scaled - normed * shared[:, None]) * inverse[:, None]
        tl.store(dx + at, change.to(dx.dtype.element_ty), mask=mask)
        sum_dh += tl.sum(d, 0)
        sum_dh_normed += tl.sum(d * normed, 0)
        if GATED:
            tl.store(dy + at, (change * opening[None]).to(dy.dtype.element_ty), mask=mask)
            sum_dx += tl.sum(change, 0)
            sum_dx_y += tl.sum(change * branch, 0)
    place = sums + (sample * chunks + chunk) * width + column
    step = samples * chunks * width
    tl.store(place, sum_dh, mask=inside)
    tl.store(place + step, sum_dh_normed, mask=inside)
    if GATED:
        tl.store(place + 2 * step, sum_dx, mask=inside)
        tl.store(place + 3 * step, sum_dx_y, mask=inside)


def _norm_options(samples: int, tokens: int, width: int) -> dict[str, Any]:
    columns = triton.next_power_of_2(width)
    # A thread has 4 numbers of each row.
    return {"TOKENS": _norm_tokens(samples, tokens), "COLUMNS": columns, "num_warps": min(max(columns // 128, 1), 16)}


@triton_op("sfd_scale::norm_backward", mutates_args=())
def norm_backward(
    upstream: Tensor, dh: Tensor, x: Tensor, weight: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Backward of h = norm(x)·(1 + scale) + shift beside a residual path.

    Args:
        upstream: (N, T, D) gradient of x by the residual path. dh, x: (N, T, D). weight: (D,). scale: (N, 1, D).

    Returns:
        Gradient of x, and sums over the tokens of each chunk (2, N, C, D) float32: of dh, and of dh·x/rms(x).
    """
    samples, tokens, width = x.shape
    options = _norm_options(samples, tokens, width)
    chunks = triton.cdiv(tokens, options["TOKENS"])
    dx = torch.empty_like(x)
    sums = x.new_empty((2, samples, chunks, width), dtype=torch.float32)
    wrap_triton(_norm)[(samples, chunks)](
        upstream, dh, x, None, weight, scale, None, dx, None, sums,
        tokens, width, scale.stride(0), 0, eps, GATED=False, ROWS=_NORM_ROWS, **options,
    )  # fmt: skip
    return dx, sums


@triton_op("sfd_scale::gated_norm_backward", mutates_args=())
def gated_norm_backward(
    upstream: Tensor, dh: Tensor, x: Tensor, y: Tensor, weight: Tensor, scale: Tensor, gate: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for the norm of x + gate·y, y (N, T, D) and gate (N, 1, D).

    Returns:
        Gradients of x and y, and sums (4, N, C, D) float32: the two of `norm_backward`, the sum of x's gradient, and
        that of its product with y.
    """
    samples, tokens, width = x.shape
    options = _norm_options(samples, tokens, width)
    chunks = triton.cdiv(tokens, options["TOKENS"])
    dx, dy = torch.empty_like(x), torch.empty_like(y)
    sums = x.new_empty((4, samples, chunks, width), dtype=torch.float32)
    wrap_triton(_norm)[(samples, chunks)](
        upstream, dh, x, y, weight, scale, gate, dx, dy, sums,
        tokens, width, scale.stride(0), gate.stride(0), eps, GATED=True, ROWS=_GATED_NORM_ROWS, **options,
    )  # fmt: skip
    return dx, dy, sums


@triton.jit
def _pairs(tile, ROWS: tl.constexpr, HALF: tl.constexpr):
    """Even and odd features of (ROWS, 2·HALF)."""
    return tl.split(tl.reshape(tile, (ROWS, HALF, 2)))


@triton.jit
def _head(
    d, x, weight_even, weight_odd, cos_even, cos_odd, sin_even, sin_odd, features, eps,
    ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Backward of norm and rotation for some tokens of one head: the gradient, its sum, and that of the weight."""
    d_even, d_odd = _pairs(d, ROWS, HALF)
    x_even, x_odd = _pairs(x, ROWS, HALF)
    # Forward: even·cos - odd·sin and odd·cos + even·sin.
    turned_even = d_even * cos_even + d_odd * sin_odd
    turned_odd = d_odd * cos_odd - d_even * sin_even
    inverse = tl.rsqrt(tl.sum(x_even * x_even + x_odd * x_odd, 1) / features + eps)[:, None]
    x_even *= inverse
    x_odd *= inverse
    weight_sum = tl.join(tl.sum(turned_even * x_even, 0), tl.sum(turned_odd * x_odd, 0))
    turned_even *= weight_even[None]
    turned_odd *= weight_odd[None]
    shared = (tl.sum(turned_even * x_even + turned_odd * x_odd, 1) / features)[:, None]
    dx_even = (turned_even - x_even * shared) * inverse
    dx_odd = (turned_odd - x_odd * shared) * inverse
    total = tl.join(tl.sum(dx_even, 0), tl.sum(dx_odd, 0))
    dx = tl.reshape(tl.join(dx_even, dx_odd), (ROWS, 2 * HALF))
    return dx, tl.reshape(total, (2 * HALF,)), tl.reshape(weight_sum, (2 * HALF,))


@triton.jit
def _heads(
    dq, dk, dv, q, k, cos, sin, q_weight, k_weight, out, bias_sums, weight_sums,
    tokens, heads, features, q_eps, k_eps, qk_sample, qk_token,
    dq_sample, dq_token, dq_head, dk_sample, dk_token, dk_head, dv_sample, dv_token, dv_head,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs read neighbouring memory.
    head, sample, chunk = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    feature = tl.arange(0, 2 * HALF)
    inside = feature < features
    width = heads * features
    here = head * features + feature
    weight = tl.load(q_weight + feature, mask=inside, other=0.0).to(tl.float32)
    q_even, q_odd = tl.split(tl.reshape(weight, (HALF, 2)))
    weight = tl.load(k_weight + feature, mask=inside, other=0.0).to(tl.float32)
    k_even, k_odd = tl.split(tl.reshape(weight, (HALF, 2)))
    q_bias = tl.zeros((2 * HALF,), tl.float32)
    k_bias = tl.zeros((2 * HALF,), tl.float32)
    v_bias = tl.zeros((2 * HALF,), tl.float32)
    q_sum = tl.zeros((2 * HALF,), tl.float32)
    k_sum = tl.zeros((2 * HALF,), tl.float32)
    for first in range(0, TOKENS, ROWS):
        token = (chunk * TOKENS + first + tl.arange(0, ROWS))[:, None]
        mask = (token < tokens) & inside[None]
        angle = token * features + feature[None]
        cos_even, cos_odd = _pairs(tl.load(cos + angle, mask=mask, other=0.0), ROWS, HALF)
        sin_even, sin_odd = _pairs(tl.load(sin + angle, mask=mask, other=0.0), ROWS, HALF)
        source = sample * qk_sample + token * qk_token + here[None]
        target = out + (sample * tokens + token) * 3 * width + here[None]

        at = sample * dq_sample + token * dq_token + head * dq_head + feature[None]
        d = tl.load(dq + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(q + source, mask=mask, other=0.0).to(tl.float32)
        dx, total, weight_sum = _head(
            d, x, q_even, q_odd, cos_even, cos_odd, sin_even, sin_odd, features, q_eps, ROWS, HALF
        )
        tl.store(target, dx.to(out.dtype.element_ty), mask=mask)
        q_bias += total
        q_sum += weight_sum

        at = sample * dk_sample + token * dk_token + head * dk_head + feature[None]
        d = tl.load(dk + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(k + source, mask=mask, other=0.0).to(tl.float32)
        dx, total, weight_sum = _head(
            d, x, k_even, k_odd, cos_even, cos_odd, sin_even, sin_odd, features, k_eps, ROWS, HALF
        )
        tl.store(target + width, dx.to(out.dtype.element_ty), mask=mask)
        k_bias += total
        k_sum += weight_sum

        at = sample * dv_sample + token * dv_token + head * dv_head + feature[None]
        d = tl.load(dv + at, mask=mask, other=0.0)
        tl.store(target + 2 * width, d.to(out.dtype.element_ty), mask=mask)
        v_bias += tl.sum(d.to(tl.float32), 0)
    row = sample * tl.num_programs(2) + chunk
    place = bias_sums + row * 3 * width + here
    tl.store(place, q_bias, mask=inside)
    tl.store(place + width, k_bias, mask=inside)
    tl.store(place + 2 * width, v_bias, mask=inside)
    place = weight_sums + (row * heads + head) * 2 * features + feature
    tl.store(place, q_sum, mask=inside)
    tl.store(place + features, k_sum, mask=inside)


@triton_op("sfd_scale::heads_backward", mutates_args=())
def heads_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor,
    q_weight: Tensor, k_weight: Tensor, q_eps: float, k_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Backward of RMS norm and rotation of queries and keys, and the gradient of the qkv matrix's output.

    Args:
        dq, dk, dv: (N, T, A, F) gradients after rotation, each in a layout of its own with neighbouring features.
        q, k: (N, T, A, F) before the norms, views of one tensor. cos, sin: (T, F) float32. q_weight, k_weight: (F,).

    Returns:
        The gradient (N, T, 3·A·F); its sums over tokens (N, C, 3·A·F); sums for the two weights (N, C, A, 2, F). Sums
        are float32.
    """
    samples, tokens, heads, features = q.shape
    chunks = triton.cdiv(tokens, _HEAD_TOKENS)
    out = q.new_empty((samples, tokens, 3 * heads * features))
    bias_sums = q.new_empty((samples, chunks, 3 * heads * features), dtype=torch.float32)
    weight_sums = q.new_empty((samples, chunks, heads, 2, features), dtype=torch.float32)
    wrap_triton(_heads)[(heads, samples, chunks)](
        dq, dk, dv, q, k, cos, sin, q_weight, k_weight, out, bias_sums, weight_sums,
        tokens, heads, features, q_eps, k_eps, q.stride(0), q.stride(1),
        dq.stride(0), dq.stride(1), dq.stride(2), dk.stride(0), dk.stride(1), dk.stride(2),
        dv.stride(0), dv.stride(1), dv.stride(2),
        TOKENS=_HEAD_TOKENS, ROWS=_HEAD_ROWS, HALF=triton.next_power_of_2(features) // 2, num_warps=4,
    )  # fmt: skip
    return out, bias_sums, weight_sums
