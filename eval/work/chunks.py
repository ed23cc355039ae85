"""Work in fixed chunks: ranks pull them from one queue, commit each atomically, and skip what is already there.

A folder of chunks belongs to one configuration (config.json); what it will hold in the end does not depend on how
many ranks fill it, in which order, or in how many starts.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from sfd_scale import config
from sfd_scale.runtime import distributed
from sfd_scale.runtime.files import write_atomically, write_json
from sfd_scale.runtime.progress import progress

logger = logging.getLogger(__name__)
Produce = Callable[[int], tuple[Callable[[], dict[str, Tensor]], dict[str, Any]]]
"""Chunk number → what makes its tensors, called in another thread, and numbers to show beside the progress bar."""


def made_on() -> str:
    """What decides the last bits of a float beside the settings: the device, the threads of a CPU, PyTorch."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


@dataclass(frozen=True)
class ChunkFolder:
    """`total` rows in chunks of `size`, below `path`/chunks."""

    path: Path
    total: int
    size: int

    @property
    def count(self) -> int:
        return -(-self.total // self.size)

    def rows(self, chunk: int) -> range:
        return range(chunk * self.size, min((chunk + 1) * self.size, self.total))

    def file(self, chunk: int) -> Path:
        return self.path / "chunks" / f"chunk-{chunk:06d}.safetensors"

    def missing(self) -> list[int]:
        """Chunks that are not committed; one that is torn or empty counts as missing."""
        return [chunk for chunk in range(self.count) if not _whole(self.file(chunk))]

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Make the folder belong to `settings`, which go to its config.json.

        Raises:
            ValueError: if it belongs to another one, naming the settings that differ.
        """
        file = self.path / "config.json"
        if file.exists():
            other = json.loads(file.read_text(encoding="utf-8"))
            if config.digest(other) != config.digest(settings):
                raise ValueError(
                    f"{self.path}: holds the results of other settings ({_differences(other, settings)}); choose "
                    "another folder with --out, or remove this one"
                )
            return
        if (self.path / "chunks").exists() and any((self.path / "chunks").iterdir()):
            raise ValueError(f"{self.path}: has chunks but no config.json that says of what; choose another folder")
        write_json(file, config.to_dict(settings), sort_keys=True)

    def tidy(self, before: float) -> None:
        """Remove what writers that were killed had left by the time `before`: another job may write here now."""
        for leftover in (self.path / "chunks").glob(".chunk-*.safetensors"):
            with suppress(FileNotFoundError):
                if leftover.stat().st_mtime < before:
                    leftover.unlink()

    def commit(self, chunk: int, tensors: Mapping[str, Tensor]) -> None:
        data = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        write_atomically(self.file(chunk), save(data, {"made_on": made_on()}))

    def width(self, name: str) -> int | None:
        """Columns of the tensor `name`, or None if there is no such."""
        with safe_open(str(self.file(0)), framework="pt") as file:
            return file.get_slice(name).get_shape()[1] if name in self.names() else None

    def made_on(self) -> list[str]:
        """The machines that made the chunks, each once."""
        found = set()
        for chunk in range(self.count):
            with safe_open(str(self.file(chunk)), framework="pt") as file:
                found.add((file.metadata() or {}).get("made_on", "unknown"))
        return sorted(found)

    def read(self, name: str, chunks: Iterable[int] | None = None) -> Iterator[Tensor]:
        """The tensor `name` of every chunk, or of those given, in order; chunks are opened one by one."""
        for chunk in range(self.count) if chunks is None else chunks:
            with safe_open(str(self.file(chunk)), framework="pt") as file:
                yield file.get_tensor(name)

    def names(self) -> list[str]:
        """Names of the tensors in the first chunk."""
        with safe_open(str(self.file(0)), framework="pt") as file:
            return list(file.keys())


def _whole(file: Path) -> bool:
    """Whether a safetensors file is as long as its header says: what a crash or a cut copy leaves is not."""
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > size:
                return False
            header = json.loads(handle.read(length))
    except (OSError, struct.error, ValueError):
        return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return bool(ends) and size == 8 + length + max(ends)


def _differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    found = config.differences(there, config.to_dict(now))
    return "; ".join(f"{name}: {_short(a)} there, {_short(b)} now" for name, (a, b) in found.items())


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class ChunkQueue:
    """Hands out a list of chunks once each, over all ranks, first come first served.

    A counter in a store of its own that rank 0 serves: asking takes one message and waits for no other rank.
    """

    def __init__(self, todo: Sequence[int]) -> None:
        self.todo = todo
        self._taken, self._done = 0, 0
        self._store: TCPStore | None = None
        if distributed.world_size() > 1:
            self._store = _connect()

    def __iter__(self) -> Iterator[int]:
        while (number := self._next()) < len(self.todo):
            yield self.todo[number]

    def _next(self) -> int:
        if self._store is not None:
            return int(self._store.add("taken", 1)) - 1
        self._taken += 1
        return self._taken - 1

    def finished(self, rows: int) -> int:
        """Count `rows` as done; how many are done by all ranks together."""
        if self._store is not None:
            return int(self._store.add("rows", rows))
        self._done += rows
        return self._done


def _connect() -> TCPStore:
    wait = timedelta(seconds=300)
    store: TCPStore | None = None
    address: tuple[str, int] | None = None
    if distributed.is_main():
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        store = TCPStore(host, 0, distributed.world_size(), is_master=True, timeout=wait, wait_for_workers=False)
        address = (host, store.port)
    host, port = distributed.broadcast_object(address)
    if store is None:
        store = TCPStore(host, port, distributed.world_size(), is_master=False, timeout=wait, wait_for_workers=False)
    return store


def run(folder: ChunkFolder, produce: Produce, description: str, unit: str) -> int:
    """Fill the folder, on all ranks together; returns how many rows this start made.

    A chunk is finished and written by a thread while the next one is computed. Every rank returns when all chunks are
    committed.

    Raises:
        ValueError: if chunks are missing in the end because a rank failed; a second start goes on.
    """
    started = time.time()
    todo: list[int] = distributed.broadcast_object(folder.missing() if distributed.is_main() else None)
    rows = sum(len(folder.rows(chunk)) for chunk in todo)
    queue = ChunkQueue(todo)
    with progress(folder.total, description, unit) as bar, ThreadPoolExecutor(1) as writer:
        bar.skip(folder.total - rows)
        shown, pending = 0, None
        for chunk in queue:
            finish, fields = produce(chunk)
            _finish(pending)
            pending = writer.submit(_complete, folder, chunk, finish)
            done = queue.finished(len(folder.rows(chunk)))
            # The bar counts what all ranks have done; it is drawn by rank 0, when that has a result of its own.
            bar.advance(done - shown, fields)
            shown = done
        _finish(pending)
        distributed.barrier()
        if shown < rows:
            bar.advance(rows - shown)
    left = folder.missing()
    if left:
        raise ValueError(f"{folder.path}: {len(left)} of {folder.count} chunks are missing; give the command again")
    if distributed.is_main():
        folder.tidy(started)
    # No rank may leave, and rank 0 may not close the store, while another still asks.
    distributed.barrier()
    return rows


def _complete(folder: ChunkFolder, chunk: int, finish: Callable[[], dict[str, Tensor]]) -> None:
    folder.commit(chunk, finish())


def _finish(pending: Future[None] | None) -> None:
    if pending is not None:
        pending.result()
