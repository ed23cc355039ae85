"""The authors' feature files (safetensors shards of 1,000 images) → shards of ours, row by row.

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
from safetensors import SafetensorError, safe_open

from sfd_scale.data.manifest import FLIPPED, Manifest, StoredDtype, encoding, stored
from sfd_scale.data.mds_reader import MDSReader
from sfd_scale.data.writer import (
    ChunkNote,
    Description,
    finish,
    is_committed,
    is_complete,
    require_recipe,
    write_chunk,
    writing,
)
from sfd_scale.diffusion.latents import LatentLayout, LatentStats, StatsAccumulator
from sfd_scale.runtime import distributed
from sfd_scale.runtime.chunks import Claims
from sfd_scale.runtime.progress import progress
from sfd_scale.runtime.settings import at_least

logger = logging.getLogger(__name__)
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """What is taken over from the files of `source`; the rest is not read, and need not be there.

    latents false keeps features alone, which a semantic VAE trains on.
    stats: the authors' latents_stats.pt and latents_sv_stats.pt, to be kept as stats_authors.safetensors, which
    `data.stats` can name: their weights were trained on latents normalised with these.
    tokenizers: what the latents were made with, as `sfd encode` notes it ({texture: identity of the codec, ...});
    sampling refuses a texture codec that is not named here.
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
            raise ValueError("latents: false, with features false too; nothing is left to convert")


def convert(config: ConvertConfig, out: Path) -> Manifest:
    """Write one chunk a file, on all ranks, and verify each before it is committed: it is read back, and its count and
    the SHA-256 of its rows must be those of the file. Continues where a start was cut off.

    Raises:
        ValueError: naming the file, for a missing tensor, another shape or type, labels out of range, or bytes that
            do not come back.
    """
    if not config.source.is_dir():
        raise ValueError(f"convert.source: {config.source} is not a folder")
    files = sorted(config.source.glob("*.safetensors"))
    if not files:
        raise ValueError(f"convert.source: {config.source} has no .safetensors files")
    counts = [_check_file(file, config) for file in files]
    starts = np.cumsum([0, *counts])
    recipe = {
        "kind": "convert",
        **_plain(asdict(config)),
        "files": {file.name: n for file, n in zip(files, counts, strict=True)},
    }
    decisive = {key: value for key, value in recipe.items() if key not in ("source", "stats")}
    if distributed.broadcast_object(distributed.is_main() and is_complete(out, len(files))):
        require_recipe(out, decisive)
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
        raise ValueError(f"{out}: {manifest.num_samples} samples, of {starts[-1]}; remove it and convert again")
    if config.stats is not None and distributed.is_main():
        texture, semantic = config.stats
        LatentStats.from_official(texture, semantic, config.layout).save(out / "stats_authors.safetensors")
    logger.info("%s: %d samples of %d files", out, manifest.num_samples, len(files))
    return manifest


def _convert_files(files: list[Path], starts: Any, config: ConvertConfig, out: Path, claims: Claims) -> None:
    """Write the chunks that are missing, on all ranks.

    Args:
        starts: the first row of each file.
    """
    with progress(len(files), f"convert {out.name}", "files") as bar:
        for todo, mine in claims.rounds(len(files), partial(is_committed, out)):
            bar.skip(len(files) - len(todo) - bar.done)
            for number in mine:
                _convert_file(files[number], int(starts[number]), config, out, number)
                bar.advance(len(files) - len(claims.unclaimed(todo)) - bar.done)  # by all ranks


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
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
    """The tensors that are read of a file, and the shape of one row (REFERENCE: the authors' extract_features)."""
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
    """Names and shapes, from the header alone; returns the number of rows."""
    try:
        with safe_open(str(file), framework="pt") as handle:
            shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: damaged ({error})") from error
    wanted = _tensors(config)
    missing = [name for name in wanted if name not in shapes]
    if missing:
        raise ValueError(f"{file}: no tensor {', '.join(missing)}; it has {', '.join(sorted(shapes))}")
    rows = shapes["labels"][0] if len(shapes["labels"]) == 1 else -1
    for name, shape in wanted.items():
        if shapes[name] != (rows, *shape):
            raise ValueError(
                f"{file}: {name} is {shapes[name]}; allowed: (N, {', '.join(map(str, shape))}), one N a file"
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
            raise ValueError(f"{file}: what was written to {folder} reads back differently; check the disk")

    write_chunk(out, number, _columns(config), _rows(file, start, config, note, written), note, verify)


def _rows(
    file: Path, start: int, config: ConvertConfig, note: ChunkNote, digest: hashlib._Hash
) -> Iterator[Mapping[str, Any]]:
    """The rows of a file; feeds the statistics and the digest."""
    with safe_open(str(file), framework="pt") as handle:
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
                parts[f"latents{suffix}"] = _named(file, latents, config.dtype)
            if config.features:
                parts[f"features{suffix}"] = _named(file, handle.get_tensor(f"feats_dino{suffix}"), config.dtype)
    for row in range(len(labels)):
        sample = {"id": start + row, "label": int(labels[row]), **{name: part[row] for name, part in parts.items()}}
        _digest(digest, sample)
        yield sample


def _named(file: Path, values: torch.Tensor, dtype: StoredDtype) -> Array:
    try:
        return stored(values, dtype)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _digest(digest: hashlib._Hash, sample: Mapping[str, Any]) -> None:
    for name in sorted(sample):
        value = sample[name]
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(value).tobytes() if isinstance(value, np.ndarray) else str(value).encode())
