"""Locks of run folders. The operating system releases the lock of a killed process."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sfd_scale.runtime import distributed

logger = logging.getLogger(__name__)


@contextmanager
def run_lock(run: Path, other: str = "give another --run") -> Iterator[None]:
    """Create a folder and lock it for this job. All ranks call this; rank 0 holds the lock.

    This is a POSIX lock (lockf). Forked dataloader workers, which may outlive the rank, would inherit a lock of flock.

    Args:
        other: advice for the error message: how to run a second job.

    Raises:
        ValueError: on all ranks, if another job holds the lock; names its host and process.
    """
    holder, descriptor = None, None
    if distributed.is_main():
        run.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        holder = _take(descriptor, run)
    holder = distributed.broadcast_object(holder)
    try:
        if holder is not None:
            raise ValueError(f"{run} is in use by {holder}; wait until it ends, or {other}")
        yield
    finally:
        if descriptor is not None:
            if holder is None:
                os.ftruncate(descriptor, 0)  # so that the content of a finished folder does not depend on the process
            os.close(descriptor)


def in_use(run: Path) -> bool:
    """Whether a job in another process holds the lock.

    The holder must not call this: a process loses its POSIX locks of a file when it closes any descriptor of the file.
    """
    if not (run / "lock").is_file():
        return False
    descriptor = os.open(run / "lock", os.O_RDWR)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN)
    finally:
        os.close(descriptor)
    return False


def _take(descriptor: int, run: Path) -> str | None:
    """Lock the file; returns None, or a description of the job that holds the lock."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return os.pread(descriptor, 1000, 0).decode(errors="replace").strip() or "another job"
        logger.warning("%s: this file system has no locks (%s), so a second job is not refused", run, error.strerror)
        return None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {time.ctime()}\n".encode(), 0)
    return None
