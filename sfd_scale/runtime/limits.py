"""Limits of waits on other jobs and on servers. The limits are settings of the environment, in seconds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from sfd_scale.runtime import environment

T = TypeVar("T")
WORK = "SFD_WORK_TIMEOUT"  # of a chunk that another job works on
STEP = "SFD_STEP_TIMEOUT"  # of a step of a study that another process works on
WATCH = "SFD_WATCH_TIMEOUT"  # of the next checkpoint of a run; a scheduler may start it again days later
DOWNLOAD = "SFD_DOWNLOAD_TIMEOUT"
DEFAULTS = {WORK: 3600, STEP: 86_400, WATCH: 604_800, DOWNLOAD: 3600}


def limit_s(name: str) -> int:
    """The limit that an environment variable sets.

    Raises:
        ValueError: if it is not a whole number from 1 up.
    """
    value = environment.whole_number(name, least=1)
    return DEFAULTS[name] if value is None else value


def within(seconds: float, work: Callable[[], T], late: str) -> T:
    """The result of `work`, which runs in a thread, because a wait inside a library cannot be interrupted.

    Args:
        late: the error message after the limit: who is waited for, and what to change.

    Raises:
        TimeoutError: after `seconds`. The thread runs on until the process ends.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001  raised again by the thread that waits
            errors.append(error)

    thread = threading.Thread(target=run, name="limited", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"{late} (after {seconds:.0f} s)")
    return results[0]


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
