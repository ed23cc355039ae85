"""Images in uncompressed tar files, read in place: WebDataset shards, or ImageNet's one file per class."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from torch import Tensor

from sfd_scale.data.image_files import SUFFIXES, list_files
from sfd_scale.data.image_io import UnreadableImage, read_image
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
        self.files = list_files(config.path, {".tar"}, recursive=False).files if folder else [config.path]
        if not self.files or not self.files[0].is_file():
            raise ValueError(f"source.path: {config.path} is neither a tar file nor a folder with tar files")
        self.members: list[_Member] = []
        labelled: dict[bool, Path] = {}
        for number, file in enumerate(self.files):
            members, has_labels = _scan(file, number)
            self.members += members
            labelled[has_labels] = file
        if len(labelled) > 1:
            raise ValueError(
                f"{labelled[False]}: has no .cls members, but {labelled[True]} has; allowed: in all files, or in none"
            )
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


def _scan(file: Path, number: int) -> tuple[list[_Member], bool]:
    """The images of a tar file, from its headers, and whether .cls members give their classes.

    Args:
        number: the class of all images if there are no .cls members.
    """
    images: list[tuple[str, int, int]] = []
    labels: dict[str, int] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                stem, _, suffix = member.name.rpartition(".")
                if f".{suffix.lower()}" in SUFFIXES and member.isfile():
                    images.append((member.name, member.offset_data, member.size))
                elif suffix == "cls" and member.isfile():
                    content = tar.extractfile(member)
                    assert content is not None
                    labels[stem] = int(content.read(32))
    except (tarfile.TarError, ValueError, OSError) as error:
        raise ValueError(f"{file}: not a complete, uncompressed tar file ({error})") from error
    if not images:
        raise ValueError(f"{file}: has no image ({', '.join(sorted(SUFFIXES))})")
    missing = [name for name, *_ in images if name.rpartition(".")[0] not in labels] if labels else []
    if missing or any(label < 0 for label in labels.values()):
        image = missing[0] if missing else "an image"
        raise ValueError(f"{file}: {image} has no class; each image needs a .cls member with a class index, 0 and up")
    members = [
        _Member(file, start, size, name, labels[name.rpartition(".")[0]] if labels else number)
        for name, start, size in images
    ]
    return members, bool(labels)
