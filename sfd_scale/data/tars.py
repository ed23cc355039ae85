"""Images in uncompressed tar files, read in place: WebDataset shards, or ImageNet's one file per class."""

from __future__ import annotations

import io
import logging
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from torch import Tensor

from sfd_scale.data.image_files import IMAGES, MAX_CLASSES, SUFFIXES, FolderListing, LeftOut, list_files
from sfd_scale.data.image_io import MAX_IMAGE_BYTES, UnreadableImage, read_image
from sfd_scale.runtime.file_kind import file_error
from sfd_scale.runtime.settings import at_least

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TarConfig:
    """A tar file, or the tar files of a folder in the order of their names.

    WebDataset: a member with the suffix `.cls` beside each image holds its class index. If there are no such members,
    each tar file is one class, such as n01440764.tar.

    size: side of the images after the crop.
    upright: rotate images by their EXIF orientation tag.
    """

    path: Path
    kind: Literal["tar"] = "tar"
    size: int = 256
    upright: bool = True

    def __post_init__(self) -> None:
        at_least(self, size=1)


class _Member(NamedTuple):
    """An image in a tar file. start, size: in bytes. label: class index."""

    file: Path
    start: int
    size: int
    name: str
    label: int


_CLASS_RULE = f"each image needs a .cls member with a class index, 0 to {MAX_CLASSES - 1:,}"


class TarImages:
    """The images of TarConfig.

    Attributes:
        files: the tar files, in the order of their classes.

    Raises:
        ValueError: names the file, if it is not a tar file, is truncated or damaged, or only some images have a class.
    """

    classes: tuple[str, ...] = ()

    def __init__(self, config: TarConfig) -> None:
        folder = config.path.is_dir()
        listing = list_files(config.path, {".tar"}, recursive=False) if folder else FolderListing([config.path])
        listing.others.warn(config.path, ".tar")
        self.files = listing.files
        if not self.files or not self.files[0].is_file():
            raise ValueError(f"source.path: {config.path} is neither a tar file nor a folder with tar files")
        self.members: list[_Member] = []
        labelled: dict[bool, Path] = {}
        others, one_class = LeftOut(), list[Path]()
        for number, file in enumerate(self.files):
            members, has_labels = _scan(file, number, others, one_class)
            self.members += members
            labelled[has_labels] = file
        if len(labelled) > 1:
            raise ValueError(
                f"{labelled[False]}: has no .cls members, but {labelled[True]} has; allowed: in all files, or in none"
            )
        others.warn(config.path, IMAGES)
        if one_class:
            logger.warning(
                "%s: %d tar files, such as %s, have other members beside their images, but no .cls members: each file "
                "is one class", config.path, len(one_class), one_class[0].name,
            )  # fmt: skip
        self.num_classes = max(member.label for member in self.members) + 1
        self.size, self.upright = config.size, config.upright

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        member = self.members[index]
        with member.file.open("rb") as file:
            file.seek(member.start)
            content = file.read(member.size)
        name = f"{member.file}: {member.name}"
        if len(content) != member.size:
            raise UnreadableImage(f"{name}: truncated")
        return read_image(io.BytesIO(content), self.size, self.upright, name), member.label


