"""`batch: auto`: the largest batch that fits the memory of every rank's GPU."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator

import torch

from sfd_scale.runtime import distributed

logger = logging.getLogger(__name__)
STEP, MOST = 8, 1024
SHARE = 0.85  # of the free memory; the rest is for differences between batches


def fitting_batch(peak: Callable[[int], int], budget: int) -> int:
    """The largest multiple of 8, up to 1,024, whose `peak` memory in bytes stays within `budget`.

    Two small batches show how memory grows. The batch that follows from them is tried, and reduced until it fits.

    Raises:
        ValueError: if not even the smallest batch fits.
    """
    first, second = peak(STEP), peak(2 * STEP)
    if first > budget:
        raise ValueError(
            f"batch: {STEP} images take {first / 2**30:.1f} GiB of {budget / 2**30:.1f}; allowed: a smaller number"
        )
    growth = max((second - first) // STEP, 1)
    batch = min(MOST, STEP + (budget - first) // growth // STEP * STEP)
    while batch > STEP and peak(batch) > budget:
        batch = max(STEP, int(0.9 * batch) // STEP * STEP)
    return batch


def auto_batch(work: Callable[[int], Iterator[None]], device: torch.device) -> int:
    """The largest batch that fits on all ranks. All ranks have to call this; each tries batches.

    Args:
        work: a generator that does the work of a batch and yields after each part. The parts of two batches overlap in
            time, so their peaks add up.

    Raises:
        ValueError: on the CPU.
    """
    if device.type != "cuda":
        raise ValueError(
            "batch: auto measures the memory of a GPU, and there is none; allowed here: a number, such as 64"
        )

    def peak(batch: int) -> int:
        base = total = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        try:
            for _ in work(batch):
                total += torch.cuda.max_memory_allocated(device) - base
                torch.cuda.reset_peak_memory_stats(device)
            return total
        except torch.cuda.OutOfMemoryError:
            return 2**62
        finally:
            gc.collect()
            torch.cuda.empty_cache()

    free, _ = torch.cuda.mem_get_info(device)
    own = fitting_batch(peak, int(SHARE * (free + torch.cuda.memory_allocated(device))))
    batch = min(distributed.all_gather_object(own))
    logger.info("batch: %d fits the memory of %d ranks", batch, distributed.world_size())
    return batch
