"""Heartbeat: every rank publishes its step and operation, so that the message of a hang names the missing ranks.

A collective that times out says only that it timed out. Each rank therefore writes its position to the store of the
process group every few seconds, from a thread. When a collective fails or lasts too long, the other ranks' positions
are read from the store, and the ranks that did not arrive are named.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from enum import Enum
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed as dist

from sfd_scale.runtime import distributed

logger = logging.getLogger(__name__)
T = TypeVar("T")
_MAX_NAMED_RANKS = 8


class Operation(Enum):
    """What a rank is doing. The order is that of the training loop, which counts a step before it agrees and logs."""

    START = "start"
    AGREEMENT = "agreement"
    METRICS = "metrics"
    CHECKPOINT = "checkpoint"
    DATA = "waiting for data"
    FORWARD_BACKWARD = "forward and backward"
    OPTIMIZER = "optimizer step"
    ROLLBACK = "going back to a checkpoint"
    END = "the end of the run"

    @property
    def exempt(self) -> bool:
        """Whether it may last longer than the timeout: a slow file system is not a hang."""
        return self in (Operation.START, Operation.CHECKPOINT, Operation.ROLLBACK)

    @property
    def order(self) -> int:
        return list(Operation).index(self)


class CollectiveError(RuntimeError):
    """A collective failed or timed out. The message names the operation and the missing ranks."""


class Heartbeat:
    """A context manager around a training loop, which calls `enter` before each operation.

    If a collective raises inside the block, the block raises CollectiveError. Some hangs raise nothing: DeepSpeed's CPU
    collectives have no timeout. Those end after twice `timeout_s`: the message is logged and the process exits with
    code 1. An exempt operation may last longer, but only while the store answers and the other ranks send heartbeats:
    otherwise a host or its network is gone.

    Args:
        timeout_s: timeout of the process group.
        interval_s: seconds between two heartbeats.
    """

    def __init__(self, timeout_s: float, interval_s: float = 5.0) -> None:
        self.timeout_s, self.interval_s = timeout_s, min(interval_s, timeout_s / 4)
        self._at = (0, Operation.START, time.monotonic())
        self._done, self._warned = threading.Event(), False
        self._thread: threading.Thread | None = None
        self._store: Any = None
        self._request: threading.Thread | None = None
        self._answered = time.monotonic()
        self._seen: dict[int, tuple[bytes, float]] = {}  # the last heartbeat of each rank, and since when
        self._looked = time.monotonic()  # at the heartbeats of the others

    def enter(self, step: int, operation: Operation) -> None:
        """This rank begins an operation of a step."""
        self._at = (step, operation, time.monotonic())

    def __enter__(self) -> Heartbeat:
        if dist.is_initialized() and dist.get_world_size() > 1:
            store = dist.distributed_c10d._get_default_store()
            # A clone has its own connection, so that this thread does not wait for requests of the main thread.
            self._store = dist.PrefixStore("sfd_scale.heartbeat", store.clone())  # type: ignore[attr-defined]
            self._beat()  # before the thread starts, so that the others know this rank's host from the beginning
            self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        if error is None and self._thread is not None:
            self._thread.join(2 * self.interval_s)  # it may ask the store, which takes one request at a time
            self.enter(self._at[0], Operation.END)  # the others need not wait for heartbeats
            self._beat()
        if error is not None and self._thread is not None and _is_collective(error):
            first_line = str(error).strip().splitlines()[0][:200]
            raise CollectiveError(f"{self.explain()} ({type(error).__name__}: {first_line})") from error

    def explain(self) -> str:
        """Where this rank waits, and which ranks have not arrived there."""
        step, operation, since = self._at
        own = (
            f"rank {distributed.rank()} waits in {operation.value!r} of step {step} for "
            f"{time.monotonic() - since:.0f} s"
        )
        try:
            self._with_deadline(self._publish)
            missing = self._with_deadline(lambda: self._missing_ranks(step, operation))
        except TimeoutError:
            silent = time.monotonic() - self._answered
            return (
                f"{own}; the store of the process group does not answer. Rank 0 or its launcher serves the store; its "
                f"last answer was {silent:.0f} s ago"
            )
        except (dist.DistError, RuntimeError) as error:
            return f"{own}; the store of the process group is gone, and so is rank 0 or its launcher ({error})"
        return f"{own} for {missing}" if missing else f"{own}; no rank is behind it"

    def all_arrive(self, place: str, within_s: float) -> bool:
        """Whether every rank calls this with the same `place` in time. It needs no collective, in which other ranks may
        be."""
        if self._store is None:
            return True
        own, all_ = f"{place}/{distributed.rank()}", [f"{place}/{rank}" for rank in range(distributed.world_size())]
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            try:
                self._with_deadline(lambda: self._store.set(own, "here"))
                if self._with_deadline(lambda: self._store.check(all_)):
                    return True
            except TimeoutError:  # also if the heartbeat itself is asking
                logger.debug("the store does not answer", exc_info=True)
            except (dist.DistError, RuntimeError):
                return False
            time.sleep(0.2)
        return False

    def _with_deadline(self, request: Callable[[], T]) -> T:
        """The result of a request to the store, made in a thread: a request to a stopped process waits for ever.

        Raises:
            TimeoutError: if there is no answer after `interval_s`, or an earlier request still waits.
        """
        if self._request is not None and self._request.is_alive():
            raise TimeoutError
        answers: list[T] = []
        errors: list[Exception] = []

        def make() -> None:
            try:
                answers.append(request())
            except (dist.DistError, RuntimeError) as error:
                errors.append(error)

        self._request = threading.Thread(target=make, name="heartbeat-store", daemon=True)
        self._request.start()
        self._request.join(self.interval_s)
        if errors:
            raise errors[0]
        if not answers:
            raise TimeoutError
        self._answered = time.monotonic()
        return answers[0]

    def _beat(self) -> None:
        try:
            self._with_deadline(self._publish)
        except (dist.DistError, RuntimeError, TimeoutError):
            logger.debug("heartbeat: the store does not answer", exc_info=True)

    def _publish(self) -> None:
        step, operation, since = self._at
        note = {"step": step, "operation": operation.value, "seconds": time.monotonic() - since, "time": time.time()}
        self._store.set(str(distributed.rank()), json.dumps({**note, "host": socket.gethostname()}))

    def _missing_ranks(self, step: int, operation: Operation) -> str:
        found = []
        for rank in range(distributed.world_size()):
            if rank == distributed.rank():
                continue
            if not self._store.check([str(rank)]):
                found.append(f"rank {rank}, which has sent no heartbeat")
                continue
            note = json.loads(self._store.get(str(rank)))
            silent, at = time.time() - note["time"], Operation(note["operation"])
            where = f"rank {rank} on {note['host']}, in {at.value!r} of step {note['step']}"
            if silent > 3 * self.interval_s + 1:
                found.append(f"{where} at its last heartbeat {silent:.0f} s ago")
            elif (note["step"], at.order) < (step, operation.order):
                found.append(f"{where} for {note['seconds']:.0f} s")
        more = f" and {len(found) - _MAX_NAMED_RANKS} more" if len(found) > _MAX_NAMED_RANKS else ""
        return "; ".join(found[:_MAX_NAMED_RANKS]) + more

    def _cut_off(self) -> bool:
        """Whether the store, or a rank that has not ended, has given no sign for twice `timeout_s`. It looks four times
        in `timeout_s`, as hundreds of ranks ask the store about hundreds.

        This rank's own clock counts since when a heartbeat is the same: clocks of hosts differ, and can be set.
        """
        now = time.monotonic()
        if now - max(self._looked, self._at[2]) < self.timeout_s / 4:
            return False
        self._looked = now
        try:
            heartbeats = self._with_deadline(self._heartbeats)
        except (dist.DistError, RuntimeError, TimeoutError):
            return now - self._answered > 2 * self.timeout_s
        for rank, note in heartbeats.items():
            if rank not in self._seen or self._seen[rank][0] != note:
                self._seen[rank] = (note, now)
        running = [rank for rank, note in heartbeats.items() if json.loads(note)["operation"] != Operation.END.value]
        return any(now - self._seen[rank][1] > 2 * self.timeout_s for rank in running)

    def _heartbeats(self) -> dict[int, bytes]:
        others = [rank for rank in range(distributed.world_size()) if rank != distributed.rank()]
        return {rank: self._store.get(str(rank)) for rank in others if self._store.check([str(rank)])}

    def _run(self) -> None:
        while not self._done.wait(self.interval_s):
            self._beat()
            _, operation, since = self._at
            waited = time.monotonic() - since
            if self._done.is_set():
                continue
            if operation.exempt:
                if self._cut_off():
                    logger.critical("%s; exiting because no sign came from there", self.explain())
                    os._exit(1)
                continue
            if waited > self.timeout_s / 2 and not self._warned:
                self._warned = True
                logger.warning("%s", self.explain())
            if waited > 2 * self.timeout_s:
                logger.critical("%s; exiting because of this hang", self.explain())
                os._exit(1)


def _is_collective(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return True
    words = ("gloo", "nccl", "timed out waiting", "connection closed by peer", "connection reset by peer")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
