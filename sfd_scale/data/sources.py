"""Image sources: class folders, tar files, Parquet files, MDS shards, and the toy digits, scenes and things.

A source is a sequence of ((3, H, W) uint8, class index).
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from sfd_scale.data.image_files import IMAGES, class_folders, list_files
from sfd_scale.data.image_io import read_image, warn_about_upscaling
from sfd_scale.data.manifest import Manifest
from sfd_scale.data.parquet import ParquetConfig, ParquetImages
from sfd_scale.data.shards import open_shards
from sfd_scale.data.tars import TarConfig, TarImages
from sfd_scale.runtime.settings import at_least
from sfd_scale.toy.digits import NUM_CLASSES, Split, digit_image
from sfd_scale.toy.scenes import SceneSplit, scene_image
from sfd_scale.toy.things import CLASSES, ThingSplit, thing_image

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DigitsConfig:
    """Handwritten digits on procedural backgrounds (sfd_scale.toy.digits)."""

    kind: Literal["digits"] = "digits"
    split: Split = "train"
    num_images: int = 8000
    size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(self, num_images=1, size=1)


@dataclass(frozen=True, kw_only=True)
class ScenesConfig:
    """Scenes of several handwritten digits on structured backgrounds (sfd_scale.toy.scenes)."""

    kind: Literal["scenes"] = "scenes"
    split: SceneSplit = "train"
    num_images: int = 50_000
    size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(self, num_images=1, size=1)


@dataclass(frozen=True, kw_only=True)
class ThingsConfig:
    """Drawings of things on crops of photographs (sfd_scale.toy.things)."""

    kind: Literal["things"] = "things"
    split: ThingSplit = "train"
    num_images: int = 10_000
    size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(self, num_images=1, size=1)


@dataclass(frozen=True, kw_only=True)
class FolderConfig:
    """One folder per class, such as unpacked ImageNet; classes are the sorted folder names.

    size: side of the images after the crop.
    upright: rotate images by their EXIF orientation tag. ADM's references and the official code do not.
    """

    path: Path
    kind: Literal["folder"] = "folder"
    size: int = 256
    upright: bool = True

    def __post_init__(self) -> None:
        at_least(self, size=1)


@dataclass(frozen=True, kw_only=True)
class MDSConfig:
    """The image column of a folder of MDS shards that `sfd encode` wrote."""

    path: Path
    kind: Literal["mds"] = "mds"


ToyConfig = DigitsConfig | ScenesConfig | ThingsConfig
SourceConfig = DigitsConfig | ScenesConfig | ThingsConfig | FolderConfig | TarConfig | ParquetConfig | MDSConfig


class Source(Protocol):
    """A sequence of ((3, size, size) uint8, class index)."""

    num_classes: int
    size: int
    classes: tuple[str, ...]  # class names, by class index; empty if unknown

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...


class ToyImages:
    """The generated images of DigitsConfig, ScenesConfig or ThingsConfig."""

    def __init__(self, config: ToyConfig) -> None:
        self.config, self.size = config, config.size
        self.classes: tuple[str, ...] = (
            CLASSES if isinstance(config, ThingsConfig) else tuple(map(str, range(NUM_CLASSES)))
        )
        self.num_classes = len(self.classes)

    def __len__(self) -> int:
        return self.config.num_images

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        config = self.config
        match config:
            case DigitsConfig():
                return digit_image(config.seed, config.split, index, config.size)
            case ScenesConfig():
                return scene_image(config.seed, config.split, index, config.size)
            case ThingsConfig():
                return thing_image(config.seed, config.split, index, config.size)


class ImageFolder:
    """The images of FolderConfig. Hidden files and folders are left out; linked folders are read.

    Attributes:
        classes: class names, by class index.
        files: each image file with its class index.

    Raises:
        ValueError: if the folder is missing, has no class folders, or a class folder has no image or cannot be read.
    """

    def __init__(self, config: FolderConfig) -> None:
        if not config.path.is_dir():
            raise ValueError(f"source.path: {config.path} is not a folder")
        classes, others = class_folders(config.path)
        if not classes:
            raise ValueError(f"source.path: {config.path} has no class folders")
        self.files: list[tuple[Path, int]] = []
        for label, folder in enumerate(classes):
            listing = list_files(folder)
            others.update(listing.others)
            if not listing.files:
                raise ValueError(f"source.path: the class folder {folder} has no image ({IMAGES})")
            self.files += [(path, label) for path in listing.files]
        others.warn(config.path, IMAGES)
        _warn_one_level_too_high(config.path, classes, self.files)
        warn_about_upscaling(self.files[0][0], config.size)
        self.path, self.num_classes, self.size, self.upright = config.path, len(classes), config.size, config.upright
        self.classes = tuple(folder.name for folder in classes)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        return read_image(path, self.size, self.upright), label


def classes_one_level_down(classes: Sequence[Path], files: Sequence[tuple[Path, int]]) -> int:
    """The number of folders inside class folders that look like the classes; 0 if the class folders are right.

    They do if no image lies in a class folder itself, and more folders inside hold images than there are classes.
    """
    if any(path.parent == classes[label] for path, label in files):
        return 0
    inside = {path.parent for path, _ in files}
    return len(inside) if len(inside) > len(classes) else 0


def _warn_one_level_too_high(root: Path, classes: Sequence[Path], files: Sequence[tuple[Path, int]]) -> None:
    if inside := classes_one_level_down(classes, files):
        logger.warning(
            "source.path: %s: its folders, such as %s, hold no images themselves, but %d folders inside them do; the "
            "classes are %s. If the inner folders are the classes, give the folder that holds them", root,
            classes[0].name, inside, ", ".join(folder.name for folder in classes[:5]),
        )  # fmt: skip


class MDSImages:
    """The images of MDSConfig."""

    def __init__(self, config: MDSConfig) -> None:
        manifest = Manifest.read(config.path)
        if "image" not in manifest.columns:
            raise ValueError(f"source.path: {config.path} has no images; encode it with store.image=true")
        self.num_classes, self.classes, self.size = manifest.num_classes, manifest.classes, manifest.image_size
        self.index_sha256 = manifest.index_sha256
        self._samples = open_shards(config.path)

    def __len__(self) -> int:
        return self._samples.num_samples

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self._samples.gather([index], [["image"], ["label"]])
        return torch.from_numpy(image[0]), int(label[0])


def make_source(config: SourceConfig) -> Source:
    match config:
        case DigitsConfig() | ScenesConfig() | ThingsConfig():
            return ToyImages(config)
        case FolderConfig():
            return ImageFolder(config)
        case TarConfig():
            return TarImages(config)
        case ParquetConfig():
            return ParquetImages(config)
        case MDSConfig():
            return MDSImages(config)


def listing_sha256(source: Source) -> str | None:
    """SHA-256 of the names, sizes and classes of a source's files: a second start knows by it that they are the same.

    Returns:
        None for images that their settings decide.
    """
    digest = hashlib.sha256()
    match source:
        case ImageFolder():
            for path, label in source.files:
                digest.update(os.fsencode(path.relative_to(source.path)) + f"\0{label} {_size(path)}\n".encode())
        case TarImages():
            for member in source.members:
                place = f"{member.file.name}\0{member.name}\0{member.label} {member.start} {member.size}\n"
                digest.update(os.fsencode(place))
        case ParquetImages():
            for file in source.files:
                digest.update(os.fsencode(file.name) + f"\0{_size(file)}\n".encode())
            digest.update(source.labels.tobytes())
        case MDSImages():
            digest.update(source.index_sha256.encode())
        case _:
            return None
    return digest.hexdigest()


def _size(path: Path) -> int:
    """The size of a file in bytes; -1 if it cannot be read, which is an error when its image is."""
    try:
        return path.stat().st_size
    except OSError:
        return -1
