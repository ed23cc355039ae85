"""Locks on files and folders. The operating system releases them when their holder dies, however it dies.

They are POSIX locks. Unlike those of flock, the forked workers of a data loader do not inherit them, so a worker that
outlives its rank does not keep the lock.
"""

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
LOCK = "lock"


@contextmanager
def folder_lock(folder: Path, advice: str = "give another --run") -> Iterator[None]:
    """Reserve a folder, which is created, for this job. All ranks have to call it together; rank 0 holds the lock.

    Args:
        advice: how a second job can start at once, for the error message.

    Raises:
        ValueError: on all ranks, if another job holds the lock, with its host and process.
    """
    holder, descriptor = None, None
    if distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        if try_lock(descriptor, folder):
            os.ftruncate(descriptor, 0)
            os.pwrite(
                descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {time.ctime()}\n".encode(), 0
            )
        else:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip() or "another job"
    holder = distributed.broadcast_object(holder)
    try:
        if holder is not None:
            raise ValueError(f"{folder} is in use by {holder}; wait until it ends, or {advice}")
        yield
    finally:
        if descriptor is not None:
            if holder is None:
                os.ftruncate(descriptor, 0)  # the bytes of a finished folder do not depend on who made it
            os.close(descriptor)


def in_use(folder: Path) -> bool:
    """Whether a job of another process holds the lock of the folder.

    The holder itself must not ask: a process that closes a locked file, even one opened twice, gives up its lock.
    """
    if not (folder / LOCK).is_file():
        return False
    descriptor = os.open(folder / LOCK, os.O_RDWR)
    try:
        return not try_lock(descriptor, folder)
    finally:
        os.close(descriptor)


def try_lock(descriptor: int, folder: Path) -> bool:
    """Lock an open file without waiting; False if another process holds its lock.

    On a file system without locks it logs a warning that names `folder`, and returns True.
    """
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        logger.warning("%s: this file system has no locks (%s), so a second job is not refused", folder, error.strerror)
    return True
