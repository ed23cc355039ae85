"""Image files → pixels: orientation, colour, ADM's crop, and what is no whole image."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

# Pillow would try every decoder it has on a file of any name; that of PostScript starts another program.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
# What Pillow's decoders let through for damaged files, besides its own errors.
DAMAGE = (
    UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, OverflowError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


class UnreadableImage(ValueError):
    """A file that is no whole image; the message names it."""


def read_image(file: Path | BinaryIO, size: int, upright: bool = True, name: str | None = None) -> Tensor:
    """An image file (`name`, if it is no path) as (3, size, size) uint8: turned by its EXIF tag, RGB, ADM centre crop.

    Raises:
        UnreadableImage: naming the file, if it is empty, cut off, no image, or too large to be honest.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            turned = ImageOps.exif_transpose(image) if upright else image
            rgb = _eight_bits(turned).convert("RGB")
    except DAMAGE as error:
        raise UnreadableImage(f"{file if name is None else name}: {error}") from error
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
