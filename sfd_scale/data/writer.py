"""MDS shards in chunks: each chunk is written on its own and committed by a rename; at the end all are joined.

A committed chunk is a folder in `out`/chunks. Joining moves its shards to `out`. The folder keeps the chunk's index,
note and statistics, a few kilobytes, so that a lost shard can be encoded again without the other chunks.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save

from sfd_scale.data.manifest import MANIFEST, STATS, Manifest, StoredDtype, index_sha256
from sfd_scale.data.mosaic import streaming
from sfd_scale.diffusion.latents import StatsAccumulator, constant_channels_error
from sfd_scale.runtime import distributed
from sfd_scale.runtime.chunks import Claims
from sfd_scale.runtime.files import read_json, write_json
from sfd_scale.runtime.leftovers import free_path, make_way, remove, remove_temporary_files
from sfd_scale.runtime.locks import LOCK, folder_lock, in_use
from sfd_scale.runtime.weight_files import read_safetensors

logger = logging.getLogger(__name__)
CHUNKS = "chunks"
_IMAGES = "images"  # in recipe.json, beside the settings


@dataclass(frozen=True)
class ChunkNote:
    """The images of a chunk that could not be read, and the statistics of its latents."""

    unreadable: list[str]
    stats: StatsAccumulator | None


@dataclass(frozen=True, kw_only=True)
class Description:
    """The fields of the manifest that do not follow from the chunks."""

    num_classes: int
    image_size: int
    columns: dict[str, str]
    dtype: StoredDtype
    tokenizers: dict[str, str] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()


def require_recipe(out: Path, recipe: Mapping[str, Any], images: Mapping[str, Any] | None = None) -> None:
    """Refuse a folder that belongs to another recipe, or to other images. Both are recorded until the first chunk is
    committed.

    Call it while the folder is reserved (`writing`), or is complete.

    Args:
        images: the number of images and the hash of their listing; None if the recipe itself decides them. A folder of
            an earlier release has no record of its images, and is taken as it is.

    Raises:
        ValueError: if the folder belongs to another recipe or other images, or holds data of unknown origin.
    """
    record = recipe if images is None else {**recipe, _IMAGES: images}
    wanted, path = json.loads(json.dumps(record)), out / "recipe.json"
    if distributed.is_main():
        out.mkdir(parents=True, exist_ok=True)
        begun = (out / "index.json").exists() or any(out.glob(f"{CHUNKS}/*/note.json"))
        if not begun:
            write_json(path, wanted, sort_keys=True)
    distributed.barrier()
    if not path.exists():
        raise ValueError(f"out: {out} holds shards but no recipe.json that says of what; give another folder")
    known = read_json(path)
    here, there = wanted.pop(_IMAGES, None), known.pop(_IMAGES, None) if isinstance(known, dict) else None
    if known != wanted:
        raise ValueError(
            f"out: {out} holds data of another recipe (its recipe.json); give another folder, or remove it"
        )
    if here is not None and there is not None and here != there:
        raise ValueError(
            f"out: {out} was begun with {there['count']:,} other images; the source has {here['count']:,} now. Files "
            "were added, removed, renamed or replaced since. Chunks of both would not fit together; give another "
            "folder, or remove it"
        )


def is_complete(out: Path, count: int) -> bool:
    return (out / MANIFEST).is_file() and all(is_committed(out, chunk) for chunk in range(count))


def remove_leftovers(out: Path) -> None:
    """Remove what a start left in a complete folder, if it was killed after its last file. Call it on one rank."""
    chunks = out / CHUNKS
    try:
        remove_temporary_files(out)
        if chunks.is_dir() and not in_use(chunks):
            for leftover in chunks.glob("*.tmp"):
                remove(leftover)
            Claims(chunks / "claims").remove_abandoned()
            os.truncate(chunks / LOCK, 0)
    except OSError as error:  # such as a read-only file system
        logger.debug("%s: leftovers stay: %s", out, error)


def is_committed(out: Path, chunk: int) -> bool:
    """Whether a chunk is written and its shards, joined or not, have their full size."""
    folder = _folder(out, chunk)
    if not (folder / "note.json").is_file():
        return False
    for shard in _shards(folder):
        places = (folder / shard["raw_data"]["basename"], out / _joined_name(chunk, shard))
        if not any(place.is_file() and place.stat().st_size == shard["raw_data"]["bytes"] for place in places):
            return False
    return True


@contextmanager
def writing(out: Path) -> Iterator[Claims]:
    """Reserve the folder for this job, and hand out the claims on its chunks.

    Raises:
        ValueError: on all ranks, if another job writes there.
    """
    with folder_lock(out / CHUNKS, "give another out="):
        if distributed.is_main():  # `Claims` lets the other ranks wait for this
            remove_temporary_files(out)
            for leftover in (out / CHUNKS).glob("*.tmp"):
                remove(leftover)
        with Claims(out / CHUNKS / "claims") as claims:
            yield claims


def write_chunk(
    out: Path, chunk: int, columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]], note: ChunkNote,
    verify: Callable[[Path], None] | None = None,
) -> None:  # fmt: skip
    """Write the shards of one chunk to a temporary folder, and commit it by a rename.

    Args:
        rows: may fill `note`, which is read after the last row.
        verify: checks the folder before the rename.

    Raises:
        ValueError: if the disk is full. The chunks that were committed before are whole.
    """
    final = _folder(out, chunk)
    partial = free_path(final.with_name(f"{final.name}.tmp"))
    with _disk(out):
        try:
            _write(partial, columns, rows, note)
            if verify is not None:
                verify(partial)
        except OSError:
            remove(partial)
            raise
    make_way(final)  # if its shards were lost
    os.replace(partial, final)
    if chunk == 0 and note.stats is not None and (constant := note.stats.constant_channels()):
        # The error comes at the end. It is known now, before the work on all other chunks.
        logger.warning("%s: after the first chunk: %s", out, constant_channels_error(constant, len(note.stats.mean)))


@contextmanager
def _disk(out: Path) -> Iterator[None]:
    """Turn the error of a full disk into one that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(
                f"{out}: the disk is full; free some space and give the same command again: it goes on from here"
            ) from error
        raise


