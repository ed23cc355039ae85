"""Where images to score come from: an ADM .npz, a flat folder, or any image source of the library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eval.images.npz import NpzImages
from sfd_scale import config
from sfd_scale.data.image_io import DECODE_ERRORS, FORMATS, SUFFIXES
from sfd_scale.data.sources import FolderConfig, MDSConfig, make_source
from sfd_scale.data.sources import SourceConfig as LibrarySource
from sfd_scale.runtime import distributed
from sfd_scale.runtime.files import file_sha256, write_atomically
from sfd_scale.runtime.progress import MB, progress


@dataclass(frozen=True, kw_only=True)
class NpzSource:
    """An .npz as ADM's evaluator takes it: arr_0 images and, in a reference, mu, sigma, mu_s, sigma_s."""

    path: Path
    kind: Literal["npz"] = "npz"


@dataclass(frozen=True, kw_only=True)
class FlatSource:
    """Image files without class folders, in the order of their names and as they are: no resize, no crop. Labels are
    read from labels.txt if it is there."""

    path: Path
    kind: Literal["flat"] = "flat"


ImagesConfig = LibrarySource | NpzSource | FlatSource


@dataclass(frozen=True)
class Images:
    """`count` images; `rows(range)` gives (n, 3, H, W) uint8 and labels (n,) int64, or None where there are none.
    `identity` changes when the data does."""

    count: int
    rows: Callable[[range], tuple[Tensor, Tensor | None]]
    fingerprint: str


def open_images(source: ImagesConfig, cache: Path | None = None) -> Images:
    """Open a source. Every rank has to call this.

    Args:
        cache: where the hashes of folders are kept, so that a second start need not read all files.

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
        images, labels = zip(*(opened[number] for number in numbers), strict=True)
        return torch.stack(images), torch.tensor(labels, dtype=torch.int64)

    return Images(len(opened), rows, f"{source.kind}:{_data_hash(source, cache)}")


def source_for(path: Path) -> ImagesConfig:
    """The source that a path on the command line means.

    Raises:
        ValueError: if there is nothing at the path, or something else.
    """
    _must_exist(path)
    if path.suffix == ".npz":
        return NpzSource(path=path)
    if path.is_dir():
        if (path / "manifest.json").is_file():
            return MDSConfig(path=path)
        if any(_is_image(file) for file in path.iterdir()):
            return FlatSource(path=path)
        size = _first_size(path)
        return FolderConfig(path=path, size=size)
    raise ValueError(f"{path}: allowed: an .npz, a folder of images or shards, or a folder of `eval generate`")


def _open_flat(source: FlatSource, cache: Path | None) -> Images:
    _must_exist(source.path)
    files = sorted(file for file in source.path.iterdir() if _is_image(file))
    if not files:
        raise ValueError(f"{source.path}: no image files in it")
    size, labels = _read(files[0]).shape[1:], _labels_file(source.path, len(files))

    def rows(numbers: range) -> tuple[Tensor, Tensor | None]:
        images = [_read(files[number]) for number in numbers]
        for number, image in zip(numbers, images, strict=True):
            if image.shape[1:] != size:
                raise ValueError(f"{files[number]}: {tuple(image.shape[1:])} pixels, the first image has {tuple(size)}")
        return torch.stack(images), None if labels is None else labels[numbers.start : numbers.stop]

    return Images(len(files), rows, f"flat:{_data_hash(source, cache)}")


def _read(path: Path) -> Tensor:
    try:
        with Image.open(path, formats=FORMATS) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
    except DECODE_ERRORS as error:
        raise ValueError(f"{path}: not a readable image: {error}") from error


def _labels_file(folder: Path, count: int) -> Tensor | None:
    file = folder / "labels.txt"
    if not file.is_file():
        return None
    labels = torch.tensor([int(line) for line in file.read_text(encoding="utf-8").split()])
    if len(labels) != count:
        raise ValueError(f"{file}: {len(labels)} labels for {count} images")
    return labels


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()


def _first_size(path: Path) -> int:
    first = next((file for file in sorted(path.rglob("*")) if _is_image(file)), None)
    if first is None:
        raise ValueError(f"{path}: no images in it, and no shards of `sfd encode`")
    return min(_read(first).shape[1:])


def _must_exist(path: Path) -> None:
    if not path.exists():
        raise ValueError(f"{path}: there is nothing at this path")


def _describe(source: Any) -> str:
    return json.dumps(config.to_dict(source), sort_keys=True)


def _data_hash(source: Any, cache: Path | None) -> str:
    """SHA-256 over the settings and over the content of what is at the source's path, wherever that is: the shards'
    manifest and indices, which hold the shards' hashes, or all files."""
    settings = config.to_dict(source)
    path = settings.pop("path", None)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    if path is None:
        return digest.hexdigest()
    path = Path(path)
    _must_exist(path)
    shards = isinstance(source, MDSConfig)
    indices = sorted([*path.rglob("index.json"), *path.glob("manifest.json")]) if shards else []
    for file in indices:
        digest.update(file.relative_to(path).as_posix().encode() + file.read_bytes())
    if not indices:
        # One rank reads: the folder is as large as its images.
        digest.update(distributed.broadcast_object(_files_hash(path, cache) if distributed.is_main() else "").encode())
    return digest.hexdigest()


def _files_hash(path: Path, cache: Path | None) -> str:
    """SHA-256 over the names and bytes of all files below, or of the file; kept in the cache for as long as names,
    sizes and times are the same."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    listing, sizes = hashlib.sha256(), list[int]()
    for file in files:
        status = file.stat()
        listing.update(f"{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        sizes.append(status.st_size)
    known = None if cache is None else cache / f"content-{listing.hexdigest()[:32]}.txt"
    if known is not None and known.is_file():
        return known.read_text(encoding="utf-8")
    digest = hashlib.sha256()
    with progress(sum(sizes) // MB, f"hash {path}", "MB") as bar:
        for file, size in zip(files, sizes, strict=True):
            name = file.relative_to(path) if path.is_dir() else Path(file.name)
            digest.update(f"{name.as_posix()}\0{size}\n".encode())
            with file.open("rb") as stream:
                while piece := stream.read(1 << 20):
                    digest.update(piece)
                    bar.advance_bytes(len(piece))
    if known is not None:
        write_atomically(known, digest.hexdigest())
    return digest.hexdigest()
