"""Lists the files of a folder: the one function for encoding, scoring, hashing and measuring image folders."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sfd_scale.runtime.files import require_output

logger = logging.getLogger(__name__)

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
IMAGES = ", ".join(sorted(SUFFIXES))
MAX_CLASSES = 1 << 20  # the number of classes follows from class indices in files, such as Parquet and .cls
_Folder = tuple[int, int]  # device and inode


_FIRST_NAMES = 3


@dataclass
class LeftOut:
    """The files that a reader leaves out: their number, and their first names, by reason.

    A reason is a suffix, such as `.txt`, or a few words.
    """

    counts: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        self.counts[reason] += 1
        first = self.names.setdefault(reason, [])
        if len(first) < _FIRST_NAMES:
            first.append(name)

    def update(self, other: LeftOut) -> None:
        self.counts.update(other.counts)
        for reason, names in other.names.items():
            first = self.names.setdefault(reason, [])
            first.extend(names[: _FIRST_NAMES - len(first)])

    def warn(self, where: Path, read: str) -> None:
        """Log what is left out of `where`, if there is anything.

        Args:
            read: the files that are read, for the message.
        """
        if self.counts:
            logger.warning("%s: left out: %s; read: %s", where, "; ".join(self._parts(where)), read)

    def _parts(self, where: Path) -> Iterator[str]:
        for reason, count in self.counts.most_common():
            names = [name.removeprefix(f"{where}/") for name in self.names[reason]]
            more = ", ..." if count > len(names) else ""
            yield f"{count} {reason} ({', '.join(names)}{more})"


@dataclass
class FolderListing:
    """The files of a folder.

    Attributes:
        files: with one of the suffixes, in the order of `sort_key`. A link to a missing file is among them.
        others: all others, by suffix; hidden files with one of the suffixes, hidden folders, and what is neither a file
            nor read as a folder.
    """

    files: list[Path] = field(default_factory=list)
    others: LeftOut = field(default_factory=LeftOut)


def sort_key(path: Path) -> tuple[bytes, ...]:
    """Order of files: names as bytes, compared part by part."""
    return tuple(os.fsencode(part) for part in path.parts)


def is_hidden(path: Path) -> bool:
    return path.name.startswith(".")


def class_folders(folder: Path) -> tuple[list[Path], LeftOut]:
    """The folders in `folder` that are not hidden, in the order of `sort_key`, and all other files.

    Raises:
        ValueError: names a folder that cannot be read.
    """
    others = LeftOut()
    place = folder.resolve()
    above = {_identity(place), *map(_identity, place.parents)}
    found = []
    for path in _children(folder):
        if not path.is_dir():
            if not is_hidden(path):
                others.add(f"{path.suffix.lower() or 'without suffix'} beside the class folders", str(path))
        elif is_hidden(path):
            others.add("hidden", str(path))
        elif _identity(path) in above:
            others.add("links to a folder above or read already", str(path))
        else:
            found.append(path)
    return found, others


def list_files(
    folder: Path, suffixes: Collection[str] = SUFFIXES, recursive: bool = True, known: Collection[Path] = ()
) -> FolderListing:
    """List the files in `folder` with one of `suffixes` (lower case), also below linked folders.

    Hidden files and folders are left out. Each linked folder is entered once, and never from inside itself: cycles end.

    Args:
        known: files that the caller reads for another purpose; they are not listed.

    Raises:
        ValueError: names a folder that cannot be read.
    """
    found = FolderListing()
    place = folder.absolute()
    above = {place, *place.parents, place.resolve(), *place.resolve().parents}
    _walk(folder, tuple(map(_identity, above)), set(), found, suffixes, recursive, known)
    found.files.sort(key=sort_key)
    return found


def _walk(
    folder: Path,
    parents: Sequence[_Folder],
    followed: set[_Folder],
    found: FolderListing,
    suffixes: Collection[str],
    recursive: bool,
    known: Collection[Path],
) -> None:
    for path in _children(folder):
        if path in known:
            continue
        if is_hidden(path):
            if path.is_dir() or path.suffix.lower() in suffixes:
                found.others.add("hidden", str(path))
        elif path.is_dir():
            identity = _identity(path)
            again = path.is_symlink() and identity in followed
            if not recursive:
                found.others.add("folders", str(path))
            elif identity in parents or again:
                found.others.add("links to a folder above or read already", str(path))
            else:
                if path.is_symlink():
                    followed.add(identity)
                _walk(path, (*parents, identity), followed, found, suffixes, recursive, known)
        elif path.exists() and not path.is_file():
            found.others.add("devices, pipes or sockets", str(path))
        elif path.suffix.lower() in suffixes:
            found.files.append(path)
        else:
            found.others.add(path.suffix.lower() or "without suffix", str(path))


def _children(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted((Path(entry.path) for entry in entries), key=sort_key)
    except OSError as error:
        raise ValueError(f"{folder}: this folder cannot be read ({error})") from error


def _identity(folder: Path) -> _Folder:
    try:
        status = folder.stat()
    except OSError as error:
        raise ValueError(f"{folder}: this folder cannot be read ({error})") from error
    return status.st_dev, status.st_ino


def require_picture(out: Path) -> None:
    """Check before images are drawn that they can be written to `out`.

    Raises:
        ValueError: if the name has no suffix of a picture, or `require_output` refuses it.
    """
    if out.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--out: {out}; allowed: a name that ends in {IMAGES}")
    require_output(out)
