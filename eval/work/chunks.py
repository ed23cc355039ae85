"""A folder of tensors in fixed chunks of rows, which ranks fill together and a second start completes.

The folder belongs to one configuration (config.json). Its final contents do not depend on the number of ranks, on the
order of the chunks, or on the number of starts.
"""

from __future__ import annotations

import functools
import json
import logging
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from sfd_scale import config
from sfd_scale.runtime.chunks import Claims
from sfd_scale.runtime.file_kind import safetensors_size
from sfd_scale.runtime.files import read_json, write_atomically, write_json
from sfd_scale.runtime.leftovers import remove_temporary_files
from sfd_scale.runtime.limits import WORK, Background, limit_s
from sfd_scale.runtime.progress import progress
from sfd_scale.runtime.weight_files import open_safetensors, read_tensor, safetensors_bytes

logger = logging.getLogger(__name__)
Finish = Callable[[], Mapping["ChunkFolder", Mapping[str, Tensor]]]
"""The tensors of a chunk, for each folder that lacks it. Called in another thread."""
Produce = Callable[[int], tuple[Finish, dict[str, Any]]]
"""Chunk number → the function that returns its tensors; and numbers for the progress bar."""


def made_on() -> str:
    """The device, the number of CPU threads and the PyTorch release: they decide the last bits of a float."""
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
        """The chunks that are not whole."""
        return [chunk for chunk in range(self.count) if not self.is_whole(chunk)]

    def is_whole(self, chunk: int) -> bool:
        """Whether a chunk is committed, with its full size."""
        return _whole(self.file(chunk))

    def require_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse a folder that was filled with other settings. In a new folder they are recorded in config.json.

        Raises:
            ValueError: naming the settings that differ.
        """
        file = self.path / "config.json"
        if file.exists():
            other = read_json(file)
            if config.digest(other) != config.digest(settings):
                raise ValueError(
                    f"{self.path}: holds the results of other settings ({_differences(other, settings)}); choose "
                    "another folder with --out, or remove this one"
                )
            return
        if (self.path / "chunks").exists() and any((self.path / "chunks").iterdir()):
            raise ValueError(f"{self.path}: has chunks but no config.json that says of what; choose another folder")
        write_json(file, config.to_dict(settings), sort_keys=True)

    def commit(self, chunk: int, tensors: Mapping[str, Tensor]) -> None:
        data = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        write_atomically(self.file(chunk), safetensors_bytes(data, {"made_on": made_on()}))

    def width(self, name: str) -> int | None:
        """Columns of the tensor `name`; None if there is no such tensor."""
        with open_safetensors(self.file(0)) as file:
            return file.get_slice(name).get_shape()[1] if name in self.names() else None

    def made_on(self) -> list[str]:
        """The distinct machines that made the chunks."""
        found = set()
        for chunk in range(self.count):
            with open_safetensors(self.file(chunk)) as file:
                found.add((file.metadata() or {}).get("made_on", "unknown"))
        return sorted(found)

    def read(self, name: str, chunks: Iterable[int] | None = None) -> Iterator[Tensor]:
        """The tensor `name` of every chunk, or of the given chunks, in order. One chunk at a time is opened.

        Raises:
            ValueError: for a chunk that is not as it was written. Chunks of earlier releases have no checksum.
        """
        for chunk in range(self.count) if chunks is None else chunks:
            with open_safetensors(self.file(chunk)) as file:
                yield read_tensor(self.file(chunk), file, name)

    def names(self, chunk: int = 0) -> list[str]:
        """Names of the tensors in a chunk."""
        with open_safetensors(self.file(chunk)) as file:
            return list(file.keys())


def _whole(file: Path) -> bool:
    """Whether a safetensors file has the size that its header says. A file cut off by a crash or a copy has not."""
    try:
        return file.stat().st_size == safetensors_size(file)
    except OSError:
        return False


def _differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    found = config.differences(there, config.to_dict(now))
    return "; ".join(f"{name}: {_short(a)} there, {_short(b)} now" for name, (a, b) in found.items())


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def run(folders: Sequence[ChunkFolder], produce: Produce, description: str, unit: str) -> int:
    """Fill the folders, on all ranks together; returns how many rows were missing at the start.

    The folders have the same rows in the same chunks. A chunk is done when all folders have it. A thread finishes and
    writes a chunk while the next one is computed. Every rank returns when all chunks are committed.

    Raises:
        ValueError: if a chunk of this job is missing in the end. A second start continues.
        TimeoutError: if a chunk cannot be written within SFD_WORK_TIMEOUT.
    """
    first, folder = None, folders[0]
    assert all((other.total, other.size) == (folder.total, folder.size) for other in folders)
    for place in (path for other in folders for path in (other.path, other.path / "chunks")):
        remove_temporary_files(place)

    def is_whole(chunk: int) -> bool:
        return all(other.is_whole(chunk) for other in folders)

    def done(missing: Sequence[int]) -> int:
        return folder.total - sum(len(folder.rows(chunk)) for chunk in missing)

    with Claims(folder.path / "claims") as claims, progress(folder.total, description, unit) as bar:
        for todo, mine in claims.rounds(folder.count, is_whole):
            first = todo if first is None else first
            bar.skip(done(todo) - bar.done)
            with _Writer(folder.path) as writer:
                for chunk in mine:
                    finish, fields = produce(chunk)
                    writer.write(chunk, finish)
                    # Rank 0 draws the bar, which counts the work of all ranks, when it has a result of its own.
                    bar.advance(done(claims.unclaimed(todo)) - bar.done, fields)
            if bar.done < folder.total:
                bar.advance(folder.total - bar.done)
    return folder.total - done(first or [])


class _Writer:
    """Finishes and writes one chunk at a time in a thread. Leaving it waits for the last chunk, also after an error.

    Raises:
        TimeoutError: if a chunk is not written within SFD_WORK_TIMEOUT.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pending: Background[None] | None = None

    def __enter__(self) -> Self:
        return self

    def write(self, chunk: int, finish: Finish) -> None:
        """Write a chunk, when the one before is written."""
        self._wait()
        self._pending = Background(functools.partial(_complete, chunk, finish))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self._wait()
        elif self._pending is not None:
            self._pending.ends(limit_s(WORK))

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            late = f"{self.folder}: a chunk is not written; check the storage of this folder, or raise {WORK}"
            pending.result(limit_s(WORK), late)


def _complete(chunk: int, finish: Finish) -> None:
    for folder, tensors in finish().items():
        folder.commit(chunk, tensors)
