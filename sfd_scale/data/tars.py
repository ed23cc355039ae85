"""Images in uncompressed tar files, read in place: WebDataset shards, or one file a class as ImageNet comes."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from torch import Tensor

from sfd_scale.data.image_io import SUFFIXES, UnreadableImage, read_image
from sfd_scale.runtime.settings import at_least


@dataclass(frozen=True, kw_only=True)
class TarConfig:
    """A tar file, or a folder of them in the order of their names.

    Where images have a member of the same name and `.cls` beside them (WebDataset), that number is the class;
    else each file is a class, such as n01440764.tar.
    """

    path: Path
    kind: Literal["tar"] = "tar"
    size: int = 256
    upright: bool = True

    def __post_init__(self) -> None:
        at_least(self, size=1)


class _Place(NamedTuple):
    """Where an image lies: file, first byte, size, name inside, class."""

    file: Path
    start: int
    size: int
    name: str
    label: int


class Tars:
    """See TarConfig.

    Raises:
        ValueError: naming the file, if it is no tar, is cut off, or its images have classes only in part.
    """

    def __init__(self, config: TarConfig) -> None:
        files = sorted(config.path.glob("*.tar")) if config.path.is_dir() else [config.path]
        if not files or not files[0].is_file():
            raise ValueError(f"source.path: {config.path} is no tar file, nor a folder with any")
        self.places: list[_Place] = []
        labelled: dict[bool, Path] = {}
        for number, file in enumerate(files):
            places, has_labels = _scan(file, number)
            self.places += places
            labelled[has_labels] = file
        if len(labelled) > 1:
            raise ValueError(
                f"{labelled[False]}: has no .cls members, which {labelled[True]} has; all need them, or none"
            )
        self.num_classes = max(place.label for place in self.places) + 1
        self.size, self.upright = config.size, config.upright

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        place = self.places[index]
        with place.file.open("rb") as file:
            file.seek(place.start)
            content = file.read(place.size)
        name = f"{place.file}: {place.name}"
        if len(content) != place.size:
            raise UnreadableImage(f"{name}: cut off")
        return read_image(io.BytesIO(content), self.size, self.upright, name), place.label


def _scan(file: Path, number: int) -> tuple[list[_Place], bool]:
    """The images of a file in their order, from its headers, and whether .cls members say their classes; else it is
    `number`."""
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
        raise ValueError(f"{file}: not a whole, uncompressed tar file ({error})") from error
    if not images:
        raise ValueError(f"{file}: holds no image ({', '.join(sorted(SUFFIXES))})")
    missing = [name for name, *_ in images if name.rpartition(".")[0] not in labels] if labels else []
    if missing or any(label < 0 for label in labels.values()):
        raise ValueError(f"{file}: {missing[0] if missing else 'an image'} has no class; each needs a .cls from 0 up")
    places = [
        _Place(file, start, size, name, labels[name.rpartition(".")[0]] if labels else number)
        for name, start, size in images
    ]
    return places, bool(labels)
