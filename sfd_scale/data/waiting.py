"""Waits for data that end: after a limit, and soon after a stop request."""

from __future__ import annotations

import atexit
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch

from sfd_scale.data import workers
from sfd_scale.runtime import distributed

T = TypeVar("T")
_POLL_S = 0.2
STOP_WAIT_S = 10.0  # a wait lasts no longer after a stop request: schedulers kill a job after 30 s
READ_LIMIT_S = 600.0  # for a batch of images


class DataWaitStopped(Exception):
    """A stop request ended the wait for a batch."""


class PatientBatches(Generic[T]):
    """Batches with bounded waits, and read ahead. A thread reads them, because a read cannot be interrupted.

    Batches that were read and not taken do not count for a checkpoint.

    Args:
        ahead: batches that are read before they are asked for.
        limit_s: of one wait.
        advice: what to change, for the error message.
        stop: whether a stop is requested.

    Attributes:
        waited_s: seconds until the batches were there, in all calls. To wake the thread for the next batch is no wait
            for data: on a busy machine the thread may take the core of its waker, for milliseconds.
    """

    def __init__(
        self, batches: Iterator[T], *, limit_s: float, advice: str, stop: Callable[[], bool] = lambda: False,
        ahead: int = 0,
    ) -> None:  # fmt: skip
        self.limit_s, self.advice, self.stop, self.ahead, self.waited_s = limit_s, advice, stop, ahead, 0.0
        self._requests: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(ahead):
            self._requests.put(True)
        self._closed = threading.Event()
        # The thread has no reference to `self`, so that `__del__` ends it.
        arguments = (batches, self._requests, self._answers, self._closed)
        thread = threading.Thread(target=_serve, args=arguments, name="data", daemon=True)
        thread.start()
        _LIVE[thread] = self._closed

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        """The next batch.

        Raises:
            DataWaitStopped: after a stop request.
            TimeoutError: after `limit_s`, with the error that a worker printed.
        """
        began = time.monotonic()
        if not self.ahead:
            self._requests.put(True)
        found, error = self._answer(began)
        self.waited_s += time.monotonic() - began
        if error is not None:
            raise error
        if self.ahead:
            self._requests.put(True)
        return found  # type: ignore[no-any-return]

    def _answer(self, began: float) -> tuple[Any, Exception | None]:
        asked = None
        while True:
            try:
                return self._answers.get(timeout=_POLL_S)  # type: ignore[no-any-return]
            except queue.Empty:
                now = time.monotonic()
                if self.stop():
                    asked = now if asked is None else asked
                    if now - asked >= STOP_WAIT_S:
                        workers.kill_workers()
                        raise DataWaitStopped from None
                if now - began > self.limit_s:
                    raise TimeoutError(self._late()) from None

    def _late(self) -> str:
        count = workers.kill_workers()
        by = f"{count} worker processes give none" if count else "the read does not end"
        return f"no batch of data for {self.limit_s:.0f} s: {by}{workers.printed()}; {self.advice}"

    def close(self) -> None:
        """End the thread after the batch that it reads now."""
        self._closed.set()
        self._requests.put(False)

    def __del__(self) -> None:
        self.close()


_LIVE: weakref.WeakKeyDictionary[threading.Thread, threading.Event] = weakref.WeakKeyDictionary()


@atexit.register
def _end_threads() -> None:
    """The interpreter must not end while a thread is in PyTorch: that would abort the process."""
    for closed in list(_LIVE.values()):
        closed.set()
    end = time.monotonic() + 5.0
    for thread in list(_LIVE):
        if not thread.is_alive():
            continue
        thread.join(max(0.0, end - time.monotonic()))


def _serve(
    batches: Iterator[Any], requests: queue.SimpleQueue[bool], answers: queue.SimpleQueue[Any], closed: threading.Event
) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(distributed.device())  # page-locked memory belongs to the device of its thread
    torch.set_num_threads(1)  # of this thread: the cores belong to the step
    while requests.get() and not closed.is_set():
        try:
            answers.put((next(batches), None))
        except Exception as error:  # noqa: BLE001  raised again by the thread that asked
            answers.put((None, error))


def bounded(batches: Iterator[T]) -> Iterator[T]:
    """Batches of images. A read that does not end, or a worker that dies, is an error that says so.

    Raises:
        TimeoutError: as `PatientBatches`.
        ChildProcessError: if a worker died.
    """
    with workers.explained_deaths():
        yield from PatientBatches(batches, limit_s=READ_LIMIT_S, advice="check the storage of the images")