def _scan(file: Path, number: int, others: LeftOut, one_class: list[Path]) -> tuple[list[_Member], bool]:
    """The images of a tar file, from its headers, and whether .cls members give their classes.

    Of members with one name, the last counts, as for `tar -x`.

    Args:
        number: the class of all images if there are no .cls members.
        others: gets the members that are neither.
        one_class: gets the file, if other members than .cls stand beside its images.
    """
    found: dict[str, tarfile.TarInfo] = {}
    words: dict[str, bytes] = {}
    beside: set[str] = set()
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                stem, _, suffix = member.name.rpartition(".")
                read = member.isfile() and (f".{suffix.lower()}" in SUFFIXES or suffix == "cls")
                if read and _is_hidden(member.name):
                    others.add("hidden in tar files", member.name)
                elif read and suffix == "cls":
                    content = tar.extractfile(member)
                    assert content is not None
                    words[stem] = content.read(32)
                elif read:
                    if member.name in found:
                        others.add("replaced by a later member of the same name", member.name)
                    found[member.name] = member
                elif member.islnk() or member.issym():
                    others.add("links in tar files", member.name)
                elif not member.isdir():
                    beside.add(stem)
                    others.add(f".{suffix} in tar files" if "." in member.name else "without suffix", member.name)
            _check_end(file, tar.offset)
    # MemoryError and others: headers of names that claim to be very long.
    except (tarfile.TarError, ValueError, OSError, MemoryError, OverflowError, RecursionError) as error:
        if isinstance(error, _Ending):
            raise
        raise ValueError(file_error(file, "tar", error)) from error
    images = list(found.values())
    if not images:
        raise ValueError(f"{file}: has no image ({IMAGES})")
    _check_sizes(file, images)
    if not words and any(image.name.rpartition(".")[0] in beside for image in images):
        one_class.append(file)
    labels = _labels(file, images, words)
    members = [
        _Member(file, image.offset_data, image.size, image.name, labels.get(image.name, number)) for image in images
    ]
    return members, bool(words)


def _is_hidden(name: str) -> bool:
    """Whether a member or one of its folders has a name with a dot in front, as in a folder of images."""
    return any(part.startswith(".") for part in PurePosixPath(name).parts if part != "..")


class _Ending(ValueError):
    """A tar file does not end where its list of members ends."""


def _check_end(file: Path, end: int) -> None:
    """Check that a tar file has an end mark after its last member, at `end` bytes, and nothing after it.

    Python's reader stops at a damaged or missing header without an error (python/cpython#120740).

    Raises:
        _Ending: names the file.
    """
    with file.open("rb") as opened:
        opened.seek(end)
        block = opened.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE:
            raise _Ending(
                f"{file} is truncated: it has no end mark after byte {end:,}; download or copy it again. If it is "
                "whole, add the mark: truncate -s +1024 FILE"
            )
        if block.strip(b"\0"):
            raise _Ending(f"{file} is damaged: byte {end:,} begins no member of a tar file; download or copy it again")
        while block := opened.read(1 << 20):
            if block.strip(b"\0"):
                raise _Ending(
                    f"{file}: more data after its end mark at byte {end:,}, as in archives that were joined by `cat`, "
                    "or a damaged member; allowed: one archive per file, as `tar -A` joins them"
                )


def _labels(file: Path, images: list[tarfile.TarInfo], words: dict[str, bytes]) -> dict[str, int]:
    """The class index of each image, by its name; empty without .cls members.

    Raises:
        ValueError: names an image without a class, or two with one .cls member.
    """
    if not words:
        return {}
    classes = {stem: _class_index(file, stem, word) for stem, word in words.items()}
    taken: dict[str, str] = {}
    for image in images:
        stem = image.name.rpartition(".")[0]
        if stem not in classes:
            raise ValueError(f"{file}: {image.name} has no class; {_CLASS_RULE}")
        if stem in taken:
            raise ValueError(
                f"{file}: {taken[stem]} and {image.name} share {stem}.cls; allowed: a .cls member for one image"
            )
        taken[stem] = image.name
    return {name: classes[stem] for stem, name in taken.items()}


def _class_index(file: Path, stem: str, word: bytes) -> int:
    text = word.decode("ascii", errors="replace").strip()
    if not text.isdecimal() or int(text) >= MAX_CLASSES:
        raise ValueError(f"{file}: {stem}.cls holds {text!r}; {_CLASS_RULE}")
    return int(text)


def _check_sizes(file: Path, images: list[tarfile.TarInfo]) -> None:
    """Check the sizes in the headers before an image is read: a read takes the memory that the header claims.

    Raises:
        ValueError: names the member.
    """
    end = file.stat().st_size
    for image in images:
        if image.issparse():
            raise ValueError(f"{file}: {image.name} is stored as a sparse file; allowed: plain members")
        if image.size > MAX_IMAGE_BYTES:
            raise ValueError(f"{file}: {image.name} has {image.size:,} bytes; allowed: up to {MAX_IMAGE_BYTES:,}")
        if image.offset_data + image.size > end:
            raise ValueError(f"{file} is truncated: {image.name} ends after it; download or copy it again")
