"""Threads that download the shards of the known order before they are needed."""

from __future__ import annotations

import atexit
import itertools
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from sfd_scale.data.cache import ShardCache
from sfd_scale.data.download import Cancelled, FetchError
from sfd_scale.data.order import SampleOrder, ShardUses
from sfd_scale.runtime.batch_split import BatchSplit

logger = logging.getLogger(__name__)
KEEP_STEPS = 16  # for which a shard stays after its last use: other ranks of the node may be some steps behind
_MEASURED_EPOCHS = 2  # in which the shards in use at the same time are counted; the epochs differ by a few shards
THREADS, THREADS_PER_NODE = 8, 64
# The thread that plans runs code of PyTorch, and ends after a step of the plan. The others may wait for a server.
_PLAN_END_S, _FETCH_END_S = 30.0, 2.0
_RETRY_S = 0.2  # until a shard that another process downloads is looked at again


def ranks_part(ids: Tensor, split: BatchSplit, rank: int, ranks: int = 1) -> Tensor:
    """The samples of `ranks` neighbouring ranks, from global batches (…, G) → (…, n).

    A global batch is cut into micro-batches in the order of (accumulation step, rank).
    """
    micro = split.micro_batch
    parts = ids.unflatten(-1, (split.grad_accum_steps, split.world_size * micro))
    return parts[..., rank * micro : (rank + ranks) * micro].flatten(-2)


class ShardSchedule:
    """When the ranks of one node need each shard.

    Args:
        shards: name and bytes of each shard, in the order of the samples.
        rank: this rank.
        node_ranks: the number of ranks on each node; ranks are numbered node by node.

    Attributes:
        step: the data step that this rank reads now.
    """

    def __init__(
        self, order: SampleOrder, shards: Sequence[tuple[str, int]], split: BatchSplit, rank: int, node_ranks: int
    ) -> None:
        self.order, self.split, self.rank, self.node_ranks = order, split, rank, node_ranks
        self.names, self.sizes = [name for name, _ in shards], [size for _, size in shards]
        self.step = 0
        self._numbers = {name: number for number, name in enumerate(self.names)}
        self._uses: dict[int, ShardUses] = {}
        self._lock = threading.Lock()

    def plan(self, first_step: int, data_step: Callable[[int], int]) -> Iterator[tuple[int, list[str]]]:
        """Each training step, and the shards that this rank needs in it for the first time in its epoch, without end.

        Args:
            data_step: training step → data step.
        """
        seen, seen_epoch = set[int](), -1
        for step in itertools.count(first_step):
            epoch, ids = self.order.batch(data_step(step))
            if epoch != seen_epoch:
                seen, seen_epoch = set(), epoch
            numbers = dict.fromkeys(self.order.shards(ranks_part(ids, self.split, self.rank)).tolist())
            yield step, [self.names[number] for number in numbers if number not in seen]
            seen.update(numbers)

    def next_use(self, name: str) -> float:
        """The data step in which this node needs a shard next; math.inf if that is not in this epoch or the next.

        After its last use in an epoch a shard stays for ranks that are behind. Its step is then invented: it is deleted
        before shards that this rank needs soon, and the longer ago its last use, the earlier.
        """
        epoch, step = divmod(self.step, self.order.steps_per_epoch)
        number, base = self._numbers[name], epoch * self.order.steps_per_epoch
        uses = self._epoch_uses(epoch)
        if step <= (last := float(uses.last[number])):
            return base + max(step, float(uses.first[number]))
        later = base + self.order.steps_per_epoch + float(self._epoch_uses(epoch + 1).first[number])
        if last >= 0 and step <= last + KEEP_STEPS:
            return min(later, base + step + KEEP_STEPS + (step - last))
        return later

    def bytes_in_use(self) -> int:
        """The largest size of the shards that this node needs at the same time, in the first epochs."""
        return max(self._epoch_uses(epoch).most_bytes(self.sizes, KEEP_STEPS) for epoch in range(_MEASURED_EPOCHS))

    def _epoch_uses(self, epoch: int) -> ShardUses:
        with self._lock:
            if epoch not in self._uses:
                self._uses = {known: uses for known, uses in self._uses.items() if known >= epoch - 1}
                first_rank = self.rank // self.node_ranks * self.node_ranks
                ids = ranks_part(self.order.epoch(epoch), self.split, first_rank, self.node_ranks)
                self._uses[epoch] = ShardUses.of(self.order.shards(ids), self.order.num_shards)
            return self._uses[epoch]


