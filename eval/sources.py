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

from eval.npz import NpzImages
from eval.weights import file_sha256
from sfd_scale import config
from sfd_scale.data.images import FolderConfig, MDSConfig, make_source
from sfd_scale.data.images import SourceConfig as LibrarySource
from sfd_scale.data.pixels import DAMAGE, FORMATS

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})


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


SourceConfig = LibrarySource | NpzSource | FlatSource


@dataclass(frozen=True)
class Images:
    """`count` images; `rows(range)` gives (n, 3, H, W) uint8 and labels (n,) int64, or None where there are none.
    `identity` changes when the data does."""

    count: int
    rows: Callable[[range], tuple[Tensor, Tensor | None]]
    identity: str


def open_images(source: SourceConfig) -> Images:
    """Open a source.

    Raises:
        ValueError: for files that do not exist or hold no uint8 images, and for images of several sizes.
    """
    match source:
        case NpzSource():
            _must_exist(source.path)
            file = NpzImages(source.path)
            return Images(len(file), file.rows, f"npz:{file_sha256(source.path)}")
        case FlatSource():
            return _open_flat(source)
    opened = make_source(source)
    if len(opened) == 0:
        raise ValueError(f"{_describe(source)}: no images in it")

    def rows(numbers: range) -> tuple[Tensor, Tensor | None]:
        images, labels = zip(*(opened[number] for number in numbers), strict=True)
        return torch.stack(images), torch.tensor(labels, dtype=torch.int64)

    return Images(len(opened), rows, f"{source.kind}:{_data_hash(source)}")


def source_for(path: Path) -> SourceConfig:
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


def _open_flat(source: FlatSource) -> Images:
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

    return Images(len(files), rows, f"flat:{_data_hash(source)}")


def _read(path: Path) -> Tensor:
    try:
        with Image.open(path, formats=FORMATS) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
    except DAMAGE as error:
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
    return file.suffix.lower() in _SUFFIXES and not file.name.startswith(".") and file.is_file()


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


def _data_hash(source: Any) -> str:
    """SHA-256 over the settings, and over what is below the source's path: the shards' manifest and indices, or names,
    sizes and times of image files (to read them all takes as long as to score them)."""
    digest = hashlib.sha256(_describe(source).encode())
    path = getattr(source, "path", None)
    if path is None:
        return digest.hexdigest()
    _must_exist(path)
    indices = sorted([*path.rglob("index.json"), *path.glob("manifest.json")])
    for file in indices:
        digest.update(file.relative_to(path).as_posix().encode() + file.read_bytes())
    if not indices:
        for file in sorted(path.rglob("*")):
            if file.is_file():
                status = file.stat()
                digest.update(f"{file.relative_to(path)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
