"""Where images come from: a class folder, the quickstart's digits, or shards of our own.

A source is a sequence of ((3, H, W) uint8, class index).
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from sfd_scale.data.schema import Manifest
from sfd_scale.data.shards import open_shards
from sfd_scale.data.synthetic import NUM_CLASSES, Split, digit_image

# Pillow would try every decoder it has on a file of any name; that of PostScript starts another program.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
# What Pillow's decoders let through for damaged files, besides its own errors.
DAMAGE = (
    UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, OverflowError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DigitsConfig:
    """Real handwritten digits on procedural grounds (sfd_scale.data.synthetic)."""

    kind: Literal["digits"] = "digits"
    split: Split = "train"
    num_images: int = 8000
    size: int = 32
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class FolderConfig:
    """One folder a class, as ImageNet is unpacked; classes are the sorted folder names.

    upright: turn images by their EXIF tag. ADM's references and the authors' data were made without.
    """

    path: Path
    kind: Literal["folder"] = "folder"
    size: int = 256
    upright: bool = True


@dataclass(frozen=True, kw_only=True)
class MDSConfig:
    """The image column of shards that `sfd encode` wrote."""

    path: Path
    kind: Literal["mds"] = "mds"


SourceConfig = DigitsConfig | FolderConfig | MDSConfig


class UnreadableImage(ValueError):
    """A file that is no whole image; the message names it."""


class Source(Protocol):
    num_classes: int
    size: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...


class Digits:
    """See DigitsConfig."""

    num_classes = NUM_CLASSES

    def __init__(self, config: DigitsConfig) -> None:
        self.config, self.size = config, config.size

    def __len__(self) -> int:
        return self.config.num_images

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return digit_image(self.config.seed, self.config.split, index, self.size)


class Folder:
    """See FolderConfig.

    Raises:
        ValueError: if the folder is missing, has no class folders, or one of them holds no image.
    """

    def __init__(self, config: FolderConfig) -> None:
        if not config.path.is_dir():
            raise ValueError(f"source.path: {config.path} is not a folder")
        classes = sorted(path for path in config.path.iterdir() if path.is_dir())
        if not classes:
            raise ValueError(f"source.path: {config.path} has no class folders")
        self.files: list[tuple[Path, int]] = []
        for label, folder in enumerate(classes):
            own = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
            if not own:
                kinds = ", ".join(sorted(_SUFFIXES))
                raise ValueError(f"source.path: the class folder {folder} holds no image ({kinds})")
            self.files += [(path, label) for path in own]
        self.num_classes, self.size, self.upright = len(classes), config.size, config.upright

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        return read_image(path, self.size, self.upright), label


class Shards:
    """See MDSConfig."""

    def __init__(self, config: MDSConfig) -> None:
        manifest = Manifest.read(config.path)
        if "image" not in manifest.columns:
            raise ValueError(f"source.path: {config.path} stores no images; encode it with store.image=true")
        self.num_classes, self.size = manifest.num_classes, manifest.image_size
        self._rows = open_shards(config.path)

    def __len__(self) -> int:
        return self._rows.num_samples

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = self._rows[index]
        return torch.from_numpy(row["image"].copy()), int(row["label"])


def make_source(config: SourceConfig) -> Source:
    match config:
        case DigitsConfig():
            return Digits(config)
        case FolderConfig():
            return Folder(config)
        case MDSConfig():
            return Shards(config)


def read_image(path: Path, size: int, upright: bool = True) -> Tensor:
    """An image file as (3, size, size) uint8: turned by its EXIF tag, RGB, ADM centre crop.

    Raises:
        UnreadableImage: naming the file, if it is empty, cut off, no image, or too large to be honest.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            turned = ImageOps.exif_transpose(image) if upright else image
            rgb = _eight_bits(turned).convert("RGB")
    except DAMAGE as error:
        raise UnreadableImage(f"{path}: {error}") from error
    return torch.from_numpy(np.array(centre_crop(rgb, size))).permute(2, 0, 1).contiguous()


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits; Pillow would clip it to white."""
    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's crop (arXiv 2105.05233): halve by boxes while the short side is at least twice `size`, resize it to `size`
    bicubically, cut out the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    wide = (round(image.width * scale), round(image.height * scale))
    image = image.resize(wide, resample=Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
