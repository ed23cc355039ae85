"""One job a folder: a lock that the operating system takes back when its holder dies, however it dies."""

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
    """Hold a folder, which is made, for this job. Called by all ranks together; rank 0 holds the lock.

    A POSIX lock: unlike flock's, it is not inherited by the forked workers of a data loader, who may outlive the rank.

    Args:
        other: what a second job can do at once.

    Raises:
        ValueError: on all ranks, where another job holds it, with the host and process.
    """
    holder, descriptor = None, None
    if distributed.is_main():
        run.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        holder = _take(descriptor, run)
    holder = distributed.broadcast_object(holder)
    try:
        if holder is not None:
            raise ValueError(f"{run} is in use by {holder}; wait for its end, or {other}")
        yield
    finally:
        if descriptor is not None:
            if holder is None:
                os.ftruncate(descriptor, 0)  # the folder's bytes do not tell who made them
            os.close(descriptor)


def in_use(run: Path) -> bool:
    """Whether another process's job holds the folder now. Not for the holder: a process that closes a locked file,
    opened again for this too, gives its POSIX lock up."""
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
    """Lock the file; who holds it, if someone does."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return os.pread(descriptor, 1000, 0).decode(errors="replace").strip() or "another job"
        logger.warning("%s: its file system has no locks (%s): nothing keeps a second job out", run, error.strerror)
        return None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {time.ctime()}\n".encode(), 0)
    return None
