"""Converts feature files of the official code (safetensors files of 1,000 images) to MDS shards.

N images of a file · T, S texture and semantic channels · D feature channels · h, w latent grid.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sfd_scale.data.image_files import list_files
from sfd_scale.data.manifest import FLIPPED, Manifest, StoredDtype, encoding, stored
from sfd_scale.data.mds_reader import MDSReader
from sfd_scale.data.writer import (
    ChunkNote,
    Description,
    finish,
    is_committed,
    is_complete,
    remove_leftovers,
    require_recipe,
    write_chunk,
    writing,
)
from sfd_scale.diffusion.latents import LatentLayout, LatentStats, StatsAccumulator
from sfd_scale.runtime import distributed
from sfd_scale.runtime.chunks import Claims
from sfd_scale.runtime.progress import progress
from sfd_scale.runtime.settings import at_least
from sfd_scale.runtime.weight_files import open_safetensors

logger = logging.getLogger(__name__)
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """What to convert from the files in `source`. Tensors that are not converted may be missing.

    latents: false converts features only, for training a semantic VAE.
    stats: the official latents_stats.pt and latents_sv_stats.pt. They are written to stats_authors.safetensors. Set
        `data.stats` to that file to train official weights further: they expect latents normalised by it.
    tokenizers: fingerprints of the codecs that made the latents, as in the manifest of `sfd encode` ({texture: ...}).
        Sampling refuses a texture codec that is not listed here.
    """

    source: Path
    stats: tuple[Path, ...] | None = None
    latents: bool = True
    features: bool = True
    flip: bool = True
    feature_dim: int = 768
    num_classes: int = 1000
    image_size: int = 256
    dtype: StoredDtype = "float16"
    layout: LatentLayout = field(default_factory=LatentLayout)
    tokenizers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at_least(self, feature_dim=1, num_classes=1, image_size=1)
        if self.stats is not None and len(self.stats) != 2:
            raise ValueError(f"stats: {len(self.stats)} files; allowed: latents_stats.pt and latents_sv_stats.pt")
        if not (self.latents or self.features):
            raise ValueError("latents: false, but features is false too; set one of them to true")


def convert(config: ConvertConfig, out: Path) -> Manifest:
    """Convert each file to one chunk, on all ranks. An interrupted conversion resumes.

    Each chunk is read back before its rename: the number and SHA-256 of its samples must equal those of the file.

    Raises:
        ValueError: names the file, if a tensor is missing, has another shape or dtype, a label is out of range, or the
            written data reads back differently.
    """
    if not config.source.is_dir():
        raise ValueError(f"convert.source: {config.source} is not a folder")
    listing = list_files(config.source, {".safetensors"}, recursive=False, known=config.stats or ())
    listing.others.warn(config.source, ".safetensors")
    files = listing.files
    if not files:
        raise ValueError(f"convert.source: {config.source} has no .safetensors files")
    counts = [_check_file(file, config) for file in files]
    starts = np.cumsum([0, *counts])
    recipe = {
        "kind": "convert",
        **_json_values(asdict(config)),
        "files": {file.name: n for file, n in zip(files, counts, strict=True)},
    }
    decisive = {key: value for key, value in recipe.items() if key not in ("source", "stats")}
    if distributed.broadcast_object(distributed.is_main() and is_complete(out, len(files))):
        require_recipe(out, decisive)
        if distributed.is_main():
            remove_leftovers(out)
    else:
        with writing(out) as claims:
            require_recipe(out, decisive)
            _convert_files(files, starts, config, out, claims)
            description = Description(
                num_classes=config.num_classes, image_size=config.image_size, columns=_columns(config),
                dtype=config.dtype, tokenizers=config.tokenizers, recipe=recipe,
            )  # fmt: skip
            finish(out, len(files), description)
    manifest = Manifest.read(out)
    if manifest.num_samples != starts[-1]:
        raise ValueError(
            f"{out}: {manifest.num_samples} samples, expected {starts[-1]}; remove the folder and convert again"
        )
    if config.stats is not None and distributed.is_main():
        texture, semantic = config.stats
        LatentStats.from_official(texture, semantic, config.layout).save(out / "stats_authors.safetensors")
    logger.info("%s: %d samples from %d files", out, manifest.num_samples, len(files))
    return manifest


def _convert_files(files: list[Path], starts: Any, config: ConvertConfig, out: Path, claims: Claims) -> None:
    """Write the missing chunks, on all ranks.

    Args:
        starts: index of the first sample of each file.
    """
    with progress(len(files), f"convert {out.name}", "files") as bar:
        for todo, mine in claims.rounds(len(files), partial(is_committed, out)):
            bar.skip(len(files) - len(todo) - bar.done)
            for number in mine:
                _convert_file(files[number], int(starts[number]), config, out, number)
                bar.advance(len(files) - len(claims.unclaimed(todo)) - bar.done)  # by all ranks


def _json_values(settings: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return plain


def _columns(config: ConvertConfig) -> dict[str, str]:
    columns = {"id": "int", "label": "int"}
    for suffix in ("", FLIPPED) if config.flip else ("",):
        if config.latents:
            columns[f"latents{suffix}"] = encoding(config.dtype, config.layout.shape)
        if config.features:
            grid = config.layout.size
            columns[f"features{suffix}"] = encoding(config.dtype, (config.feature_dim, grid, grid))
    return columns


def _tensors(config: ConvertConfig) -> dict[str, tuple[int, ...]]:
    """The tensors to read from a file, and their shape per image (extract_features of the official code)."""
    grid = (config.layout.size, config.layout.size)
    wanted: dict[str, tuple[int, ...]] = {"labels": ()}
    for suffix in ("", FLIPPED) if config.flip else ("",):
        if config.latents:
            wanted[f"latents{suffix}"] = (config.layout.texture_channels, *grid)
            wanted[f"latents_sv{suffix}"] = (config.layout.semantic_channels, *grid)
        if config.features:
            wanted[f"feats_dino{suffix}"] = (config.feature_dim, *grid)
    return wanted


def _check_file(file: Path, config: ConvertConfig) -> int:
    """Check names and shapes in the header of a file; returns its number of images."""
    with open_safetensors(file) as handle:
        shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    wanted = _tensors(config)
    missing = [name for name in wanted if name not in shapes]
    if missing:
        raise ValueError(f"{file}: no tensor {', '.join(missing)}; it has {', '.join(sorted(shapes))}")
    rows = shapes["labels"][0] if len(shapes["labels"]) == 1 else -1
    if rows == 0:
        raise ValueError(f"{file}: no images in it; remove this file, or extract its features again")
    for name, shape in wanted.items():
        if shapes[name] != (rows, *shape):
            raise ValueError(
                f"{file}: {name} is {shapes[name]}; allowed: (N, {', '.join(map(str, shape))}), with one N per file"
            )
    return rows


def _convert_file(file: Path, start: int, config: ConvertConfig, out: Path, number: int) -> None:
    note = ChunkNote([], StatsAccumulator(config.layout.channels) if config.latents else None)
    written = hashlib.sha256()

    def verify(folder: Path) -> None:
        back, read = MDSReader(folder), hashlib.sha256()
        for row in range(back.num_samples):
            _digest(read, back[row])
        if read.digest() != written.digest():
            raise ValueError(f"{file}: the data written to {folder} reads back differently; check the disk")

    write_chunk(out, number, _columns(config), _samples(file, start, config, note, written), note, verify)


def _samples(
    file: Path, start: int, config: ConvertConfig, note: ChunkNote, digest: hashlib._Hash
) -> Iterator[Mapping[str, Any]]:
    """The samples of a file. Updates the statistics in the note, and the digest."""
    with open_safetensors(file) as handle:
        labels = handle.get_tensor("labels")
        if labels.is_floating_point() or int(labels.min()) < 0 or int(labels.max()) >= config.num_classes:
            raise ValueError(
                f"{file}: labels of {labels.dtype} from {labels.min().item()} to {labels.max().item()}; allowed: "
                f"integers from 0 to {config.num_classes - 1}"
            )
        parts: dict[str, Array] = {}
        for suffix in ("", FLIPPED) if config.flip else ("",):
            if note.stats is not None:
                texture, semantic = (handle.get_tensor(f"{name}{suffix}").float() for name in ("latents", "latents_sv"))
                latents = config.layout.join(texture, semantic)
                note.stats.update(latents)
                parts[f"latents{suffix}"] = _stored(file, latents, config.dtype)
            if config.features:
                parts[f"features{suffix}"] = _stored(file, handle.get_tensor(f"feats_dino{suffix}"), config.dtype)
    for row in range(len(labels)):
        sample = {"id": start + row, "label": int(labels[row]), **{name: part[row] for name, part in parts.items()}}
        _digest(digest, sample)
        yield sample


def _stored(file: Path, values: torch.Tensor, dtype: StoredDtype) -> Array:
    try:
        return stored(values, dtype)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _digest(digest: hashlib._Hash, sample: Mapping[str, Any]) -> None:
    for name in sorted(sample):
        value = sample[name]
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(value).tobytes() if isinstance(value, np.ndarray) else str(value).encode())
