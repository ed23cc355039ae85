"""The order of samples: a pure function of the seed, the epoch and numbers of the recipe.

It does not depend on the world size, on gradient accumulation or on restarts. There are two orders. `blocks` shuffles
the shards, then the samples in each block. `window` shuffles in lanes with a sliding window; it is made for data that
arrives from an object store.

G global batch · N samples of the dataset · L lanes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfd_scale.runtime import seeding

Integers = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]
_GROWTH = 2.0  # samples by which the window grows for each sample of a lane, until it has its full size
_KEPT = 3  # epochs whose order is kept: threads that read ahead are in the next one


def block_order(seed: int, epoch: int, shard_sizes: Sequence[int], block: int) -> Tensor:
    """The order `blocks` of the samples in an epoch: (N,) int64.

    Shards are shuffled. Then the samples of each block of `block` consecutive samples are shuffled.
    """
    starts = torch.tensor([0, *shard_sizes]).cumsum(0)
    shards = seeding.permutation(seed, f"shards/{epoch}", len(shard_sizes)).tolist()
    sequence = torch.cat([torch.arange(int(starts[s]), int(starts[s + 1])) for s in shards])
    pieces = [
        piece[seeding.permutation(seed, f"samples/{epoch}/{number}", len(piece))]
        for number, piece in enumerate(sequence.split(block))
    ]
    return torch.cat(pieces)


def num_lanes(global_batch: int, lanes: int) -> int:
    """The number of lanes: the largest divisor of the global batch that is not above `lanes`."""
    return next(count for count in range(min(lanes, global_batch), 0, -1) if global_batch % count == 0)


def window_order(
    seed: int, epoch: int, shard_sizes: Sequence[int], global_batch: int, lanes: int, window: int
) -> Tensor:
    """The order `window` of the samples in an epoch: (N // G · G,) int64.

    The seed assigns each shard to a lane, for all epochs. (A shard at the border of two lanes is divided.) Sample j of
    a global batch comes from lane j·L // G, so ranks that take neighbouring samples read few lanes. In each epoch a
    lane shuffles its shards. Then sample i of the lane moves back by a random distance, up to the window of its place.
    The window begins with one shard and grows to `window` / L samples, so an epoch begins with few shards.

    Args:
        lanes: the number of lanes, a divisor of the global batch.
        window: samples over which a sample can move, in all lanes together.
    """
    count, steps = sum(shard_sizes), sum(shard_sizes) // global_batch
    share = global_batch // lanes
    own = [
        _lane_order(seed, epoch, lane, pieces, max(window // lanes, 1), max(shard_sizes))[: steps * share]
        for lane, pieces in enumerate(_lanes(seed, shard_sizes, [lane * count // lanes for lane in range(lanes + 1)]))
    ]
    return torch.stack(own).view(lanes, steps, share).transpose(0, 1).reshape(-1)


def _lanes(seed: int, shard_sizes: Sequence[int], bounds: Sequence[int]) -> Iterator[list[range]]:
    """The samples of each lane, in pieces of a shard: the shuffled shards are laid end to end and cut at `bounds`."""
    starts = [0, *np.cumsum(shard_sizes).tolist()]
    order = seeding.permutation(seed, "lanes", len(shard_sizes)).tolist()
    ends = np.cumsum([shard_sizes[shard] for shard in order]).tolist()
    for low, high in zip(bounds, bounds[1:], strict=False):
        pieces = []
        for shard, end in zip(order, ends, strict=True):
            begin = end - shard_sizes[shard]
            first, last = max(low, begin), min(high, end)
            if first < last:
                pieces.append(range(starts[shard] + first - begin, starts[shard] + last - begin))
        yield pieces


def _lane_order(seed: int, epoch: int, lane: int, pieces: Sequence[range], window: int, first: int) -> Tensor:
    shuffled = seeding.permutation(seed, f"lane_shards/{epoch}/{lane}", len(pieces)).tolist()
    ids = torch.cat([torch.arange(pieces[n].start, pieces[n].stop) for n in shuffled])
    place = torch.arange(len(ids), dtype=torch.float64)
    moves = torch.rand(len(ids), generator=seeding.generator(seed, f"lane_moves/{epoch}/{lane}"), dtype=torch.float64)
    reach = (min(first, window) + _GROWTH * place).clamp(max=window)
    return ids[torch.argsort(place + moves * reach, stable=True)]


class SampleOrder:
    """The order of all epochs. Several threads may use it.

    Args:
        make: epoch → its order; the first steps_per_epoch · G ids are used.
        shard_sizes: samples of each shard.
    """

    def __init__(self, make: Callable[[int], Tensor], global_batch: int, shard_sizes: Sequence[int]) -> None:
        self.make, self.global_batch = make, global_batch
        self.num_shards, self.steps_per_epoch = len(shard_sizes), sum(shard_sizes) // global_batch
        self._ends = np.cumsum(shard_sizes)
        self._epochs: dict[int, Tensor] = {}
        self._lock = threading.Lock()

    def batch(self, step: int) -> tuple[int, Tensor]:
        """The epoch of a global step, and the sample ids of its global batch: (G,) int64."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        return epoch, self.epoch(epoch)[batch]

    def epoch(self, epoch: int) -> Tensor:
        """The sample ids of an epoch: (steps, G) int64."""
        with self._lock:
            if epoch not in self._epochs:
                while len(self._epochs) >= _KEPT:
                    del self._epochs[next(iter(self._epochs))]
                ids = self.make(epoch)[: self.steps_per_epoch * self.global_batch]
                self._epochs[epoch] = ids.view(self.steps_per_epoch, self.global_batch)
            return self._epochs[epoch]

    def shards(self, ids: Tensor) -> Integers:
        """The shard number of each sample."""
        return np.searchsorted(self._ends, ids.numpy(), side="right")


@dataclass(frozen=True)
class ShardUses:
    """The first and the last step of an epoch in which one node reads each shard: (shards,) each.

    `first` is math.inf and `last` is -1 for a shard that it does not read.
    """

    first: Floats
    last: Floats

    @classmethod
    def of(cls, shards: Integers, count: int) -> ShardUses:
        """From the shard number of each sample of each step: (steps, n)."""
        steps = np.repeat(np.arange(shards.shape[0], dtype=np.float64), shards.shape[1])
        first, last = np.full(count, math.inf), np.full(count, -1.0)
        np.minimum.at(first, shards.reshape(-1), steps)
        np.maximum.at(last, shards.reshape(-1), steps)
        return cls(first, last)

    def most_bytes(self, sizes: Sequence[int], margin: int) -> int:
        """The size of the shards that are in use at the same time, where that is largest.

        Args:
            sizes: bytes of each shard.
            margin: steps for which a shard stays after its last use.
        """
        used = self.last >= 0
        own = np.asarray(sizes, dtype=np.int64)[used]
        times = np.concatenate([self.first[used], self.last[used] + 1 + margin])
        changes = np.concatenate([own, -own])
        order = np.lexsort((changes, times))  # what ends at a step makes room for what begins there
        return int(np.cumsum(changes[order]).max(initial=0))
