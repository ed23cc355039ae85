"""The Kernel Inception Distance (KID) of features. N samples · M reference images · D feature channels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eval.metrics.one_thread import one_thread
from sfd_scale.runtime import seeding


class KernelDistance(NamedTuple):
    """Mean and standard deviation over the subsets."""

    mean: float
    std: float


def kernel_distance(samples: Tensor, reference: Tensor, subsets: int, size: int, seed: int = 0) -> KernelDistance:
    """Unbiased MMD² with the kernel (x·y / D + 1)³ over seeded subsets of `size` rows (arXiv 1801.01401, Sec. 4).

    Args:
        samples, reference: (N, D) and (M, D).
    """
    size = min(size, len(samples), len(reference))
    values = []
    with one_thread():
        for number in range(subsets):
            x = samples[_subset(seed, "kid_samples", number, len(samples), size)].double()
            y = reference[_subset(seed, "kid_reference", number, len(reference), size)].double()
            values.append(_squared_mmd(x, y))
    result = torch.stack(values)
    return KernelDistance(result.mean().item(), result.std(correction=0).item())


def _subset(seed: int, stream: str, number: int, count: int, size: int) -> Tensor:
    return torch.randperm(count, generator=seeding.generator(seed, stream, number))[:size]


def _squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    size, dim = x.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / dim + 1) ** 3

    within = sum((k.sum() - k.diagonal().sum() for k in (kernel(x, x), kernel(y, y))), torch.zeros(()).to(x))
    return within / (size * (size - 1)) - 2 * kernel(x, y).mean()
