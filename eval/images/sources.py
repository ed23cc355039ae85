"""Sources of images to score: an ADM .npz, a flat folder, or any image source of sfd_scale."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from eval.images.npz import NpzImages, check_pixels
from sfd_scale import config
from sfd_scale.data.image_files import IMAGES, list_files, sort_key
from sfd_scale.data.image_io import image_size, read_whole_image
from sfd_scale.data.parquet import ParquetImages
from sfd_scale.data.sources import FolderConfig, ImageFolder, MDSConfig, Source, make_source
from sfd_scale.data.sources import SourceConfig as LibrarySource
from sfd_scale.data.tars import TarImages
from sfd_scale.runtime import distributed
from sfd_scale.runtime.errors import reason
from sfd_scale.runtime.file_kind import file_error, require_kind
from sfd_scale.runtime.files import file_sha256, file_version, write_atomically
from sfd_scale.runtime.progress import MB, progress

LABELS = "labels.txt"
_LABEL_BYTES = 64  # of one label and the blanks after it
_CLASS_INDEX = re.compile("[0-9]{1,18}")


@dataclass(frozen=True, kw_only=True)
class NpzSource:
    """An .npz of ADM's evaluator: arr_0 images and, in a reference, mu, sigma, mu_s, sigma_s."""

    path: Path
    kind: Literal["npz"] = "npz"


@dataclass(frozen=True, kw_only=True)
class FlatSource:
    """Image files without class folders, in the order of their names, not resized and not cropped.

    labels.txt in the folder gives the labels, if it exists.
    """

    path: Path
    kind: Literal["flat"] = "flat"


ImagesConfig = LibrarySource | NpzSource | FlatSource


@dataclass(frozen=True)
class Images:
    """`count` images.

    rows: takes a range of numbers; returns images (n, 3, H, W) uint8 and labels (n,) int64, or None without labels.
    fingerprint: changes when the data changes.
    jpeg: how many are JPEG files, by their names.
    """

    count: int
    rows: Callable[[range], tuple[Tensor, Tensor | None]]
    fingerprint: str
    jpeg: int = 0


def open_images(source: ImagesConfig, cache: Path | None = None, one_size: bool = False) -> Images:
    """Open a source. All ranks have to call this.

    Args:
        cache: the folder for hashes of image folders. With it, a second start does not read all files again.
        one_size: refuse image files of several sizes. Otherwise those in class folders are cropped to one size, as of a
            reference.

    Raises:
        ValueError: for files that do not exist or hold no uint8 images, and for images of several sizes.
    """
    match source:
        case NpzSource():
            _must_exist(source.path)
            file = NpzImages(source.path)
            return Images(len(file), file.rows, f"npz:{file_sha256(source.path)}")
        case FlatSource():
            return _open_flat(source, cache)
    opened = make_source(source)
    if len(opened) == 0:
        raise ValueError(f"{_describe(source)}: no images in it")

    def rows(numbers: range) -> tuple[Tensor, Tensor | None]:
        if one_size and isinstance(opened, ImageFolder):
            _require_one_size([opened.files[number][0] for number in (0, *numbers)])
        images, labels = zip(*(opened[number] for number in numbers), strict=True)
        return torch.stack(images), torch.tensor(labels, dtype=torch.int64)

    files = _files_read(opened)
    return Images(len(opened), rows, f"{source.kind}:{_data_hash(source, files, cache)}", _jpeg_files(files))


def _jpeg_files(files: list[Path]) -> int:
    return sum(file.suffix.lower() in (".jpg", ".jpeg") for file in files)


def _require_one_size(files: list[Path]) -> None:
    """Raises ValueError for a file of another size than the first; a damaged one is named when it is read."""
    sizes = [image_size(file) for file in files]
    for file, size in zip(files, sizes, strict=True):
        if size is not None and sizes[0] is not None and size != sizes[0]:
            raise ValueError(
                f"{file}: {size[0]}x{size[1]} pixels, {files[0]} has {sizes[0][0]}x{sizes[0][1]}; allowed: images of "
                "one size, which are not resized. `sfd encode` with store.image=true writes images of one size"
            )


def source_for(path: Path, size: int | None = None) -> ImagesConfig:
    """The kind of source that is at a path.

    Args:
        size: of images in class folders, which are cropped to it; by default the shorter side of the first.

    Raises:
        ValueError: if nothing is there, or no source of images.
    """
    _must_exist(path)
    if path.suffix == ".npz":
        return NpzSource(path=path)
    if path.is_dir():
        if (path / "manifest.json").is_file():
            return MDSConfig(path=path)
        if list_files(path, recursive=False).files:
            return FlatSource(path=path)
        return FolderConfig(path=path, size=_first_size(path) if size is None else size)
    raise ValueError(f"{path}: allowed: an .npz, a folder of images or shards, or a folder of `eval generate`")


