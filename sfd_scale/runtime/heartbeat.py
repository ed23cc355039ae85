"""Who holds the others up: every rank tells the others where it is, so that a hang has a name.

A collective that times out says only that it did. Each rank therefore writes its step and operation to the store of
the process group every few seconds, from a thread; when a collective fails, or lasts too long, the ranks that did not
arrive are read from there.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed as dist

from sfd_scale.runtime import distributed

logger = logging.getLogger(__name__)
T = TypeVar("T")
# In their order after the count of steps has gone up by one.
OPERATIONS = ("agreement", "metrics", "checkpoint", "waiting for data", "forward and backward", "optimizer step")


class CollectiveError(RuntimeError):
    """A collective failed or timed out; the message names the operation and the ranks that were missing."""


class Heartbeat:
    """Watches one training loop: a context manager around it, and `enter` before each operation.

    An exception of a collective leaves the block as CollectiveError. A hang that no timeout of a collective ends (the
    CPU collectives of DeepSpeed have none) is ended after twice `timeout_s`: the message is logged and the process
    leaves with code 1. Saving is exempt, as a slow disk is no hang.

    Args:
        timeout_s: that of the process group.
        interval_s: seconds between two notes of a rank.
    """

    def __init__(self, timeout_s: float, interval_s: float = 5.0) -> None:
        self.timeout_s, self.interval_s = timeout_s, min(interval_s, timeout_s / 4)
        self._at = (0, "start", time.monotonic())
        self._done, self._warned = threading.Event(), False
        self._thread: threading.Thread | None = None
        self._store: Any = None
        self._asking: threading.Thread | None = None
        self._answered = time.monotonic()

    def enter(self, step: int, operation: str) -> None:
        self._at = (step, operation, time.monotonic())

    def __enter__(self) -> Heartbeat:
        if dist.is_initialized() and dist.get_world_size() > 1:
            store = dist.distributed_c10d._get_default_store()
            # A connection of its own: the thread must not wait for what the main thread waits for.
            self._store = dist.PrefixStore("sfd_scale.heartbeat", store.clone())  # type: ignore[attr-defined]
            self._tell()  # at once, so that a rank that stops in its first seconds has a host too
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        if error is not None and self._thread is not None and _is_collective(error):
            first_line = str(error).strip().splitlines()[0][:200]
            raise CollectiveError(f"{self.explain()} ({type(error).__name__}: {first_line})") from error

    def explain(self) -> str:
        """Where this rank is, and which ranks are not there."""
        step, operation, since = self._at
        own = f"rank {distributed.rank()} waits in {operation!r} of step {step} for {time.monotonic() - since:.0f} s"
        try:
            self._ask(self._note)
            others = self._ask(lambda: self._behind(step, operation))
        except TimeoutError:
            silent = time.monotonic() - self._answered
            return (
                f"{own}; the store of the process group does not answer: rank 0 or its launcher, which serves it, was "
                f"last heard of {silent:.0f} s ago"
            )
        except (dist.DistError, RuntimeError) as error:
            return f"{own}; the store of the process group is gone, and rank 0 or its launcher with it ({error})"
        return f"{own} for {others}" if others else f"{own}; no rank is behind it"

    def _ask(self, question: Callable[[], T]) -> T:
        """What the store answers. In a thread: whoever serves it may be the one that has stopped, and then a question
        waits for ever.

        Raises:
            TimeoutError: if no answer has come after `interval_s`, or one is still being waited for.
        """
        if self._asking is not None and self._asking.is_alive():
            raise TimeoutError
        answers: list[T] = []
        errors: list[Exception] = []

        def ask() -> None:
            try:
                answers.append(question())
            except (dist.DistError, RuntimeError) as error:
                errors.append(error)

        self._asking = threading.Thread(target=ask, name="watchdog-store", daemon=True)
        self._asking.start()
        self._asking.join(self.interval_s)
        if errors:
            raise errors[0]
        if not answers:
            raise TimeoutError
        self._answered = time.monotonic()
        return answers[0]

    def _tell(self) -> None:
        try:
            self._ask(self._note)
        except (dist.DistError, RuntimeError, TimeoutError):
            logger.debug("watchdog: no store", exc_info=True)

    def _note(self) -> None:
        step, operation, since = self._at
        note = {"step": step, "operation": operation, "seconds": time.monotonic() - since, "time": time.time()}
        self._store.set(str(distributed.rank()), json.dumps({**note, "host": socket.gethostname()}))

    def _behind(self, step: int, operation: str) -> str:
        found = []
        for rank in range(distributed.world_size()):
            if rank == distributed.rank():
                continue
            if not self._store.check([str(rank)]):
                found.append(f"rank {rank}, which has not been heard of")
                continue
            note = json.loads(self._store.get(str(rank)))
            silent = time.time() - note["time"]
            where = f"rank {rank} on {note['host']}, in {note['operation']!r} of step {note['step']}"
            if silent > 3 * self.interval_s + 1:
                found.append(f"{where} when it was last heard of {silent:.0f} s ago")
            elif _position(note["step"], note["operation"]) < _position(step, operation):
                found.append(f"{where} for {note['seconds']:.0f} s")
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        return "; ".join(found[:8]) + more

    def _watch(self) -> None:
        while not self._done.wait(self.interval_s):
            self._tell()
            step, operation, since = self._at
            waited = time.monotonic() - since
            if operation == "start" or operation.endswith("checkpoint") or self._done.is_set():
                continue
            if waited > self.timeout_s / 2 and not self._warned:
                self._warned = True
                logger.warning("%s", self.explain())
            if waited > 2 * self.timeout_s:
                logger.critical("%s; this hang is ended", self.explain())
                os._exit(1)


def _position(step: int, operation: str) -> tuple[int, int]:
    return step, OPERATIONS.index(operation) if operation in OPERATIONS else -1


def _is_collective(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return True
    words = ("gloo", "nccl", "timed out waiting", "connection closed by peer", "connection reset by peer")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
