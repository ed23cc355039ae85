"""Precision and recall by nearest neighbours. The ranks share the rows.

Squared Euclidean distances are computed in float32 in blocks of a fixed size, so the number of ranks and the memory
change no bit. ADM's evaluator computes them in float16 first. That raises precision by about 0.001 and recall by about
0.0025. `float16` emulates it, apart from TensorFlow's order of sums.

N, M rows · D feature channels · k neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from eval.metrics.config import Distances
from sfd_scale.runtime import distributed
from sfd_scale.runtime.matmul import strict_float32
from sfd_scale.runtime.progress import progress

ROWS, COLUMNS = 2500, 10_000


class PrecisionRecall(NamedTuple):
    precision: float
    recall: float


def precision_recall(samples: Tensor, reference: Tensor, k: int, distances: Distances = "float32") -> PrecisionRecall:
    """The fraction of samples (N, D) inside the manifold of the reference (M, D), and the reverse.

    arXiv 1904.06991, Eq. 2. The neighbourhood of a row reaches to its k-th nearest other row of the same set. All ranks
    have to call this with the same rows.

    Raises:
        ValueError: if a set has at most k rows.
    """
    for name, rows in (("samples", samples), ("reference images", reference)):
        if len(rows) <= k:
            raise ValueError(f"precision and recall with {k} neighbours need more than {k} {name}, not {len(rows)}")
    own = 2 * (_blocks_of_this_rank(samples) + _blocks_of_this_rank(reference))
    with strict_float32(samples.device), progress(own, "precision and recall", "blocks") as bar:
        near_reference, near_samples = (radii(rows, k, distances, bar.advance) for rows in (reference, samples))
        precise, recalled = (
            within(samples, reference, near_reference, distances, bar.advance),
            within(reference, samples, near_samples, distances, bar.advance),
        )
    return PrecisionRecall(precise.double().mean().item(), recalled.double().mean().item())


def radii(rows: Tensor, k: int, distances: Distances = "float32", done: Callable[[], None] | None = None) -> Tensor:
    """The squared distance of each row (N, D) to its k-th nearest other row (arXiv 1904.06991, Eq. 1): (N,).

    Args:
        done: called after each block.
    """

    between = _BETWEEN[distances]

    def block(part: Tensor) -> Tensor:
        best = part.new_empty(len(part), 0)
        for others in rows.split(COLUMNS):
            # The row itself is among them at distance 0, so keep the k + 1 smallest.
            both = torch.cat([best, between(part, others)], dim=1)
            best = both.topk(min(k + 1, both.shape[1]), dim=1, largest=False).values
        return best.amax(1)

    return over_ranks(rows, block, done)


def within(
    rows: Tensor, centres: Tensor, radius: Tensor, distances: Distances = "float32",
    done: Callable[[], None] | None = None,
) -> Tensor:  # fmt: skip
    """Whether each row (N, D) is in the neighbourhood of any centre (M, D) with squared radius (M,): (N,) bool.

    arXiv 1904.06991, Eq. 1.

    Args:
        done: called after each block.
    """

    between = _BETWEEN[distances]

    def block(part: Tensor) -> Tensor:
        found = torch.zeros(len(part), dtype=torch.bool, device=part.device)
        for others, reach in zip(centres.split(COLUMNS), radius.split(COLUMNS), strict=True):
            found |= (between(part, others) <= reach).any(1)
        return found

    return over_ranks(rows, block, done)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a|² − 2·a·b + |b|², not below 0, float32: (N, M)."""
    a, b = a.float(), b.float()
    product = a @ b.T
    return product.mul_(-2).add_(a.square().sum(1)[:, None]).add_(b.square().sum(1)).clamp_(min=0)


def half_distances(a: Tensor, b: Tensor) -> Tensor:
    """`squared_distances` with every value rounded to float16, as in ADM's evaluator on TensorFlow: (N, M) float32.

    The rounding step is 0.5 at 875, and the distance of a row to itself can be 1. A block that overflows is computed in
    float32.
    """
    a16, b16 = a.half(), b.half()
    product = (a16.float() @ b16.float().T).half()
    own, other = (rows.square().float().sum(1).half() for rows in (a16, b16))
    found = (own[:, None] - 2 * product + other).float()
    return found.clamp_(min=0) if bool(found.isfinite().all()) else squared_distances(a, b)


_BETWEEN: dict[Distances, Callable[[Tensor, Tensor], Tensor]] = {
    "float32": squared_distances, "float16": half_distances,
}  # fmt: skip


def over_ranks(rows: Tensor, block: Callable[[Tensor], Tensor], done: Callable[[], None] | None = None) -> Tensor:
    """Apply `block` to fixed blocks of rows, each on one rank. All ranks get the results in order."""
    parts = rows.split(ROWS)
    mine: dict[int, Tensor] = {}
    for number in range(distributed.rank(), len(parts), distributed.world_size()):
        mine[number] = block(parts[number]).cpu()
        if done is not None:
            done()
    everything: dict[int, Tensor] = {}
    for share in distributed.all_gather_object(mine):
        everything.update(share)
    return torch.cat([everything[number] for number in range(len(parts))]).to(rows.device)


def _blocks_of_this_rank(rows: Tensor) -> int:
    return len(range(distributed.rank(), -(-len(rows) // ROWS), distributed.world_size()))
