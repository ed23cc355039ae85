"""Leftovers of killed processes, and names that are taken.

Cleaning up is never needed to go on: a leftover that cannot be removed, such as a busy `.nfs` file, is passed by under
another name and logged.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import shutil
import socket
import time
import uuid
from pathlib import Path

logger = logging.getLogger(__name__)
# .NAME.HOST.PID.RANDOM.EXTENSION; earlier releases wrote no host.
_TEMPORARY = re.compile(r"\..+?(?:\.(?P<host>h[0-9a-f]{8}))?\.(?P<pid>\d+)\.[0-9a-f]{8}(?:\.[^.]*)?")
ABANDONED_AFTER_S = 3600.0  # a temporary file of another host, not written to for so long, has no writer
_MOST_NAMES = 1000


# ------------------------------------------------------------------------------------------- temporary files


@functools.cache
def _host() -> str:
    """This host and its numbering of processes: containers of one host name may each have a process 7."""
    try:
        processes = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        processes = 0
    return f"h{hashlib.sha256(f'{socket.gethostname()} {processes}'.encode()).hexdigest()[:8]}"


def temporary_path(path: Path) -> Path:
    """A new name beside `path`, for its content until it is complete. It tells the process that writes it."""
    # At most 255 bytes. The suffix stays, because writers choose the format by it.
    return path.with_name(f".{path.stem[:40]}.{_host()}.{os.getpid()}.{uuid.uuid4().hex[:8]}{path.suffix}")


def is_temporary(name: str) -> bool:
    """Whether a name is one of `temporary_path`."""
    return _TEMPORARY.fullmatch(name) is not None


def remove_temporary_files(folder: Path) -> None:
    """Remove the temporary files that killed writers left in a folder, which may be missing.

    Those are the files of dead processes of this host, and the files of other hosts that were not written to for an
    hour.
    """
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.name.startswith(".")]
    except FileNotFoundError:
        return
    for name in names:
        match, path = _TEMPORARY.fullmatch(name), folder / name
        if match is None:
            continue
        try:
            old = time.time() - path.lstat().st_mtime > ABANDONED_AFTER_S
        except FileNotFoundError:  # its writer has just renamed it
            continue
        if not _is_alive(int(match["pid"])) if match["host"] == _host() else old:
            remove(path)


@functools.lru_cache(maxsize=4096)
def remove_temporary_files_once(folder: Path) -> None:
    """`remove_temporary_files`, at the first call of this process for the folder."""
    remove_temporary_files(folder)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


# ------------------------------------------------------------------------------------------- names that are taken


def remove(path: Path) -> bool:
    """Remove a file, or a folder with all that can be removed in it; False, with a warning, if something stays."""
    errors: list[str] = []
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, onerror=lambda call, name, error: errors.append(f"{name}: {error[1]}"))
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        errors.append(str(error))
    if errors and os.path.lexists(path):  # another process may remove it too
        _warn_once(path, errors[0])
        return False
    return True


@functools.lru_cache(maxsize=4096)
def _warn_once(path: Path, reason: str) -> None:
    logger.warning("%s cannot be removed and is passed by (%s)", path, reason)


def free_path(path: Path) -> Path:
    """`path`, after what is there was removed; otherwise the first such name with a number, as step-8.2.tmp."""
    for number in range(1, _MOST_NAMES):
        free = path if number == 1 else path.with_name(f"{path.stem}.{number}{path.suffix}")
        if not os.path.lexists(free) or remove(free):
            return free
    raise ValueError(f"{path}: {_MOST_NAMES} leftovers that cannot be removed; remove them by hand")


def make_way(path: Path) -> None:
    """Remove what is at `path`; rename it if that is not possible.

    Raises:
        ValueError: if neither is possible.
    """
    if not os.path.lexists(path) or remove(path):
        return
    aside = free_path(path.with_name(f".{path.name}.left"))
    try:
        os.replace(path, aside)
    except OSError as error:
        raise ValueError(f"{path}: can be neither removed nor renamed ({error}); do it by hand") from error
    logger.warning("%s is now %s", path, aside.name)
