"""Atomic file writes, and SHA-256 of files."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from sfd_scale.runtime.errors import reason
from sfd_scale.runtime.file_kind import Wanted, file_error, require_kind
from sfd_scale.runtime.leftovers import remove, remove_temporary_files_once, temporary_path


def require_output(path: Path, setting: str = "--out") -> None:
    """Check that a file can be written to `path`, before the work whose result it is to hold.

    Raises:
        ValueError: if `path` is a folder, a part of it is a file, or this user may not write there.
    """
    if path.is_dir():
        raise ValueError(f"{setting}: {path} is a folder; allowed: a file in it")
    above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not above.is_dir():
        raise ValueError(f"{setting}: {path}: {above} is no folder; allowed: a path through folders")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{setting}: {path}: this user may not write in {above}; give another path")


@contextmanager
def atomically(path: Path, sync: bool = True) -> Iterator[Path]:
    """Write a file under a temporary name; it is renamed to `path` when the block ends without an error.

    The first write of a process to a folder removes the temporary files that killed writers left there.

    Args:
        sync: fsync the file before the rename. This is slow for many small files.

    Raises:
        ValueError: if the disk is full. An existing file at `path` stays unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_temporary_files_once(path.parent)
    temporary = temporary_path(path)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # as the umask says; some writers make files that their owner alone can read
        if sync:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    except Exception as error:
        if _is_full_disk(error):
            raise ValueError(
                f"{path}: the disk is full, so this file was not written; earlier files are complete. Free some space "
                "and give the same command again"
            ) from error
        raise
    finally:
        remove(temporary)


def _is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, reports a full disk. torch.save and safetensors raise their own types."""
    full = (errno.ENOSPC, errno.EDQUOT)
    while error is not None:
        if getattr(error, "errno", None) in full or any(f"os error {number}" in str(error) for number in full):
            return True
        error = error.__cause__ or error.__context__
    return False


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file `atomically`; text as UTF-8. A path in it whose bytes are no text is written with escapes."""
    with atomically(path) as temporary:
        temporary.write_bytes(data.encode(errors="backslashreplace") if isinstance(data, str) else data)


def write_json(path: Path, value: Any, *, sort_keys: bool = False) -> None:
    """Write indented JSON, `atomically`."""
    write_atomically(path, f"{json.dumps(value, indent=1, sort_keys=sort_keys)}\n")


def read_text(path: Path, wanted: Wanted = "text") -> str:
    """The text of a file in UTF-8, without a byte order mark.

    Args:
        wanted: the kind of text, for the error message.

    Raises:
        ValueError: names the file and says what it is, if it is missing or no text.
    """
    require_kind(path, wanted)
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ValueError(file_error(path, wanted, reason(error))) from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file with one JSON object per line. A last line that is not finished is left out.

    Raises:
        ValueError: names the file and the line, if another line is no JSON object.
    """
    lines = read_text(path).split("\n")
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}: line {number} is damaged, not a JSON object ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}: line {number} holds {line[:80]!r}; allowed: a JSON object")
        found.append(row)
    return found


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        ValueError: names the file and says what it is, if it is missing or no JSON file.
    """
    require_kind(path, "json")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(file_error(path, "json", error)) from error


def sha256(path: Path, on_read: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file, as hexadecimal digits.

    Args:
        on_read: called with the number of bytes after each read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
            if on_read is not None:
                on_read(len(piece))
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file; cached until its `file_version` changes.

    Raises:
        ValueError: if there is no such file.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    return _sha256(path, *file_version(path))


class FileVersion(NamedTuple):
    """Numbers that change with the content of a file; size in bytes, times in nanoseconds.

    The modification time alone does not do: archives and `cp -p` set it, so another file of the same size may have the
    same. The time of the last status change cannot be set.
    """

    inode: int
    size: int
    modified: int
    changed: int


def file_version(path: Path) -> FileVersion:
    """Raises OSError if there is no such file."""
    status = path.stat()
    return FileVersion(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@functools.lru_cache
def _sha256(path: Path, *version: int) -> str:
    return sha256(path)
