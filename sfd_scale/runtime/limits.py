"""Limits of waits on other jobs and on servers. The limits are settings of the environment, in seconds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from sfd_scale.runtime import environment
from sfd_scale.runtime.settings import YEAR_S

T = TypeVar("T")
WORK = "SFD_WORK_TIMEOUT"  # of a chunk: that another job works on, or that is written
STEP = "SFD_STEP_TIMEOUT"  # of a step of a study that another process works on
WATCH = "SFD_WATCH_TIMEOUT"  # of the next checkpoint of a run; a scheduler may start it again days later
DOWNLOAD = "SFD_DOWNLOAD_TIMEOUT"
BUILD = "SFD_BUILD_TIMEOUT"  # of another process that compiles DeepSpeed's operators
DEFAULTS = {WORK: 3600, STEP: 86_400, WATCH: 604_800, DOWNLOAD: 3600, BUILD: 1800}


def limit_s(name: str) -> int:
    """The limit that an environment variable sets.

    Raises:
        ValueError: if it is not a whole number from 1 up to a year.
    """
    value = environment.whole_number(name, least=1, most=YEAR_S)
    return DEFAULTS[name] if value is None else value


class Background(Generic[T]):
    """Work that runs in a thread, because a wait inside a library cannot be interrupted."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._results: list[T] = []
        self._errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, args=(work,), name="background", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], T]) -> None:
        try:
            self._results.append(work())
        except BaseException as error:  # noqa: BLE001  raised again by the thread that waits
            self._errors.append(error)

    def ends(self, seconds: float) -> bool:
        """Whether the work ends within `seconds`, with a result or an error."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self, seconds: float, late: str) -> T:
        """The result, or the error that was raised.

        Args:
            late: the error message after the limit: who is waited for, and what to change.

        Raises:
            TimeoutError: after `seconds`. The thread runs on until the process ends.
        """
        if not self.ends(seconds):
            raise TimeoutError(f"{late} (after {seconds:.0f} s)")
        if self._errors:
            raise self._errors[0]
        return self._results[0]


def within(seconds: float, work: Callable[[], T], late: str) -> T:
    """The result of `work`, which has `seconds`: see `Background`.

    Raises:
        TimeoutError: after `seconds`.
    """
    return Background(work).result(seconds, late)


def download(what: str, work: Callable[[], T]) -> T:
    """The result of a download by a library. Libraries cut a silent connection, but not a slow one, and they wait
    without a limit for another process that downloads the same file.

    Args:
        what: the name of the download, for the error message.

    Raises:
        TimeoutError: after SFD_DOWNLOAD_TIMEOUT.
    """
    late = (
        f"{what} is not downloaded; the server is slow, or another process holds the lock of this download. Give a "
        f"local copy, end the other process, or raise {DOWNLOAD}"
    )
    return within(limit_s(DOWNLOAD), work, late)
