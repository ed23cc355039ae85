"""Files that are whole or not there, and their checksums."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sfd_scale.runtime import files


@contextmanager
def atomically(path: Path, sync: bool = True) -> Iterator[Path]:
    """A name beside `path` to write to; the file gets its own name when the context ends, whole, or never.

    Args:
        sync: wait until the bytes are on the disk; for many small files that takes long.

    Raises:
        ValueError: on a full disk, saying so; what was there before is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        yield temporary
        if sync:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    except Exception as error:
        if _is_full_disk(error):
            raise ValueError(
                f"{path}: the disk is full, so this file was not written; all before it are whole. Free some space and "
                "give the same command again"
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _is_full_disk(error: BaseException | None) -> bool:
    """Whether it, or what it comes of, says so: torch.save and safetensors have errors of their own for it."""
    full = (errno.ENOSPC, errno.EDQUOT)
    while error is not None:
        if getattr(error, "errno", None) in full or any(f"os error {number}" in str(error) for number in full):
            return True
        error = error.__cause__ or error.__context__
    return False


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file `atomically`; text as UTF-8."""
    with atomically(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path: Path, value: Any, *, sort_keys: bool = False) -> None:
    """Write JSON that people can read, `atomically`."""
    write_atomically(path, f"{json.dumps(value, indent=1, sort_keys=sort_keys)}\n")


def sha256(path: Path, read: Callable[[int], None] | None = None) -> str:
    """The checksum of a file; `read` is told how many bytes of it were read since it was told last."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
            if read is not None:
                read(len(piece))
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        ValueError: if there is no such file.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    status = path.stat()
    return _sha256(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache
def _sha256(path: Path, size: int, time_ns: int) -> str:
    """Size and time tell whether the file is still the one that was read: a sweep asks for each cell."""
    return files.sha256(path)
