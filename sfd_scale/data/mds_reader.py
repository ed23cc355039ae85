"""Random access to the samples of MDS shards (MosaicML streaming's format), column by column.

All columns of our shards have a fixed size, so sample i of a shard starts at start + i·stride. One column of one sample
is one read at a known offset. The library's own reader opens the file and decodes all columns for each sample.
"""

from __future__ import annotations

import math
import os
import struct
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sfd_scale.data.manifest import read_index

Array = np.ndarray[Any, Any]
MAX_OPEN_FILES = 256  # shards that one process keeps open


class SampleReader(Protocol):
    """Random access to samples: `reader[i]` → {column: value}."""

    num_samples: int

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def gather(self, indices: Sequence[int], columns: Sequence[Sequence[str]]) -> list[Array]:
        """Read many samples: one array (N, ...) for each entry of `columns`.

        Args:
            indices: N samples.
            columns: each entry names one column for each of the N samples.
        """
        ...


@dataclass(frozen=True)
class Column:
    """The place of a column in a sample (bytes), and its array type."""

    offset: int
    size: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """One file of samples, as described by index.json. Sizes are in bytes."""

    path: Path
    bytes: int
    samples: int
    columns: dict[str, Column]
    stride: int

    @property
    def start(self) -> int:
        """Offset of the first sample. The samples are the last part of the file."""
        return self.bytes - self.samples * self.stride

    @classmethod
    def from_index(cls, folder: Path, entry: dict[str, Any]) -> Shard:
        """Describe a shard by its entry in index.json.

        Raises:
            ValueError: if a column has no fixed size, or the samples do not fit in the file.
        """
        columns, offset = {}, 0
        for name, form, size in zip(
            entry["column_names"], entry["column_encodings"], entry["column_sizes"], strict=True
        ):
            dtype, shape = _array_of(form)
            if dtype is None or size != dtype.itemsize * math.prod(shape):
                raise ValueError(f"{folder / 'index.json'}: column {name!r} is {form}; allowed: int and sized ndarrays")
            columns[name] = Column(offset, size, dtype, shape)
            offset += size
        raw, samples = entry["raw_data"], entry["samples"]
        if offset == 0 or samples * (offset + 4) + 8 > raw["bytes"]:
            raise ValueError(
                f"{folder / raw['basename']}: {samples} samples of {offset} bytes do not fit in {raw['bytes']} bytes"
            )
        return cls(folder / raw["basename"], raw["bytes"], samples, columns, offset)

    def open(self) -> int:
        """Open the file; returns its descriptor.

        Raises:
            FileNotFoundError: if the file is missing.
            ValueError: if its size or its header does not match index.json.
        """
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            self._check(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _check(self, descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        if size != self.bytes:
            raise ValueError(f"{self.path}: {size} bytes, expected {self.bytes}; {REPAIR}")
        # The header of MDS: number of samples, offset of each sample, end of the last one; little-endian uint32.
        header = os.pread(descriptor, 4 * (self.samples + 2), 0)
        count, *offsets = struct.unpack(f"<{self.samples + 2}I", header)
        if count != self.samples or offsets != list(range(self.start, self.bytes + 1, self.stride)):
            raise ValueError(f"{self.path}: its header does not match index.json; {REPAIR}")


REPAIR = "encode into this folder again to write it anew, or empty the folder if it is a cache"


def _array_of(form: str) -> tuple[np.dtype[Any] | None, tuple[int, ...]]:
    """The dtype and shape of an MDS encoding; the dtype is None if the size is not fixed."""
    if form == "int":
        return np.dtype(np.int64), ()
    parts = form.split(":")
    if parts[0] != "ndarray" or len(parts) != 3:
        return None, ()
    return np.dtype(parts[1]), tuple(int(side) for side in parts[2].split(","))


class MDSReader:
    """Reads the samples of a local folder of MDS shards.

    It uses no shared memory, no lock files and no collectives. A process may open any number of folders, and leaves
    nothing behind when it is killed.

    Args:
        max_open_files: shards that stay open at the same time.
    """

    def __init__(self, path: Path, max_open_files: int = MAX_OPEN_FILES) -> None:
        self._open: OrderedDict[int, int] = OrderedDict()  # shard → descriptor, least recently used first
        self.shards = [Shard.from_index(path, entry) for entry in read_index(path)["shards"]]
        self._ends = list(accumulate(shard.samples for shard in self.shards))
        self.num_samples = self._ends[-1] if self.shards else 0
        self._max_open_files = max_open_files
        self._lock = threading.Lock()  # a descriptor must not be closed while another thread reads from it

    def __getitem__(self, index: int) -> dict[str, Any]:
        names = list(self.shards[self._place(index)[0]].columns)
        values = self.gather([index], [[name] for name in names])
        return {name: int(value[0]) if value.ndim == 1 else value[0] for name, value in zip(names, values, strict=True)}

    def gather(self, indices: Sequence[int], columns: Sequence[Sequence[str]]) -> list[Array]:
        """See SampleReader.

        Raises:
            ValueError: names the shard that is missing, truncated or not the one of index.json.
        """
        out: list[Array] = []
        views: list[memoryview] = []
        for names in columns:
            first = self.shards[self._place(indices[0])[0]].columns[names[0]]
            out.append(np.empty((len(indices), *first.shape), first.dtype))
            views.append(out[-1].reshape(-1).view(np.uint8).data)
        with self._lock:
            for row in sorted(range(len(indices)), key=indices.__getitem__):  # each shard is opened once
                number, local = self._place(indices[row])
                shard, descriptor = self.shards[number], self._descriptor(number)
                start = shard.start + local * shard.stride
                for view, names in zip(views, columns, strict=True):
                    column = shard.columns[names[row]]
                    place = slice(row * column.size, (row + 1) * column.size)
                    _read(descriptor, view[place], start + column.offset, shard.path)
        return out

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes that are not forked: they open the files anew."""
        return {**self.__dict__, "_open": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def _place(self, index: int) -> tuple[int, int]:
        """The shard of a sample, and its index in that shard."""
        if not 0 <= index < self.num_samples:
            raise IndexError(index)
        number = bisect_right(self._ends, index)
        return number, index - self._ends[number] + self.shards[number].samples

    def _descriptor(self, number: int) -> int:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        while len(self._open) >= self._max_open_files:
            os.close(self._open.popitem(last=False)[1])
        self._open[number] = self._open_shard(self.shards[number])
        return self._open[number]

    def _open_shard(self, shard: Shard) -> int:
        try:
            return shard.open()
        except FileNotFoundError as error:
            raise ValueError(f"{shard.path}: missing; {REPAIR}") from error

    def __del__(self) -> None:
        self.close()


def _read(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise ValueError(f"{path}: truncated while it was read; {REPAIR}")
        done += count
