"""Features of given images, in the same chunks as those of generated images; and reading features back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.features.extractor import Extractor, LazyExtractor
from eval.images.sources import Images
from eval.work import chunks
from eval.work.chunks import ChunkFolder
from sfd_scale.config import digest
from sfd_scale.runtime import distributed
from sfd_scale.runtime.files import read_json


@dataclass(frozen=True)
class FeatureSet:
    """Features of N images in the order of their numbers, float32.

    pool: (N, P). spatial: (N, S) or None. logits: (N, K) or None. labels: (N,) int64 or None.
    config: the settings that determined them.
    """

    pool: Tensor
    spatial: Tensor | None
    logits: Tensor | None
    labels: Tensor | None
    config: dict[str, Any]

    def __len__(self) -> int:
        return len(self.pool)


def open_features(path: Path) -> ChunkFolder:
    """A folder that `generate` or `extract` filled.

    Raises:
        ValueError: if it is another folder, or not complete.
    """
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"{path}: no folder of features (no config.json in it)")
    config = read_json(file)
    known = config if isinstance(config, dict) else {}
    numbers = [known.get(name) for name in ("num_samples", "batch")]
    if "extractor" not in known or not all(type(number) is int and number > 0 for number in numbers):
        raise ValueError(
            f"{file}: not of a folder of features; allowed: a folder of `generate`, or images without this file"
        )
    folder = ChunkFolder(path, known["num_samples"], known["batch"])
    missing = folder.missing()
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} of {folder.count} chunks are missing; repeat the command that fills it"
        )
    return folder


def read_features(folder: ChunkFolder) -> FeatureSet:
    """All rows of a complete folder, in the order of image numbers."""
    config = read_json(folder.path / "config.json")
    pool = read_rows(folder, "pool")
    assert pool is not None
    spatial, logits, labels = (read_rows(folder, name) for name in ("spatial", "logits", "labels"))
    return FeatureSet(pool, spatial, logits, labels, config)


def read_rows(folder: ChunkFolder, name: str) -> Tensor | None:
    """One tensor (N, ...) of a complete folder, in the order of image numbers; None if the folder lacks it.

    Raises:
        ValueError: for another number of rows than that of the images, or values that are not finite.
    """
    if name not in folder.names():
        return None
    tensor = torch.cat(list(folder.read(name)))
    if len(tensor) != folder.total:
        raise ValueError(f"{folder.path}: {len(tensor)} rows of {name}, expected {folder.total}")
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        row = int((~tensor.isfinite().reshape(len(tensor), -1)).any(1).nonzero()[0])
        raise ValueError(
            f"{folder.path}: {name} of image {row} is not finite, so {folder.file(row // folder.size)} is damaged; "
            "remove this file and repeat the command that fills the folder"
        )
    return tensor


def extract(images: Images, extractor: LazyExtractor, batch: int, cache: Path) -> ChunkFolder:
    """Features of all images, computed once by all ranks. The folder in `cache` is named by their settings."""
    return extract_all(images, [extractor], batch, cache)[0]


def extract_all(images: Images, extractors: Sequence[LazyExtractor], batch: int, cache: Path) -> list[ChunkFolder]:
    """Features of several extractors, a folder for each. Images are read once for all extractors that lack them."""
    folders = [_open_for(images, extractor, batch, cache) for extractor in extractors]
    todo = distributed.broadcast_object([bool(folder.missing()) for folder in folders])
    missing = [pair for pair, lacks in zip(zip(folders, extractors, strict=True), todo, strict=True) if lacks]
    needed = {folder: extractor.get() for folder, extractor in missing}
    if not needed:
        return folders

    def produce(chunk: int) -> tuple[chunks.Finish, dict[str, Any]]:
        pixels, labels = images.rows(folders[0].rows(chunk))
        known = {} if labels is None else {"labels": labels}

        def finish() -> dict[ChunkFolder, dict[str, Tensor]]:
            found = extract_missing(needed, pixels, chunk, batch)
            return {folder: {**tensors, **known} for folder, tensors in found.items()}

        return finish, {}

    chunks.run(list(needed), produce, "features", "images")
    return folders


def _open_for(images: Images, extractor: LazyExtractor, batch: int, cache: Path) -> ChunkFolder:
    """The folder in `cache` for the features of an extractor. All ranks have to call this."""
    config = {
        "kind": "extracted",
        "images": images.fingerprint,
        "extractor": extractor.fingerprint,
        "num_samples": images.count,
        "batch": batch,
    }
    folder = ChunkFolder(cache / f"features-{digest(config)[:16]}", images.count, batch)
    if distributed.is_main():
        folder.require_settings(config)
    distributed.barrier()
    return folder


def extract_missing(
    networks: Mapping[ChunkFolder, Extractor], images: Tensor, chunk: int, batch: int
) -> dict[ChunkFolder, dict[str, Tensor]]:
    """Features of the images of a chunk, by the network of each folder that lacks the chunk."""
    return {
        folder: extract_padded(network, images, batch)
        for folder, network in networks.items()
        if not folder.is_whole(chunk)
    }


def extract_padded(extractor: Extractor, images: Tensor, batch: int) -> dict[str, Tensor]:
    """Features of at most `batch` images, and `side`, the images' side in pixels.

    The batch is padded to exactly `batch` images, because features depend on the batch size on a GPU.
    """
    count, side = len(images), torch.full((len(images),), images.shape[-1], dtype=torch.int32)
    if count < batch:
        images = torch.cat([images, images[-1:].expand(batch - count, *images.shape[1:])])
    return {name: tensor[:count] for name, tensor in extractor(images).tensors().items()} | {"side": side}
