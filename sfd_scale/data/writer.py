"""MDS shards in chunks: each is written apart, committed by a rename, and joined with the others at the end."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

CHUNKS = "chunks"


@dataclass(frozen=True)
class ChunkNote:
    """What a chunk says of itself: images that could not be read, and state of its statistics."""

    unreadable: list[str]
    stats: dict[str, Tensor] | None


def chunk_folder(out: Path, chunk: int) -> Path:
    return out / CHUNKS / f"{chunk:06d}"


def is_committed(out: Path, chunk: int) -> bool:
    return (chunk_folder(out, chunk) / "note.json").is_file()


def write_chunk(
    out: Path, chunk: int, columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]], note: ChunkNote
) -> None:
    """Write one chunk's shards to a temporary folder and commit it by a rename. `rows` is exhausted before `note` is
    read, so it may fill the note."""
    from streaming import MDSWriter  # seconds to import

    final = chunk_folder(out, chunk)
    partial = final.with_name(f"{final.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with MDSWriter(out=str(partial), columns=dict(columns), hashes=["sha256"], progress_bar=False) as writer:
            for row in rows:
                writer.write(dict(row))
    if note.stats is not None:
        save_file(note.stats, str(partial / "stats.safetensors"))
    (partial / "note.json").write_text(json.dumps(note.unreadable), encoding="utf-8")
    os.replace(partial, final)


def join_chunks(out: Path, count: int) -> list[ChunkNote]:
    """Move the shards of all chunks into `out`, in order, and write index.json; returns the chunks' notes.

    Safe to repeat: a join that was cut off goes on where it stopped.
    """
    shards: list[dict[str, Any]] = []
    notes = []
    for chunk in range(count):
        folder = chunk_folder(out, chunk)
        for shard in json.loads((folder / "index.json").read_text(encoding="utf-8"))["shards"]:
            own = folder / shard["raw_data"]["basename"]
            name = f"shard.{chunk:06d}.{own.name.split('.')[1]}.mds"
            if own.exists():
                os.replace(own, out / name)
            shard["raw_data"]["basename"] = name
            if shard["samples"]:
                shards.append(shard)
        unreadable = json.loads((folder / "note.json").read_text(encoding="utf-8"))
        stats = folder / "stats.safetensors"
        notes.append(ChunkNote(unreadable, load_file(stats) if stats.exists() else None))
    partial = out / "index.json.tmp"
    partial.write_text(json.dumps({"version": 2, "shards": shards}, sort_keys=True), encoding="utf-8")
    os.replace(partial, out / "index.json")
    return notes


def drop_chunks(out: Path) -> None:
    shutil.rmtree(out / CHUNKS, ignore_errors=True)


def share(chunks: Sequence[int], rank: int, world_size: int) -> list[int]:
    """The chunks that a rank writes. Any split gives the same bytes."""
    return list(chunks[rank::world_size])
