"""Reads image files as 8-bit RGB, with EXIF orientation and ADM's centre crop; names unreadable files."""

from __future__ import annotations

import io
import logging
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from sfd_scale.data.image_metadata import without_metadata
from sfd_scale.runtime.errors import reason
from sfd_scale.runtime.file_kind import HEAD_BYTES, bytes_error, file_error

logger = logging.getLogger(__name__)

# Without a list Pillow tries all its decoders on any file; the PostScript decoder starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
# Exceptions that Pillow's decoders raise for damaged files.
DECODE_ERRORS = (
    UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError,
    AttributeError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
# Larger pictures are not made whole on the way to a crop: 16 Mi pixels of 4 bytes.
MAX_RESIZED_PIXELS = 1 << 24
MAX_IMAGE_BYTES = 1 << 30  # of an image file; Pillow's limit of pixels allows 0.7 GB in BMP
_UPSCALING = 2.0  # above it, an image is visibly blurred
_WEIGHT_BITS = 22  # of Pillow's weights, as whole numbers
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(ValueError):
    """An image file cannot be read; the message names it."""


def read_image(file: Path | BinaryIO, size: int, upright: bool = True, name: str | None = None) -> Tensor:
    """Read an image as (3, size, size) uint8: RGB, ADM's centre crop. Arguments and errors are those of `read_rgb`."""
    return _tensor(centre_crop(read_rgb(file, upright, name), size))


def read_whole_image(file: Path | BinaryIO, upright: bool = True, name: str | None = None) -> Tensor:
    """Read an image as (3, H, W) uint8, without resize and crop. Arguments and errors are those of `read_rgb`."""
    return _tensor(read_rgb(file, upright, name))


def read_rgb(file: Path | BinaryIO, upright: bool = True, name: str | None = None) -> Image.Image:
    """Read an image file as 8-bit RGB. Every reader of images uses this function.

    - 16-bit channels: the high byte. 32-bit integers are 16-bit values, clipped. Floats are 0 to 1, clipped.
    - Transparency is dropped: a pixel has its stored colour, as with Pillow's `convert("RGB")`.
    - Grey, palette, 1-bit and CMYK images: Pillow's conversion. Colour profiles and gamma are not applied.
    - Damaged metadata (EXIF, ICC, XMP, text) is ignored. An image with damaged EXIF data is not rotated.

    Args:
        upright: rotate by the EXIF orientation tag.
        name: for the error message, if `file` is not a path.

    Raises:
        UnreadableImage: names the file, if it is empty, truncated, not an image (the message says what it is), or a
            decompression bomb.
    """
    name = str(file) if name is None else name
    try:
        return _decode(file, upright, name)
    except DECODE_ERRORS as error:
        try:
            data = _bytes_of(file)
        except OSError as unread:
            raise UnreadableImage(_unread(file, unread) if isinstance(file, Path) else f"{name}: {error}") from error
        if problem := bytes_error(name, data[:HEAD_BYTES], "image"):
            raise UnreadableImage(problem) from error
        try:
            bare = without_metadata(data)
            if bare is None:
                raise error
            image = _decode(io.BytesIO(bare), upright, name)
        except DECODE_ERRORS:
            raise UnreadableImage(f"{name}: {error}") from error
        logger.info("%s: damaged metadata ignored: %s", name, error)
        return image


def _unread(file: Path, error: OSError) -> str:
    """A sentence about a file whose bytes cannot be read, such as a link to a missing file."""
    try:
        return file_error(file, "image", reason(error))
    except ValueError as found:
        return str(found)


def _bytes_of(file: Path | BinaryIO) -> bytes:
    """The content of a file; of one that is too large for an image, only the start."""
    if isinstance(file, Path):
        with file.open("rb") as opened:
            return _bytes_of(opened)
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    return file.read(size if size <= MAX_IMAGE_BYTES else HEAD_BYTES)


def _decode(file: Path | BinaryIO, upright: bool, name: str) -> Image.Image:
    with Image.open(file, formats=FORMATS) as image:
        image.load()
        turn = _TURNS.get(_orientation(image, name)) if upright else None
        rgb = to_rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def _orientation(image: Image.Image, name: str) -> int:
    """The EXIF orientation, 1 to 8; 1 if there is none, or if it cannot be read."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except DECODE_ERRORS as error:
        logger.info("%s: damaged EXIF data ignored: %s", name, error)
        return 1
    return value if isinstance(value, int) else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode of Pillow to 8-bit RGB, by the rules of `read_rgb`."""
    if image.mode.startswith("I;16"):
        # Pillow would clip these to white.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode == "I":
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "F":
        values = np.nan_to_num(np.asarray(image), nan=0.0, posinf=1.0, neginf=0.0).clip(0, 1)
        image = Image.fromarray((values * 255 + 0.5).astype(np.uint8))
    else:
        image.info.pop("transparency", None)  # it is dropped; Pillow warns, or fails, for some of its forms
    return image.convert("RGB")


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop (arXiv 2105.05233).

    Halve the image with a box filter while its short side is at least 2·size; resize the short side to `size`
    bicubically; crop the centre. An enlarged picture of more than 16 Mi pixels (a strip, such as 1x60000) is not made
    whole: only the kept part is resized, to the same pixels.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    wide = (round(image.width * scale), round(image.height * scale))
    left, top = (wide[0] - size) // 2, (wide[1] - size) // 2
    if scale > 1 and wide[0] * wide[1] > MAX_RESIZED_PIXELS:
        return _resize_part(image, wide, (left, top), size)
    image = image.resize(wide, resample=Image.Resampling.BICUBIC)
    return image.crop((left, top, left + size, top + size))


def _resize_part(image: Image.Image, wide: tuple[int, int], corner: tuple[int, int], size: int) -> Image.Image:
    """The square at `corner` of `image` enlarged to `wide`, from the pixels that it depends on.

    Pillow's own box has float32 coordinates, which moves some pixels. Here are Pillow's whole-number weights of the
    enlargement, for the kept pixels alone: rows first, then columns.
    """
    sides = zip(image.size, wide, corner, strict=True)
    (left, columns), (top, rows) = (_bicubic_weights(old, new, range(at, at + size)) for old, new, at in sides)
    part = image.crop((left, top, left + columns.shape[1], top + rows.shape[1]))
    pixels = np.asarray(part, np.int64)  # (h, w, 3)
    pixels = _weighted(columns, pixels.transpose(1, 0, 2)).transpose(1, 0, 2)
    return Image.fromarray(_weighted(rows, pixels).astype(np.uint8))


def _bicubic_weights(old: int, new: int, kept: range) -> tuple[int, npt.NDArray[np.int64]]:
    """Pillow's bicubic enlargement of a side of `old` pixels to `new`: its weights for the `kept` pixels.

    Returns:
        The first pixel that they depend on, and the weights (kept, depended on), in units of 2⁻²².
    """
    scale = old / new
    centres = [(index + 0.5) * scale for index in kept]
    ranges = [range(max(0, int(centre - 1.5)), min(old, int(centre + 2.5))) for centre in centres]
    first, last = min(found.start for found in ranges), max(found.stop for found in ranges)
    weights = np.zeros((len(kept), last - first), np.int64)
    for row, centre, found in zip(weights, centres, ranges, strict=True):
        values = [_cubic(abs(index - centre + 0.5)) for index in found]
        total = sum(values)
        for index, value in zip(found, values, strict=True):
            scaled = value / total * (1 << _WEIGHT_BITS)
            row[index - first] = int(scaled + math.copysign(0.5, scaled))
    return first, weights


def _cubic(x: float) -> float:
    """The cubic convolution kernel of Pillow (a = -0.5)."""
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2 else 0.0


def _weighted(weights: npt.NDArray[np.int64], pixels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Weighted sums along the first axis, rounded to 8 bits as in Pillow."""
    summed = np.tensordot(weights, pixels, 1) + (1 << (_WEIGHT_BITS - 1))
    return np.clip(summed >> _WEIGHT_BITS, 0, 255)


def image_size(file: Path) -> tuple[int, int] | None:
    """Width and height of an image in pixels, from its header; None for a file that cannot be read."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            return image.size
    except DECODE_ERRORS:
        return None


def warn_about_upscaling(example: Path, size: int) -> None:
    """Log a warning if an image has to be enlarged more than two times. A damaged one is named when it is read."""
    pixels = image_size(example)
    if pixels is None:
        return
    side = min(pixels)
    if size > _UPSCALING * side:
        logger.warning(
            "%s has %d pixels; at %d pixels it is enlarged %.1f times and blurred", example, side, size, size / side
        )
