"""Reads image files: EXIF orientation, RGB, ADM's centre crop; names unreadable files."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

# Without a list Pillow tries all its decoders on any file; the PostScript decoder starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
# Exceptions that Pillow's decoders raise for damaged files.
DECODE_ERRORS = (
    UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, OverflowError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


class UnreadableImage(ValueError):
    """An image file cannot be read; the message names it."""


def read_image(file: Path | BinaryIO, size: int, upright: bool = True, name: str | None = None) -> Tensor:
    """Read an image as (3, size, size) uint8: RGB, ADM's centre crop.

    Args:
        upright: rotate by the EXIF orientation tag.
        name: for the error message, if `file` is not a path.

    Raises:
        UnreadableImage: names the file, if it is empty, truncated, not an image, or a decompression bomb.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            turned = ImageOps.exif_transpose(image) if upright else image
            rgb = _eight_bits(turned).convert("RGB")
    except DECODE_ERRORS as error:
        raise UnreadableImage(f"{file if name is None else name}: {error}") from error
    return torch.from_numpy(np.array(centre_crop(rgb, size))).permute(2, 0, 1).contiguous()


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits; Pillow would clip it to white."""
    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop (arXiv 2105.05233).

    Halve the image with a box filter while its short side is at least 2·size; resize the short side to `size`
    bicubically; crop the centre.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    wide = (round(image.width * scale), round(image.height * scale))
    image = image.resize(wide, resample=Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
