"""Lists the files of a folder: the one function for encoding, scoring, hashing and measuring image folders."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

logger = logging.getLogger(__name__)

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
_Folder = tuple[int, int]  # device and inode


@dataclass
class FolderListing:
    """The files of a folder.

    Attributes:
        files: with one of the suffixes, in the order of `sort_key`. A link to a missing file is among them.
        others: number of other files by suffix, and of what is neither a file nor read as a folder.
    """

    files: list[Path] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)


def sort_key(path: Path) -> tuple[bytes, ...]:
    """Order of files: names as bytes, compared part by part."""
    return tuple(os.fsencode(part) for part in path.parts)


def is_hidden(path: Path) -> bool:
    return path.name.startswith(".")


def class_folders(folder: Path) -> tuple[list[Path], Counter[str]]:
    """The folders in `folder`, in the order of `sort_key`, and the number of other files; all without hidden ones.

    Raises:
        ValueError: names a folder that cannot be read.
    """
    top = list_files(folder, recursive=False)
    others = top.others + Counter(path.suffix.lower() for path in top.files)
    del others["folders"]
    place = folder.resolve()
    above = {_identity(place), *map(_identity, place.parents)}
    found = []
    for path in sorted(folder.iterdir(), key=sort_key):
        if path.is_dir() and not is_hidden(path):
            if _identity(path) in above:
                others["links to a folder above or read already"] += 1
            else:
                found.append(path)
    return found, others


def list_files(folder: Path, suffixes: Collection[str] = SUFFIXES, recursive: bool = True) -> FolderListing:
    """List the files in `folder` with one of `suffixes` (lower case), also below linked folders.

    Hidden files and folders are passed over. Each linked folder is entered once, and never from inside itself: cycles
    end. Other files are counted.

    Raises:
        ValueError: names a folder that cannot be read.
    """
    found = FolderListing()
    place = folder.absolute()
    above = {place, *place.parents, place.resolve(), *place.resolve().parents}
    _walk(folder, tuple(map(_identity, above)), set(), found, suffixes, recursive)
    found.files.sort(key=sort_key)
    return found


def warn_of_others(folder: Path, others: Counter[str], suffixes: Collection[str] = SUFFIXES) -> None:
    """Log the files that were not read, by suffix."""
    if others:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common())
        logger.warning("%s: ignored files: %s; read: %s", folder, counts, ", ".join(sorted(suffixes)))


def _walk(
    folder: Path,
    parents: Sequence[_Folder],
    followed: set[_Folder],
    found: FolderListing,
    suffixes: Collection[str],
    recursive: bool,
) -> None:
    try:
        with os.scandir(folder) as entries:
            children = sorted((Path(entry.path) for entry in entries), key=sort_key)
    except OSError as error:
        raise ValueError(f"{folder}: this folder cannot be read ({error})") from error
    for path in children:
        if is_hidden(path):
            continue
        if path.is_dir():
            identity = _identity(path)
            again = path.is_symlink() and identity in followed
            if not recursive:
                found.others["folders"] += 1
            elif identity in parents or again:
                found.others["links to a folder above or read already"] += 1
            else:
                if path.is_symlink():
                    followed.add(identity)
                _walk(path, (*parents, identity), followed, found, suffixes, recursive)
        elif path.exists() and not path.is_file():
            found.others["devices, pipes or sockets"] += 1
        elif path.suffix.lower() in suffixes:
            found.files.append(path)
        else:
            found.others[path.suffix.lower() or "without suffix"] += 1


def _identity(folder: Path) -> _Folder:
    try:
        status = folder.stat()
    except OSError as error:
        raise ValueError(f"{folder}: this folder cannot be read ({error})") from error
    return status.st_dev, status.st_ino
