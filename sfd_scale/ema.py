"""Exponential moving average of the weights, in fp32, over this rank's fragments: nothing is gathered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from sfd_scale.engines.engine import Engine, Fragment


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """`warmup` averages faster at first: decay min(decay, (1 + step) / (10 + step))."""

    decay: float = 0.9999
    warmup: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay: {self.decay}; allowed: in [0, 1)")


def decay_at(config: EMAConfig, step: int) -> float:
    """The decay of the update after step 0, 1, …"""
    return min(config.decay, (1 + step) / (10 + step)) if config.warmup else config.decay


class EMA:
    """Averages of the fp32 master weights, one tensor a fragment, on the device and in the shape of the fragment.

    The masters, not the bf16 weights: steps of 1e-4 of the difference vanish when they are rounded to bf16.
    """

    def __init__(self, fragments: Sequence[Fragment], config: EMAConfig) -> None:
        self.config = config
        self._weights = [fragment.param for fragment in fragments]
        self.tensors = [weight.clone() for weight in self._weights]
        self._primary = [fragment.primary for fragment in fragments]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average in the weights as they are after step `step`."""
        if self.tensors:  # a rank of many may hold no part of a small model
            torch._foreach_lerp_(self.tensors, self._weights, 1.0 - decay_at(self.config, step))

    @torch.no_grad()
    def squares(self) -> Tensor:
        """(‖EMA − weights‖², ‖weights‖²) over the parts that this rank counts, (2,) float64; their sums over ranks give
        the relative distance of the average from the weights."""
        counted = [(a, w) for a, w, own in zip(self.tensors, self._weights, self._primary, strict=True) if own]
        if not counted:
            return torch.zeros(2, dtype=torch.float64)
        # Squares of fp32 norms of single fragments: no copy in float64 of a whole shard.
        distances = torch._foreach_norm([a - w for a, w in counted])
        norms = torch._foreach_norm([w for _, w in counted])
        return torch.stack([torch.stack(list(n)).double().square().sum() for n in (distances, norms)])

    @contextmanager
    def swapped(self, engine: Engine) -> Iterator[None]:
        """Evaluate with the averages: they and the weights change places until the end of the block."""
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