def _open_flat(source: FlatSource, cache: Path | None) -> Images:
    _must_exist(source.path)
    labels_file = source.path / LABELS
    listing = list_files(source.path, recursive=False, known=[labels_file])
    files = listing.files
    if not files:
        raise ValueError(f"{source.path}: no image files in it")
    read, labels = list(files), None
    if labels_file.is_file():
        labels = _read_labels(labels_file, len(files))
        read = sorted([*files, labels_file], key=sort_key)
    listing.others.warn(source.path, IMAGES)
    size = read_whole_image(files[0], upright=False).shape[1:]
    check_pixels(size[0], size[1], str(files[0]))

    def rows(numbers: range) -> tuple[Tensor, Tensor | None]:
        images = [read_whole_image(files[number], upright=False) for number in numbers]
        for number, image in zip(numbers, images, strict=True):
            if image.shape[1:] != size:
                raise ValueError(f"{files[number]}: {tuple(image.shape[1:])} pixels, the first image has {tuple(size)}")
        return torch.stack(images), None if labels is None else labels[numbers.start : numbers.stop]

    return Images(len(files), rows, f"flat:{_data_hash(source, read, cache)}", _jpeg_files(files))


def _read_labels(file: Path, count: int) -> Tensor:
    """Class indices from a text file, (count,) int64.

    Raises:
        ValueError: names the file, if it holds anything but `count` class indices.
    """
    require_kind(file, "text")
    if file.stat().st_size > _LABEL_BYTES * max(count, 1):
        raise ValueError(
            f"{file}: {file.stat().st_size:,} bytes for {count} labels; allowed: one class index per image"
        )
    try:
        words = file.read_bytes().decode("utf-8-sig").split()
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{file}: no text in UTF-8 ({error}); allowed: one class index per image") from error
    wrong = next(((at, word) for at, word in enumerate(words) if not _CLASS_INDEX.fullmatch(word)), None)
    if wrong is not None:
        raise ValueError(f"{file}: word {wrong[0] + 1} is {wrong[1][:40]!r}; allowed: class indices, 0 and up")
    if len(words) != count:
        raise ValueError(f"{file}: {len(words)} labels for {count} images")
    return torch.tensor([int(word) for word in words], dtype=torch.int64)


def _first_size(path: Path) -> int:
    files = list_files(path).files
    if not files:
        raise ValueError(f"{path}: no images in it, and no shards of `sfd encode`")
    side = min(read_whole_image(files[0]).shape[1:])
    check_pixels(side, side, f"{files[0]}, cropped")
    return side


def _must_exist(path: Path) -> None:
    if not path.exists():
        raise ValueError(f"{path}: there is nothing at this path")


def _describe(source: Any) -> str:
    return json.dumps(config.to_dict(source), sort_keys=True)


def _files_read(source: Source) -> list[Path]:
    """The files that a source reads; none for shards and generated images."""
    match source:
        case ImageFolder():
            return [path for path, _ in source.files]
        case TarImages() | ParquetImages():
            return source.files
    return []


def _data_hash(source: Any, files: list[Path], cache: Path | None) -> str:
    """SHA-256 of the source's settings and of its data; its path does not matter.

    Of shards, the manifest and the indices count, which hold the shards' hashes; otherwise `files`, which are read.
    """
    settings = config.to_dict(source)
    path = settings.pop("path", None)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    if path is None:
        return digest.hexdigest()
    path = Path(path)
    _must_exist(path)
    if isinstance(source, MDSConfig):
        listed = list_files(path, {".json"}).files
        indices = [file for file in listed if file.name == "index.json" or file == path / "manifest.json"]
        for file in indices:
            digest.update(os.fsencode(file.relative_to(path)) + file.read_bytes())
        return digest.hexdigest()
    # Only one rank reads all images.
    digest.update(
        distributed.broadcast_object(_files_hash(path, files, cache) if distributed.is_main() else "").encode()
    )
    return digest.hexdigest()


def _files_hash(path: Path, files: list[Path], cache: Path | None) -> str:
    """SHA-256 of the names below `path` and of the bytes of `files`.

    The cache holds it; it is computed again when a name or a `file_version` changes.

    Raises:
        ValueError: naming a file that cannot be read, such as a link to a missing file.
    """
    listing, sizes = hashlib.sha256(), list[int]()
    for file in files:
        try:
            version = file_version(file)
        except OSError as error:
            raise ValueError(file_error(file, "image", reason(error))) from error
        place = os.fsencode(file) + b"\0" + os.fsencode(file.resolve())
        listing.update(place + f"\0{' '.join(map(str, version))}\n".encode())
        sizes.append(version.size)
    known = None if cache is None else cache / f"content-{listing.hexdigest()[:32]}.txt"
    if known is not None and known.is_file():
        return known.read_text(encoding="utf-8")
    digest = hashlib.sha256()
    with progress(sum(sizes) // MB, f"hash {path}", "MB") as bar:
        for file, size in zip(files, sizes, strict=True):
            name = file.relative_to(path) if path.is_dir() else Path(file.name)
            digest.update(os.fsencode(name.as_posix()) + f"\0{size}\n".encode())
            with file.open("rb") as stream:
                while piece := stream.read(1 << 20):
                    digest.update(piece)
                    bar.advance_bytes(len(piece))
    if known is not None:
        write_atomically(known, digest.hexdigest())
    return digest.hexdigest()