class ShardPrefetcher:
    """Downloads shards in the order of their first need, up to a number of bytes ahead of the step.

    Processes of a node share the work: a shard that another process downloads is left to it.

    Args:
        plan: each step, and the shards that are needed in it for the first time, without end.
        node_ranks: the number of ranks on this node; each downloads its part of the bytes ahead.
    """

    def __init__(
        self, cache: ShardCache, plan: Iterator[tuple[int, list[str]]], first_step: int, node_ranks: int
    ) -> None:
        self._cache, self._plan, self._look_ahead = cache, plan, cache.look_ahead // node_ranks
        threads = max(1, min(THREADS, THREADS_PER_NODE // node_ranks))
        self._condition = threading.Condition()
        self._step = first_step
        self._queue: deque[tuple[float, str]] = deque()  # (time of the next look, name)
        self._ahead: deque[tuple[int, int]] = deque()  # (step, bytes) of the planned shards
        self._ahead_bytes = 0
        self._closed = threading.Event()
        names = ["shard-plan", *(f"shard-fetch-{number}" for number in range(threads))]
        self._threads = [
            threading.Thread(target=self._fetch_all if number else self._walk, name=name, daemon=True)
            for number, name in enumerate(names)
        ]
        for thread in self._threads:
            thread.start()
        _LIVE.add(self)

    def advance(self, step: int) -> None:
        """The training is at this step now."""
        with self._condition:
            self._step = step
            self._condition.notify_all()

    def close(self) -> None:
        """End the threads; downloads in progress are broken off at their next piece."""
        self._closed.set()
        with self._condition:
            self._condition.notify_all()

    def join(self) -> None:
        """Wait for the threads after `close`, for a limited time."""
        now = time.monotonic()
        for number, thread in enumerate(self._threads):
            end = now + (_FETCH_END_S if number else _PLAN_END_S)
            thread.join(max(0.0, end - time.monotonic()))

    def _walk(self) -> None:
        for step, names in self._plan:
            if self._closed.is_set():
                return
            for name in names:
                self._queue_shard(step, name)

    def _queue_shard(self, step: int, name: str) -> None:
        """Give a shard to the threads that download, when it is near enough."""
        size = self._cache.shards[name].bytes or 0
        with self._condition:
            while not self._closed.is_set() and not self._has_room(size):
                self._condition.wait()
            self._ahead.append((step, size))
            self._ahead_bytes += size
            self._queue.append((0.0, name))
            self._condition.notify()

    def _has_room(self, size: int) -> bool:
        while self._ahead and self._ahead[0][0] <= self._step:
            self._ahead_bytes -= self._ahead.popleft()[1]
        return not self._ahead or self._ahead_bytes + size <= self._look_ahead

    def _fetch_all(self) -> None:
        while (name := self._take()) is not None:
            try:
                done = self._cache.fetch_ahead(name, self._closed.is_set)
            except Cancelled:
                return
            except FetchError as error:
                if not error.is_transient:
                    self.close()  # every other shard would fail too; the reader raises the error
                logger.warning("%s", error)
                continue
            if not done:
                with self._condition:
                    self._queue.append((time.monotonic() + _RETRY_S, name))
                    self._condition.notify()

    def _take(self) -> str | None:
        """The next shard; waits for one. None after `close`."""
        with self._condition:
            while not self._closed.is_set():
                now = time.monotonic()
                for place, (due, name) in enumerate(self._queue):
                    if due <= now:
                        del self._queue[place]
                        return name
                self._condition.wait(_RETRY_S if self._queue else None)
            return None


_LIVE: weakref.WeakSet[ShardPrefetcher] = weakref.WeakSet()


@atexit.register
def _end_threads() -> None:
    """The interpreter must not end while a thread is in a library written in C++: that would abort the process."""
    live = list(_LIVE)
    for prefetcher in live:
        prefetcher.close()
    for prefetcher in live:
        prefetcher.join()
