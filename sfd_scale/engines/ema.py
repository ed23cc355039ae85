"""Exponential moving averages (EMA) of the weights in fp32, sharded: each rank averages its own fragments.

Samples come from the average with constant decay. A run can also keep averages with power-function profiles (EDM2,
arXiv 2312.02696, section 3). From their snapshots, `checkpoint.posthoc` makes an average of any length after training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from sfd_scale.engines.engine import Engine, Fragment
from sfd_scale.runtime.settings import at_least

PART = "ema"  # stored name of the average that is exported by default


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """`warmup` shortens the average at first: decay min(decay, (1 + step) / (10 + step)).

    lengths: relative standard deviations sigma_rel of the power-function averages; EDM2 keeps two, (0.05, 0.10). Each
        takes as much memory as the fp32 weights, sharded.
    snapshot_every: steps between two snapshots of the power-function averages.
    """

    decay: float = 0.9999
    warmup: bool = False
    lengths: tuple[float, ...] = ()
    snapshot_every: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay: {self.decay}; allowed: in [0, 1)")
        for length in self.lengths:
            check_length("lengths", length)
        if len({part_name(length) for length in self.lengths}) < len(self.lengths):
            raise ValueError(f"lengths: {self.lengths}; allowed: numbers that differ by at least 0.001")
        if (self.snapshot_every is None) == bool(self.lengths):
            raise ValueError(
                f"snapshot_every: {self.snapshot_every} with lengths {self.lengths}; allowed: both, or neither"
            )
        at_least(self, snapshot_every=1)


def part_name(length: float) -> str:
    """The name under which the average of this length is stored."""
    return f"{PART}_{length:.3f}"


def length_of(part: str) -> float | None:
    """The sigma_rel of a stored part; None for any other part. Inverse of `part_name`."""
    text = part.removeprefix(f"{PART}_")
    return None if text == part else float(text)


def decay_at(config: EMAConfig, step: int) -> float:
    """The decay of the update after step 0, 1, …"""
    return min(config.decay, (1 + step) / (10 + step)) if config.warmup else config.decay


def check_length(name: str, length: float) -> None:
    """Raise ValueError for a sigma_rel that is too large for an exponent of 0 and up, or too small to be useful."""
    if not 1e-3 <= length <= 0.288:
        raise ValueError(f"{name}: {length}; allowed: a relative standard deviation in [0.001, 0.288]")


def power_exponent(length: float) -> float:
    """gamma of the profile p(tau) ∝ tau^gamma on [0, t] whose standard deviation is `length` · t.

    sigma_rel² = (gamma + 1) / ((gamma + 2)² (gamma + 3)) (EDM2, equation 3 of section 3.1). It decreases from 1/12 at
    gamma = 0, so bisection solves it.
    """
    low, high = 0.0, 2.0 / length
    for _ in range(200):
        gamma = 0.5 * (low + high)
        wider = math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2) > length
        low, high = (gamma, high) if wider else (low, gamma)
    return 0.5 * (low + high)


def power_weight(gamma: float, step: int) -> float:
    """1 - beta of the update after step 0, 1, …: beta = (1 - 1/t)^(gamma + 1), t = step + 1 (EDM2, equation 2)."""
    return 1.0 if step == 0 else -math.expm1((gamma + 1) * math.log1p(-1.0 / (step + 1)))


class EMA:
    """Averages of the fp32 master weights: one tensor per fragment, with the fragment's shape and device.

    An average of bf16 weights would not work: an update of 1e-4 of the difference is lost when it is rounded to bf16.

    Attributes:
        averages: stored name → tensors, in the order of the fragments.
    """

    def __init__(self, fragments: Sequence[Fragment], config: EMAConfig) -> None:
        self.config = config
        self._weights = [fragment.param for fragment in fragments]
        self._primary = [fragment.primary for fragment in fragments]
        self._exponents = [power_exponent(length) for length in config.lengths]
        parts = [PART, *map(part_name, config.lengths)]
        self.averages = {part: [weight.clone() for weight in self._weights] for part in parts}

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The average with constant decay."""
        return self.averages[PART]

    @property
    def powers(self) -> dict[str, list[torch.Tensor]]:
        """The averages with power-function profiles."""
        return {part: tensors for part, tensors in self.averages.items() if part != PART}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after step `step` (0, 1, …) to all averages, in one fused pass."""
        if not self._weights:  # with many ranks, a small model leaves some without a fragment
            return
        rates = [1.0 - decay_at(self.config, step), *(power_weight(gamma, step) for gamma in self._exponents)]
        torch._foreach_lerp_(
            [tensor for tensors in self.averages.values() for tensor in tensors],
            self._weights * len(rates),
            [rate for rate in rates for _ in self._weights],
        )

    @torch.no_grad()
    def squares(self) -> Tensor:
        """(‖EMA − weights‖², ‖weights‖²) over this rank's primary fragments, (2,) float64.

        The sums over all ranks give the relative distance of the average from the weights.
        """
        counted = [(a, w) for a, w, own in zip(self.tensors, self._weights, self._primary, strict=True) if own]
        if not counted:
            return torch.zeros(2, dtype=torch.float64)
        # Squares of the fp32 norm of each fragment need no float64 copy of the whole shard.
        distances = [torch.linalg.vector_norm(a - w) for a, w in counted]
        norms = torch._foreach_norm([w for _, w in counted])
        return torch.stack([torch.stack(list(n)).double().square().sum() for n in (distances, norms)])

    @contextmanager
    def swapped(self, engine: Engine) -> Iterator[None]:
        """Swap the average and the weights inside the `with` block, to evaluate the average."""
        self._swap(engine)
        try:
            yield
        finally:
            self._swap(engine)

    @torch.no_grad()
    def _swap(self, engine: Engine) -> None:
        for average, weight in zip(self.tensors, self._weights, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
        engine.after_load()
