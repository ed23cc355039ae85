"""Errors of the operating system and of Python's decoders as sentences that say what to change."""

from __future__ import annotations

import errno
import os

# What the operating system calls "Permission denied" and the like, and what a user can do about it.
_SENTENCES = {
    errno.ENOENT: "no such file or folder",
    errno.EACCES: "no permission; allowed: a path that this user may read, or write if it is an output",
    errno.EPERM: "no permission; allowed: a path that this user may read, or write if it is an output",
    errno.EROFS: "the file system is read-only; give a folder that can be written",
    errno.EISDIR: "a folder; allowed: a file",
    errno.ENOTDIR: "a part of this path is a file; allowed: a path through folders",
    errno.EEXIST: "exists already; give another name, or remove it",
    errno.ENOTEMPTY: "the folder is not empty; give another one",
    errno.ENOSPC: "the disk is full; free some space and give the same command again",
    errno.EDQUOT: "the disk quota is used up; free some space and give the same command again",
    errno.ENAMETOOLONG: "the name is too long; give a shorter one",
    errno.ELOOP: "links that lead to each other; give the file itself",
    errno.EMFILE: "too many open files; raise the limit, such as `ulimit -n 65536`",
    errno.ENFILE: "too many open files on this machine",
    errno.EINVAL: "not a name that this file system allows",
    errno.EIO: "the disk or the network file system failed; see the system's log",
    errno.ESTALE: "the network file system has lost this file; mount it again",
}


def error_text(error: BaseException) -> str:
    """The message of an error for the user: our own sentences as they are, others in our words."""
    where = _where(error) if isinstance(error, OSError) else ""
    if where and os.path.islink(where) and not os.path.exists(where) and getattr(error, "errno", None) != errno.ELOOP:
        return f"{where}: a link to {os.readlink(where)}, which is not there; mount its disk, or remove the link"
    return f"{where}: {reason(error)}" if where else reason(error)


def reason(error: BaseException) -> str:
    """As `error_text`, without the path of the file."""
    if isinstance(error, OSError) and error.errno is not None:
        return _SENTENCES.get(error.errno, error.strerror or type(error).__name__)
    if isinstance(error, UnicodeDecodeError):
        return f"not {error.encoding} text: {error.reason} at byte {error.start}; allowed: a text file in UTF-8"
    if isinstance(error, UnicodeEncodeError):
        return f"{error.object!r}: not writable as {error.encoding}"
    return str(error) or type(error).__name__


def require_folder() -> None:
    """Raises ValueError if the current folder was removed, which all relative paths need."""
    try:
        os.getcwd()
    except OSError as error:
        raise ValueError("the current folder no longer exists; change to another one with `cd`") from error


def _where(error: OSError) -> str:
    """The path that an error names, or both; empty if it names none."""
    paths = [path for path in (error.filename, error.filename2) if isinstance(path, str | bytes | os.PathLike) and path]
    return " → ".join(map(os.fsdecode, paths))
