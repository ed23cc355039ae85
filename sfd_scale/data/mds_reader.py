"""Samples of MDS shards, column by column, straight into the arrays of a batch.

Every column that is written here has a fixed size, so sample i of a shard starts at start + i·stride: a column of a
sample is one read at a known place, and what a batch does not need is not read. The library's reader opens the file,
reads and decodes all columns for each sample.
"""

from __future__ import annotations

import math
import os
import struct
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
_OPEN_FILES = 256  # of a process; a shard that is read from stays open


class Rows(Protocol):
    """Random access to samples: `rows[i]` → {column: value}."""

    num_samples: int

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def gather(self, indices: Sequence[int], columns: Sequence[Sequence[str]]) -> list[Array]:
        """For each entry of `columns`, which names a column a sample: the values of all samples, (N, ...)."""
        ...


@dataclass(frozen=True)
class Column:
    """Where a column lies in a sample, and what it is."""

    offset: int
    size: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """One file of samples, as index.json describes it."""

    path: Path
    bytes: int
    samples: int
    columns: dict[str, Column]
    stride: int

    @property
    def start(self) -> int:
        """Where the first sample starts: the samples are the end of the file."""
        return self.bytes - self.samples * self.stride

    @classmethod
    def of(cls, folder: Path, entry: dict[str, Any]) -> Shard:
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
                f"{folder / raw['basename']}: {samples} samples of {offset} bytes, in {raw['bytes']} bytes"
            )
        return cls(folder / raw["basename"], raw["bytes"], samples, columns, offset)

    def open(self) -> int:
        """A descriptor of the file, whose head is that of index.json.

        Raises:
            FileNotFoundError: if it is not there.
            ValueError: if its size or head is another one.
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
            raise ValueError(f"{self.path}: {size} bytes, of {self.bytes}; {MEND}")
        # MDS: number of samples, where each starts, where the last ends, little-endian uint32.
        head = os.pread(descriptor, 4 * (self.samples + 2), 0)
        count, *places = struct.unpack(f"<{self.samples + 2}I", head)
        if count != self.samples or places != list(range(self.start, self.bytes + 1, self.stride)):
            raise ValueError(f"{self.path}: its head is not the one of index.json; {MEND}")


MEND = "encode into this folder again, which remakes it, or empty the cache if this is one"


def _array_of(form: str) -> tuple[np.dtype[Any] | None, tuple[int, ...]]:
    """The array that an MDS encoding stands for; None where its size is not fixed."""
    if form == "int":
        return np.dtype(np.int64), ()
    parts = form.split(":")
    if parts[0] != "ndarray" or len(parts) != 3:
        return None, ()
    return np.dtype(parts[1]), tuple(int(side) for side in parts[2].split(","))


class LocalRows:
    """The samples of a local folder, without shared memory, lock files or collectives: any process may open any number
    of folders, alone, and be killed without a trace.

    A shard that is missing, cut off or replaced while it is read is an error that names its file.
    """

    def __init__(self, path: Path) -> None:
        self._open: OrderedDict[int, int] = OrderedDict()  # shard → descriptor, the least recently used first
        self.shards = [Shard.of(path, entry) for entry in read_index(path)["shards"]]
        self._ends = list(accumulate(shard.samples for shard in self.shards))
        self.num_samples = self._ends[-1] if self.shards else 0
        self._limit = _OPEN_FILES

    def __getitem__(self, index: int) -> dict[str, Any]:
        names = list(self.shards[self._place(index)[0]].columns)
        values = self.gather([index], [[name] for name in names])
        return {name: int(value[0]) if value.ndim == 1 else value[0] for name, value in zip(names, values, strict=True)}

    def gather(self, indices: Sequence[int], columns: Sequence[Sequence[str]]) -> list[Array]:
        """See Rows.

        Raises:
            ValueError: naming the file, if a shard is missing or damaged.
        """
        out: list[Array] = []
        views: list[memoryview] = []
        for names in columns:
            first = self.shards[self._place(indices[0])[0]].columns[names[0]]
            out.append(np.empty((len(indices), *first.shape), first.dtype))
            views.append(out[-1].reshape(-1).view(np.uint8).data)
        for row, index in enumerate(indices):
            number, local = self._place(index)
            shard, descriptor = self.shards[number], self._descriptor(number)
            start = shard.start + local * shard.stride
            for view, names in zip(views, columns, strict=True):
                column = shard.columns[names[row]]
                _read(descriptor, view[row * column.size : (row + 1) * column.size], start + column.offset, shard.path)
        return out

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def _place(self, index: int) -> tuple[int, int]:
        """The shard of a sample, and its place there."""
        if not 0 <= index < self.num_samples:
            raise IndexError(index)
        number = bisect_right(self._ends, index)
        return number, index - self._ends[number] + self.shards[number].samples

    def _descriptor(self, number: int) -> int:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        while len(self._open) >= self._limit:
            os.close(self._open.popitem(last=False)[1])
        self._open[number] = self._opened(self.shards[number])
        return self._open[number]

    def _opened(self, shard: Shard) -> int:
        try:
            return shard.open()
        except FileNotFoundError as error:
            raise ValueError(f"{shard.path}: missing; {MEND}") from error

    def __del__(self) -> None:
        self.close()


def _read(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise ValueError(f"{path}: cut off while it was read; {MEND}")
        done += count
