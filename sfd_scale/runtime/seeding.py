"""Random draws keyed by (seed, stream, index).

All random numbers of the project are drawn here, on the CPU. So they do not depend on the world size, the device, the
batch or a restart. A *stream* names the kind of draw ("noise", "time", ...).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

Key = tuple[int, ...]


def derive_seed(seed: int, stream: str, *index: int) -> int:
    """A 63-bit seed for one draw: the first 8 bytes of SHA-256 over (seed, stream, index)."""
    text = "/".join([str(seed), stream, *map(str, index)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, stream: str, *index: int) -> torch.Generator:
    """A CPU generator for the draw (seed, stream, index)."""
    return torch.Generator().manual_seed(derive_seed(seed, stream, *index))


def normal(
    seed: int, stream: str, keys: Sequence[Key], shape: Sequence[int], device: torch.device | None = None
) -> Tensor:
    """Standard normal draws, one generator per key: (N, *shape) float32."""
    pinned = device is not None and device.type == "cuda"  # a copy from pageable memory would wait for the GPU
    out = torch.empty(len(keys), *shape, pin_memory=pinned)
    own = torch.Generator()
    for row, key in zip(out, keys, strict=True):
        torch.randn(tuple(shape), generator=own.manual_seed(derive_seed(seed, stream, *key)), out=row)
    return out if device is None else out.to(device, non_blocking=True)


def uniform(seed: int, stream: str, keys: Sequence[Key]) -> Tensor:
    """Uniform draws in [0, 1), one generator per key: (N,) float32."""
    own = torch.Generator()
    values = (torch.rand((), generator=own.manual_seed(derive_seed(seed, stream, *key))).item() for key in keys)
    return torch.tensor(list(values))


def permutation(seed: int, stream: str, n: int) -> Tensor:
    """A permutation of 0..n-1: (n,) int64."""
    return torch.randperm(n, generator=generator(seed, stream))