def _write(folder: Path, columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]], note: ChunkNote) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with streaming().MDSWriter(
            out=str(folder), columns=dict(columns), hashes=["sha256"], progress_bar=False
        ) as writer:
            for row in rows:
                writer.write(dict(row))
    if note.stats is not None:
        # Not save_file: it has its own error for a full disk.
        (folder / STATS).write_bytes(save(note.stats.state()))
    write_json(folder / "note.json", note.unreadable)


def finish(out: Path, count: int, description: Description) -> Manifest:
    """Join the chunks on rank 0: shards in order, index.json, statistics, and last the manifest.

    The bytes depend neither on the number of ranks nor on the number of starts. A join that was cut off is continued.

    Raises:
        ValueError: if no sample was written.
    """
    if distributed.is_main():
        with _disk(out):
            _join(out, count, description)
    distributed.barrier()
    return Manifest.read(out)


def _join(out: Path, count: int, description: Description) -> None:
    shards: list[dict[str, Any]] = []
    unreadable: list[str] = []
    stats: StatsAccumulator | None = None
    for chunk in range(count):
        folder = _folder(out, chunk)
        for shard in _shards(folder):
            name = _joined_name(chunk, shard)
            own = folder / shard["raw_data"]["basename"]
            if own.exists():
                os.replace(own, out / name)
            shard["raw_data"]["basename"] = name
            shards.append(shard)
        unreadable += read_json(folder / "note.json")
        if (folder / STATS).exists():
            part = StatsAccumulator.from_state(read_safetensors(folder / STATS))
            stats = StatsAccumulator(part.mean.numel()) if stats is None else stats
            stats.merge(part)
    if not shards:
        first = f"; the first of {len(unreadable)} unreadable images: {unreadable[0]}" if unreadable else ""
        raise ValueError(f"{out}: not one sample was written{first}")
    write_json(out / "index.json", {"version": 2, "shards": shards}, sort_keys=True)
    stats_hash = None
    if stats is not None:
        try:
            finished = stats.finish()
        except ValueError as error:
            raise ValueError(f"{out}: {error}") from error
        finished.save(out / STATS)
        stats_hash = finished.hash
    Manifest(
        num_samples=sum(shard["samples"] for shard in shards), index_sha256=index_sha256(out), stats_hash=stats_hash,
        unreadable=tuple(unreadable), num_classes=description.num_classes, image_size=description.image_size,
        columns=description.columns, dtype=description.dtype, tokenizers=description.tokenizers,
        recipe=description.recipe, classes=description.classes,
    ).write(out)  # fmt: skip


def _folder(out: Path, chunk: int) -> Path:
    return out / CHUNKS / f"{chunk:06d}"


def _shards(folder: Path) -> list[dict[str, Any]]:
    """The shards of a chunk's own index that hold samples."""
    index = read_json(folder / "index.json")
    return [shard for shard in index["shards"] if shard["samples"]]


def _joined_name(chunk: int, shard: dict[str, Any]) -> str:
    return f"shard.{chunk:06d}.{shard['raw_data']['basename'].split('.')[1]}.mds"
