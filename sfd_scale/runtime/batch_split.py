"""How a global batch is divided over ranks. Without torch, so that launchers can ask before anything is started."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchSplit:
    """global batch = micro_batch × accumulation × world_size, exactly."""

    micro_batch: int
    grad_accum_steps: int
    world_size: int


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def split_batch(global_batch: int, micro_batch: int | None, world_size: int) -> BatchSplit:
    """Divide the global batch; refuses what does not divide and says which world sizes do.

    Raises:
        ValueError: naming the possible world sizes or micro-batches.
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
            f"of which {nearest} is nearest"
        )
    share = global_batch // world_size
    # The recipe's micro-batch is a limit of memory: a rank whose whole share is smaller takes it at once.
    micro = share if micro_batch is None else min(micro_batch, share)
    if share % micro:
        allowed = [n for n in possible if share % n == 0]
        raise ValueError(
            f"train.micro_batch: {micro} does not divide the {share} samples of a rank; allowed here: {allowed}"
        )
    return BatchSplit(micro, share // micro, world_size)
