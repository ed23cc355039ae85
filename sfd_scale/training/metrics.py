"""Metrics of a training run: losses, gradient norms, throughput, data wait, memory.

Between two logged steps nothing waits for the device: losses are summed there, and times are the host's. A logged step
costs two collectives.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sfd_scale.runtime import distributed
from sfd_scale.training.objective import LossTerms

CLOCK_BINS = 10
ClockLosses = list[tuple[float | None, int]]  # mean loss and number of samples in each tenth of the clock
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, kw_only=True)
class TrainingMetricsConfig:
    """`peak`: the FLOP/s that MFU is a fraction of.

    table: the manufacturer's figure; there is no MFU for a device that the table lacks.
    measured: the rate of one large matmul in the precision of the run, timed at the start.
    """

    peak: Literal["table", "measured"] = "table"


class TrainingMetrics:
    """Means of the finite values since the last `reduce`. A single value that is not finite would spoil the mean.

    Losses are named `loss` and, for its terms, `loss/velocity`, `loss/cosine`, ...

    Args:
        flops_per_sample: of forward and backward; 0 if unknown: no MFU.
        peak_flops: FLOP/s of one rank's device; infinite if unknown.
    """

    def __init__(
        self, *, device: torch.device | None = None, flops_per_sample: float = 0.0, peak_flops: float = math.inf
    ) -> None:
        self.device = torch.device("cpu") if device is None else device
        self.flops_per_sample, self.peak_flops = flops_per_sample, peak_flops
        self.clock_losses: ClockLosses | None = None  # of the last `reduce`; checkpoints record them
        self.reset()

    def reset(self) -> None:
        self.names: list[str] = []
        self.sums = torch.zeros(2, 0)  # the sum of each value, and the number of finite ones
        self.clock_sums = torch.zeros(2, CLOCK_BINS)
        self.step_s: list[float] = []
        self.grad_norms: list[float] = []
        self.samples, self.wait_s = 0, 0.0
        self.started = self.stepped = time.monotonic()

    def add(self, losses: LossTerms, samples: int, wait_s: float) -> None:
        """Count a micro-batch. This rank waited `wait_s` seconds for its data."""
        terms = {name if name == "loss" else f"loss/{name}": value for name, value in losses.terms.items()}
        named = terms | losses.measures
        counted = _counted(torch.stack([value.detach() for value in named.values()]))
        self.sums = self.sums + counted if self.names else counted
        self.names = list(named)
        if losses.clock is not None and losses.per_sample is not None:
            bins = (losses.clock * CLOCK_BINS).long().clamp_(0, CLOCK_BINS - 1)
            both = _counted(losses.per_sample)
            self.clock_sums = self.clock_sums.to(both.device).index_add_(1, bins, both)
        self.samples, self.wait_s = self.samples + samples, self.wait_s + wait_s

    def step(self, grad_norm: float) -> None:
        """Mark the end of an optimizer step. `grad_norm` is the norm before clipping."""
        now = time.monotonic()
        self.step_s.append(now - self.stepped)
        self.grad_norms.append(grad_norm)
        self.stepped = now

    def reduce(self, ema_squares: Tensor | None = None) -> dict[str, float | None]:
        """Means over micro-batches and ranks (None without a finite value), and the times of the slowest rank.

        A collective: all ranks call it at the same step.

        Args:
            ema_squares: this rank's part of (‖EMA − weights‖², ‖weights‖²); see EMA.squares.
        """
        elapsed = time.monotonic() - self.started
        world = distributed.world_size()
        squares = torch.zeros(2, dtype=torch.float64) if ema_squares is None else ema_squares
        host = torch.tensor([self.samples, self.wait_s / elapsed / world], dtype=torch.float64)
        summed = [self.sums.double(), self.clock_sums.double(), squares.double(), host]
        sums = distributed.all_reduce_sum(torch.cat([part.to(self.device).flatten() for part in summed])).cpu()
        means, clock, (distance, norm, samples, waited) = sums.split([2 * len(self.names), 2 * CLOCK_BINS, 4])
        values = {name: mean for name, (mean, _) in sorted(zip(self.names, _means(means), strict=True))}
        self.clock_losses = _means(clock)
        for index, (mean, _) in enumerate(self.clock_losses):
            if mean is not None:
                values[f"loss_by_clock/{index}"] = mean
        rate = samples.item() / elapsed
        values |= {
            "samples_per_s": rate, "samples_per_s_per_rank": rate / world, "data_wait_share": waited.item(),
            "mfu": self.mfu(rate / world),
        }  # fmt: skip
        if self.grad_norms:
            finite = [norm for norm in self.grad_norms if math.isfinite(norm)]
            values |= {"grad_norm": self.grad_norms[-1], "grad_norm_max": max(finite, default=None)}
        if ema_squares is not None and norm > 0:
            values["ema_distance"] = math.sqrt(distance / norm)
        values |= self._slowest(elapsed)
        self.reset()
        return values

    def mfu(self, samples_per_s: float) -> float | None:
        """Model FLOPs utilisation of one rank (arXiv 2204.02311, App. B); None if a rate is unknown."""
        if not (math.isfinite(self.peak_flops) and self.flops_per_sample):
            return None
        return samples_per_s * self.flops_per_sample / self.peak_flops

    def _slowest(self, elapsed: float) -> dict[str, float | None]:
        """Of values by which one rank can delay all others: the largest over the ranks."""
        own: dict[str, float | None] = {"data_wait_share_max": self.wait_s / elapsed, **memory_bytes(self.device)}
        if self.step_s:
            times = np.percentile(self.step_s, PERCENTILES).tolist()
            own |= {f"step_s/p{p}": value for p, value in zip(PERCENTILES, times, strict=True)}
        known = {name: value for name, value in own.items() if value is not None}
        largest = distributed.all_reduce_max(torch.tensor(list(known.values()), dtype=torch.float64)).tolist()
        return own | dict(zip(known, largest, strict=True))


def _counted(values: Tensor) -> Tensor:
    """(N,) → (2, N) float32: the values, with 0 for those that are not finite, and 1 for each finite one."""
    values = values.float()
    return torch.stack([values.nan_to_num(0.0, 0.0, 0.0), values.isfinite().float()])


def _means(sums: Tensor) -> list[tuple[float | None, int]]:
    """(2N,), N sums and N counts → the mean and the count of each."""
    return [(total / count if count else None, int(count)) for total, count in sums.view(2, -1).T.tolist()]


def memory_bytes(device: torch.device) -> dict[str, int | None]:
    """Peak memory since the start: of the accelerator's allocator, and of the process on the host."""
    cuda = device.type == "cuda"
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "memory_allocated_bytes": torch.cuda.max_memory_allocated(device) if cuda else None,
        "memory_reserved_bytes": torch.cuda.max_memory_reserved(device) if cuda else None,
        "memory_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }
