"""Images in uncompressed tar files, read in place: WebDataset shards, or ImageNet's one file per class."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from torch import Tensor

from sfd_scale.data.image_files import IMAGES, MAX_CLASSES, SUFFIXES, FolderListing, LeftOut, list_files
from sfd_scale.data.image_io import MAX_IMAGE_BYTES, UnreadableImage, read_image
from sfd_scale.runtime.file_kind import file_error
from sfd_scale.runtime.settings import at_least


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
        ValueError: names the file, if it is not a tar file, is truncated, or only some images have a class.
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
        others = LeftOut()
        for number, file in enumerate(self.files):
            members, has_labels = _scan(file, number, others)
            self.members += members
            labelled[has_labels] = file
        if len(labelled) > 1:
            raise ValueError(
                f"{labelled[False]}: has no .cls members, but {labelled[True]} has; allowed: in all files, or in none"
            )
        others.warn(config.path, IMAGES)
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


def _scan(file: Path, number: int, others: LeftOut) -> tuple[list[_Member], bool]:
    """The images of a tar file, from its headers, and whether .cls members give their classes.

    Args:
        number: the class of all images if there are no .cls members.
        others: gets the members that are neither.
    """
    images: list[tarfile.TarInfo] = []
    words: dict[str, bytes] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                stem, _, suffix = member.name.rpartition(".")
                if member.isfile() and f".{suffix.lower()}" in SUFFIXES:
                    images.append(member)
                elif member.isfile() and suffix == "cls":
                    content = tar.extractfile(member)
                    assert content is not None
                    words[stem] = content.read(32)
                elif not member.isdir():
                    others.add(f".{suffix} in tar files" if "." in member.name else "without suffix", member.name)
    # MemoryError and others: headers of names that claim to be very long.
    except (tarfile.TarError, ValueError, OSError, MemoryError, OverflowError, RecursionError) as error:
        raise ValueError(file_error(file, "tar", error)) from error
    if not images:
        raise ValueError(f"{file}: has no image ({IMAGES})")
    _check_sizes(file, images)
    labels = {stem: _class_index(file, stem, word) for stem, word in words.items()}
    missing = [image.name for image in images if image.name.rpartition(".")[0] not in labels] if labels else []
    if missing:
        raise ValueError(f"{file}: {missing[0]} has no class; {_CLASS_RULE}")
    members = [
        _Member(
            file, image.offset_data, image.size, image.name,
            labels[image.name.rpartition(".")[0]] if labels else number,
        )
        for image in images
    ]  # fmt: skip
    return members, bool(labels)


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
