"""How a global batch is divided over ranks and gradient accumulation.

Imports no torch, so that launchers can check the world size before they start ranks.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchSplit:
    """micro_batch: samples of one forward pass on one rank. grad_accum_steps: forward passes per optimizer step."""

    micro_batch: int
    grad_accum_steps: int
    world_size: int

    @property
    def global_batch(self) -> int:
        """Samples per optimizer step, over all ranks."""
        return self.micro_batch * self.grad_accum_steps * self.world_size


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def split_batch(global_batch: int, micro_batch: int | None, world_size: int) -> BatchSplit:
    """Divide a global batch without a remainder.

    Args:
        micro_batch: the largest micro-batch that fits in memory; None takes a rank's whole batch at once.

    Raises:
        ValueError: if it does not divide; names the possible world sizes or micro-batches.
    """
    possible = divisors(global_batch)
    if world_size < 1:
        raise ValueError(f"{world_size} ranks; allowed: 1 and up")
    if global_batch % world_size:
        below = max(n for n in possible if n <= world_size)
        above = next((n for n in possible if n > world_size), None)
        nearest = f"{below}" if above is None else f"{below} or {above}"
        raise ValueError(
            f"train.global_batch: {global_batch} does not divide over {world_size} ranks; allowed: {possible} ranks, "
            f"nearest: {nearest}"
        )
    per_rank = global_batch // world_size
    micro = per_rank if micro_batch is None else min(micro_batch, per_rank)
    if per_rank % micro:
        allowed = [n for n in possible if per_rank % n == 0]
        raise ValueError(
            f"train.micro_batch: {micro} does not divide the {per_rank} samples of a rank; allowed here: {allowed}"
        )
    return BatchSplit(micro, per_rank // micro, world_size)
