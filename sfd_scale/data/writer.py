"""MDS shards in chunks: each is written apart, committed by a rename, and joined with the others at the end.

Inside `out`/chunks a committed chunk has a folder of its own. Joining moves its shards up into `out`; the folder keeps
the chunk's index, note and statistics, a few kilobytes, so that a lost shard can be remade without the rest.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save

from sfd_scale.data.manifest import MANIFEST, STATS, Manifest, index_sha256
from sfd_scale.data.mosaic import streaming
from sfd_scale.diffusion.latents import StatsAccumulator
from sfd_scale.runtime import distributed
from sfd_scale.runtime.files import write_json
from sfd_scale.runtime.locks import run_lock

CHUNKS = "chunks"


@dataclass(frozen=True)
class ChunkNote:
    """What a chunk says of itself: the images that could not be read, and its statistics."""

    unreadable: list[str]
    stats: StatsAccumulator | None


def claim(out: Path, recipe: Mapping[str, Any]) -> None:
    """Make the folder belong to what decides its content; to be called while it is held (`working`), or is complete.

    A start that ended before its first chunk, for a wrong setting say, leaves nothing behind.

    Raises:
        ValueError: if it belongs to something else, or holds data of unknown origin.
    """
    wanted, path = json.loads(json.dumps(recipe)), out / "recipe.json"
    if distributed.is_main():
        out.mkdir(parents=True, exist_ok=True)
        begun = (out / "index.json").exists() or any(out.glob(f"{CHUNKS}/*/note.json"))
        if not begun:
            write_json(path, wanted, sort_keys=True)
    distributed.barrier()
    if not path.exists():
        raise ValueError(f"out: {out} holds shards but no recipe.json that says of what; give another folder")
    if json.loads(path.read_text(encoding="utf-8")) != wanted:
        raise ValueError(
            f"out: {out} holds data of another recipe (its recipe.json); give another folder, or remove it"
        )


def is_complete(out: Path, count: int) -> bool:
    return (out / MANIFEST).is_file() and all(is_committed(out, chunk) for chunk in range(count))


def is_committed(out: Path, chunk: int) -> bool:
    """Whether a chunk is written and its shards, joined or not, have their full length."""
    folder = _folder(out, chunk)
    if not (folder / "note.json").is_file():
        return False
    for shard in _shards(folder):
        places = (folder / shard["raw_data"]["basename"], out / _joined_name(chunk, shard))
        if not any(place.is_file() and place.stat().st_size == shard["raw_data"]["bytes"] for place in places):
            return False
    return True


@contextmanager
def working(out: Path) -> Iterator[None]:
    """Hold the folder while its chunks are written: a second start would take them for those of a dead one.

    Raises:
        ValueError: on all ranks, where another job writes there.
    """
    with run_lock(out / CHUNKS, "give another out="):
        yield


class Claims:
    """Hands out the chunks that are not committed, once each over all ranks, first come first served.

    A claim is an empty file that only one process can create, in a folder of this start: what a killed start claimed
    is free again. So that no rank waits long at the end for a slower one.
    """

    def __init__(self, out: Path, count: int) -> None:
        self.out = out
        token, todo = None, None
        if distributed.is_main():
            (out / CHUNKS).mkdir(exist_ok=True)
            for stale in (out / CHUNKS).glob("claims-*"):
                shutil.rmtree(stale, ignore_errors=True)
            token = f"claims-{uuid.uuid4().hex[:12]}"
            (out / CHUNKS / token).mkdir()
            todo = [chunk for chunk in range(count) if not is_committed(out, chunk)]
        token, self.todo = distributed.broadcast_object((token, todo))
        self.folder = out / CHUNKS / token

    def __iter__(self) -> Iterator[int]:
        for chunk in self.todo:
            try:
                os.close(os.open(self.folder / str(chunk), os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            yield chunk

    @property
    def taken(self) -> int:
        """How many chunks all ranks have claimed."""
        return len(os.listdir(self.folder))

    def close(self) -> None:
        """Wait for all ranks; every chunk is committed then."""
        distributed.barrier()
        if distributed.is_main():
            shutil.rmtree(self.folder)


def write_chunk(
    out: Path, chunk: int, columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]], note: ChunkNote,
    verify: Callable[[Path], None] | None = None,
) -> None:  # fmt: skip
    """Write one chunk's shards to a temporary folder and commit it by a rename. `rows` is exhausted before `note` is
    read, so it may fill the note; `verify` looks at the folder before the rename.

    Raises:
        ValueError: on a full disk; what was committed before is whole.
    """
    final = _folder(out, chunk)
    partial = final.with_name(f"{final.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    with _disk(out):
        try:
            _write(partial, columns, rows, note)
            if verify is not None:
                verify(partial)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    shutil.rmtree(final, ignore_errors=True)  # a chunk whose shards were lost
    os.replace(partial, final)


@contextmanager
def _disk(out: Path) -> Iterator[None]:
    """Says of a full disk what to do."""
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
        # Not save_file, which has an error of its own for a full disk.
        (folder / STATS).write_bytes(save(note.stats.state()))
    write_json(folder / "note.json", note.unreadable)


def finish(out: Path, count: int, **fields: Any) -> Manifest:
    """Join the chunks on rank 0: shards in order, index.json, statistics and, last, the manifest. The bytes depend on
    neither the number of ranks nor the number of starts; a join that was cut off goes on where it stopped.

    Args:
        fields: those of the manifest that the chunks do not tell.

    Raises:
        ValueError: if no sample was written.
    """
    if distributed.is_main():
        with _disk(out):
            _join(out, count, fields)
    distributed.barrier()
    return Manifest.read(out)


def _join(out: Path, count: int, fields: dict[str, Any]) -> None:
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
        unreadable += json.loads((folder / "note.json").read_text(encoding="utf-8"))
        if (folder / STATS).exists():
            part = StatsAccumulator.from_state(load_file(folder / STATS))
            stats = StatsAccumulator(part.mean.numel()) if stats is None else stats
            stats.merge(part)
    if not shards:
        first = f"; the first of {len(unreadable)} unreadable images: {unreadable[0]}" if unreadable else ""
        raise ValueError(f"{out}: not one sample was written{first}")
    write_json(out / "index.json", {"version": 2, "shards": shards}, sort_keys=True)
    stats_hash = None
    if stats is not None:
        finished = stats.finish()
        finished.save(out / STATS)
        stats_hash = finished.hash
    Manifest(
        num_samples=sum(shard["samples"] for shard in shards), index_sha256=index_sha256(out), stats_hash=stats_hash,
        unreadable=tuple(unreadable), **fields,
    ).write(out)  # fmt: skip


def _folder(out: Path, chunk: int) -> Path:
    return out / CHUNKS / f"{chunk:06d}"


def _shards(folder: Path) -> list[dict[str, Any]]:
    """The shards of a chunk's own index that hold samples."""
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    return [shard for shard in index["shards"] if shard["samples"]]


def _joined_name(chunk: int, shard: dict[str, Any]) -> str:
    return f"shard.{chunk:06d}.{shard['raw_data']['basename'].split('.')[1]}.mds"
