"""The time of one kernel on a GPU: matmuls with tile and wave quantisation, attention, elementwise operations."""

from __future__ import annotations

import math
from functools import lru_cache

from sfd_scale.planning.efficiency import Efficiency
from sfd_scale.planning.hardware import Hardware

# Output tiles of cuBLAS, and the share of the large tile's rate that each reaches: a smaller tile reads its operands
# more often. All dimensions are powers of two.
_TILES = {(256, 128): 1.0, (128, 256): 1.0, (128, 128): 0.90, (128, 64): 0.75, (64, 64): 0.55, (64, 32): 0.35}
# One output tile may be computed by several processors, each with a part of the inner dimension.
_SPLITS = (1, 2, 4, 8, 16)
_INNER = 64  # smallest step of the inner dimension
_HEAD_FEATURES = 32  # flash-attention pads the features of a head to a multiple of it
_BYTES = {"bf16": 2, "tf32": 4, "fp32": 4}


@lru_cache(maxsize=100_000)
def matmul_seconds(shape: tuple[int, ...], precision: str, hardware: Hardware, efficiency: Efficiency) -> float:
    """Time of `batch` matmuls (m × k) · (k × n), with the fastest tile and split.

    The processors work on tiles in waves. A partly filled tile or wave takes as long as a full one. So no shape
    exceeds the peak, and a small matmul stays far below it.
    """
    batch, m, n, k = shape
    if not batch * m * n * k:
        return 0.0
    reached = hardware.tensor_share or efficiency.matmul.value
    rate = hardware.peak(precision) * reached / hardware.processors  # of one processor
    best = math.inf
    for (rows, columns), share in _TILES.items():
        tiles = batch * math.ceil(m / rows) * math.ceil(n / columns)
        for split in _SPLITS:
            inner = math.ceil(math.ceil(k / split) / _INNER) * _INNER
            waves = math.ceil(tiles * split / hardware.processors)
            partial = 0.0 if split == 1 else 2.0 * 4 * batch * m * n * split  # fp32 sums, written and read
            compute = waves * 2.0 * rows * columns * inner / (rate * share)
            best = min(best, compute + partial / (hardware.bandwidth * efficiency.memory.value))
    moved = float(_BYTES[precision]) * batch * (m * k + k * n + m * n)
    return max(best, moved / (hardware.bandwidth * efficiency.memory.value), efficiency.kernel.value)


@lru_cache(maxsize=100_000)
def attention_seconds(
    shape: tuple[int, ...], backward: bool, precision: str, hardware: Hardware, efficiency: Efficiency
) -> float:
    """Time of a flash-attention kernel: two matmuls forward, five backward (arXiv 2205.14135)."""
    pairs, queries, keys, features = shape
    padded = math.ceil(features / _HEAD_FEATURES) * _HEAD_FEATURES
    flops = (5 if backward else 2) * 2.0 * pairs * queries * keys * padded
    reached = efficiency.attention.value * keys / (keys + efficiency.attention_half.value)
    moved = (8 if backward else 4) * float(_BYTES[precision]) * pairs * max(queries, keys) * features
    return max(
        flops / (hardware.peak(precision) * reached),
        moved / (hardware.bandwidth * efficiency.memory.value),
        efficiency.kernel.value,
    )


def elementwise_seconds(moved: float, launches: float, hardware: Hardware, efficiency: Efficiency) -> float:
    """Time of `launches` kernels that read and write `moved` bytes in all."""
    return max(moved / (hardware.bandwidth * efficiency.memory.value), launches * efficiency.kernel.value)
