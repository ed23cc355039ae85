"""ADM's .npz files of images and statistics. Images are streamed: they are never in memory as a whole."""

from __future__ import annotations

import functools
import math
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sfd_scale.runtime.file_kind import file_error, require_kind
from sfd_scale.runtime.files import atomically, file_version
from sfd_scale.runtime.memory import require_memory

npy: Any = np.lib.format  # untyped
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")
# Errors of zipfile and numpy for damaged files.
_DAMAGE = (OSError, zipfile.BadZipFile, zlib.error, struct.error, ValueError, KeyError, EOFError, RuntimeError)
ASYMMETRY = 1e-3  # of a covariance, as a share of the largest variance; rounding to float16 gives up to 5e-4
MAX_PIXELS = 1 << 24  # of an image to score
_MOST_COMPRESSED = 200  # a larger compression ratio is that of a file made to fill the memory


def write_images(path: Path, batches: Iterable[Tensor], count: int, size: tuple[int, int], labels: Tensor) -> None:
    """An .npz that ADM's evaluator reads: arr_0 images (count, H, W, 3) uint8, arr_1 labels (count,) int64.

    Args:
        batches: (n, 3, H, W) uint8 each, together `count` images.

    Raises:
        ValueError: if there are not exactly `count` images of `size`, or the disk is full. No file is left then.
    """
    with atomically(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            _header(file, (count, *size, 3), np.dtype(np.uint8))
            written = 0
            for batch in batches:
                if tuple(batch.shape[1:]) != (3, *size) or batch.dtype != torch.uint8:
                    raise ValueError(f"{path}: a batch of {tuple(batch.shape)} {batch.dtype} among images of {size}")
                file.write(batch.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
                written += len(batch)
        if written != count or len(labels) != count:
            raise ValueError(f"{path}: {written} images and {len(labels)} labels, expected {count} of both")
        with archive.open("arr_1.npy", "w", force_zip64=True) as file:
            _header(file, (count,), np.dtype(np.int64))
            file.write(labels.to(torch.int64).numpy().tobytes())


def _header(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> None:
    description = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(file, description)


class NpzImages:
    """The images of an .npz: arr_0, (count, H, W, 3) uint8.

    An uncompressed file, as np.savez writes it, is memory-mapped. A compressed one is read into memory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        names = keys(path)
        if "arr_0" not in names:
            raise ValueError(f"{path}: holds {', '.join(sorted(names)) or 'nothing'}; images have to be named arr_0")
        self.array = _mapped(path, "arr_0.npy")
        self.labels = _mapped(path, "arr_1.npy") if "arr_1" in names else None
        shape, dtype = self.array.shape, self.array.dtype
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8:
            nan = dtype.kind == "f" and bool(np.isnan(self.array[:64]).any())
            raise ValueError(
                f"{path}: arr_0 is {dtype} {shape}{' with NaN in it' if nan else ''}; allowed: uint8 (N, H, W, 3). For "
                "x in −1..1 that is floor(clamp(127.5·x + 128, 0, 255))"
            )
        check_pixels(shape[1], shape[2], f"{path}: arr_0")
        if len(self) == 0:
            raise ValueError(f"{path}: arr_0 has the shape {shape}, so there are no images in it")
        if self.labels is not None and self.labels.shape != (len(self),):
            raise ValueError(f"{path}: {len(self)} images and labels (arr_1) of shape {self.labels.shape}")
        if self.labels is not None and not _whole_numbers(self.labels):
            raise ValueError(
                f"{path}: labels (arr_1) of {self.labels.dtype}; allowed: whole numbers, the class indices"
            )

    def __len__(self) -> int:
        return len(self.array)

    def rows(self, rows: range) -> tuple[Tensor, Tensor | None]:
        """Images (n, 3, H, W) uint8 of consecutive numbers, and their labels (n,) int64 from arr_1, or None."""
        block = torch.from_numpy(np.array(self.array[rows.start : rows.stop]))
        labels = None
        if self.labels is not None:
            labels = torch.from_numpy(np.array(self.labels[rows.start : rows.stop], dtype=np.int64))
        return block.permute(0, 3, 1, 2).contiguous(), labels


def _whole_numbers(values: npt.NDArray[Any]) -> bool:
    return values.dtype.kind in "iu" or (values.dtype.kind == "f" and bool((values == np.floor(values)).all()))


def check_pixels(height: int, width: int, where: str) -> None:
    """Bound the size of the images to score: a batch of them is in memory at once.

    Raises:
        ValueError: if images have no pixels, or more than 16 Mi.
    """
    if not 0 < height * width <= MAX_PIXELS:
        raise ValueError(f"{where}: images of {width}x{height} pixels; allowed: 1 to {MAX_PIXELS:,} pixels")


def _mapped(path: Path, member: str) -> npt.NDArray[Any]:
    """One array of a zip archive, memory-mapped if it is uncompressed and in C order.

    Raises:
        ValueError: for a damaged file, pickled objects, or an excessive compression ratio.
    """
    try:
        return _map(path, member)
    except _DAMAGE as error:
        damaged = str(error).startswith("Bad CRC-32")  # of zipfile
        cause = "its bytes do not match their checksum; download or write the file again" if damaged else error
        raise ValueError(f"{path}: {member} cannot be read: {cause}") from error


def _map(path: Path, member: str) -> npt.NDArray[Any]:
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
        with archive.open(info) as file:
            version = npy.read_magic(file)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, fortran, dtype = read(file)
            header = file.tell()
        if dtype.hasobject:
            raise ValueError("it holds pickled objects, which could run code")
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or header + size != info.file_size:
            raise ValueError(f"its header says {size} bytes, the archive {info.file_size - header}")
        if info.file_size > max(_MOST_COMPRESSED * info.compress_size, 1 << 20):
            raise ValueError(f"{info.file_size} bytes packed into {info.compress_size}: not an honest file")
        if info.compress_type != zipfile.ZIP_STORED or fortran:
            require_memory(size, "it", "write the file uncompressed, with np.savez: it is then read in parts")
            with archive.open(info) as file:
                return np.asarray(npy.read_array(file, allow_pickle=False))
    _check_sum(path, member, *file_version(path))
    with path.open("rb") as raw:
        raw.seek(info.header_offset + 26)
        # A local file header: 30 bytes, then the name and the extra field, whose lengths are its last two numbers.
        name, extra = struct.unpack("<HH", raw.read(4))
    start = info.header_offset + 30 + name + extra + header
    if start + size > path.stat().st_size:
        raise ValueError("the file is cut off")
    return np.memmap(path, dtype, "r", start, shape)


@functools.lru_cache
def _check_sum(path: Path, member: str, *version: int) -> None:
    """Read an array once and compare its CRC-32. A memory-mapped array is not compared with it.

    Raises:
        BadZipFile: if the file is damaged, such as by a download with a gap of zeros.
    """
    with zipfile.ZipFile(path) as archive, archive.open(member) as file:
        while file.read(1 << 20):
            pass


def keys(path: Path) -> set[str]:
    """Names of the arrays in an .npz.

    Raises:
        ValueError: if the file is not a readable .npz.
    """
    require_kind(path, "npz")
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except _DAMAGE as error:
        raise ValueError(file_error(path, "npz", error)) from error


def read_statistics(path: Path) -> dict[str, Tensor]:
    """mu, sigma, mu_s and sigma_s as float64, as far as the file has them. Other keys are ignored.

    Raises:
        ValueError: for a mean without covariance (or the reverse), wrong shapes, values that are not finite, or a
            matrix that is no covariance.
    """
    arrays = {key: _mapped(path, f"{key}.npy") for key in STATISTICS if key in keys(path)}
    if any(array.dtype.kind not in "fiu" for array in arrays.values()):
        raise ValueError(f"{path}: {', '.join(f'{key} is {array.dtype}' for key, array in arrays.items())}")
    found = {key: torch.from_numpy(np.array(array, dtype=np.float64)) for key, array in arrays.items()}
    for mean, cov in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if (mean in found) != (cov in found):
            raise ValueError(f"{path}: has {mean if mean in found else cov} without its partner")
        if mean in found:
            dim = found[mean].numel()
            found[mean] = found[mean].flatten()
            if tuple(found[cov].shape) != (dim, dim):
                raise ValueError(f"{path}: {mean} has {dim} entries and {cov} the shape {tuple(found[cov].shape)}")
            if not bool(found[mean].isfinite().all() and found[cov].isfinite().all()):
                raise ValueError(f"{path}: {mean} or {cov} is not finite")
            _check_covariance(found[cov], f"{path}: {cov}")
    return found


def _check_covariance(cov: Tensor, where: str) -> None:
    """Refuse a matrix that is no covariance: the Fréchet distance would read a half of it, or count parts as 0.

    Raises:
        ValueError: if it is not symmetric, or a variance is negative.
    """
    largest = cov.diagonal().abs().max()
    apart = (cov - cov.T).abs().max()
    if bool(apart > ASYMMETRY * largest):
        raise ValueError(
            f"{where} is not symmetric: entries across the diagonal differ by up to {apart.item():.3g}, and the "
            f"largest variance is {largest.item():.3g}; allowed: a covariance, as of np.cov(features, rowvar=False)"
        )
    if bool((cov.diagonal() < 0).any()):
        raise ValueError(
            f"{where} has negative variances, down to {cov.diagonal().min().item():.3g}; allowed: 0 and up"
        )
