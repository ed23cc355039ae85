"""A local cache of a remote folder of shards. All processes of a node share it, and any of them may be killed.

MosaicML's StreamingDataset is not used for two reasons: after a kill it refuses the cache until its shared memory is
cleaned by hand, and it keeps a shard whose hash is wrong.
"""

from __future__ import annotations

import fcntl
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from sfd_scale.data.download import Cancelled, Expected, FetchError, FetchLimits, Store, download
from sfd_scale.data.manifest import MANIFEST, STATS, Manifest

_INCOMING, _LOCKS = ".incoming", ".locks"
_POLL_S = 0.01
MAX_LOOK_AHEAD = 16 << 30  # bytes on one node
LOOK_AHEAD_PART = 0.25  # of the limit
_UNITS = {"": 1, "b": 1, "kb": 2**10, "mb": 2**20, "gb": 2**30, "tb": 2**40}


def parse_size(text: str) -> int:
    """Bytes of a size such as 100gb. The units are powers of 1,024, as in MosaicML streaming.

    Raises:
        ValueError: if it is not a size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?b?)", text.strip().lower())
    if found is None or found[2] not in _UNITS:
        raise ValueError(f"data.cache_limit: {text!r}; allowed: a size such as 100gb (units: b, kb, mb, gb, tb)")
    return int(float(found[1]) * _UNITS[found[2]])


class Schedule(Protocol):
    """When the processes of this node need each shard."""

    def next_use(self, name: str) -> float:
        """The step in which a shard is needed next; math.inf if it is not known to be needed."""
        ...

    def bytes_in_use(self) -> int:
        """The largest size of the shards that are needed at the same time."""
        ...


@contextmanager
def locked(path: Path, name: str, limits: FetchLimits, cancelled: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Hold a lock of the cache. Wait for it if another process holds it.

    Raises:
        FetchError: if the other process still holds it after `limits.wait_s`.
        Cancelled: if `cancelled` became true.
    """
    end = time.monotonic() + limits.wait_s
    while True:
        with try_locked(path, name) as own:
            if own:
                yield
                return
        if cancelled():
            raise Cancelled
        if time.monotonic() > end:
            raise FetchError(
                "busy", f"another process has been downloading {name} to {path} for {limits.wait_s:.0f} s; see its log"
            )
        time.sleep(_POLL_S)


@contextmanager
def try_locked(path: Path, name: str) -> Iterator[bool]:
    """Take a lock of the cache (flock) without waiting; yields whether it is held.

    The operating system releases the lock of a killed process. It is released explicitly, because a forked worker
    inherits the descriptor.
    """
    folder = path / _LOCKS
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def fetch_description(path: Path, store: Store, limits: FetchLimits) -> None:
    """Download manifest, index and statistics to the cache, unless they are there.

    Raises:
        FetchError: if one of them cannot be read.
    """
    with locked(path, "description", limits):
        for name in (MANIFEST, "index.json", STATS):
            if (path / name).exists() or (name == STATS and Manifest.read(path).stats_hash is None):
                continue
            partial = path / f"{name}.part"
            sha256 = Manifest.read(path).index_sha256 if name == "index.json" else None
            try:
                download(store, name, partial, Expected(sha256=sha256), limits)
            except FetchError as error:
                if error.cause != "missing":
                    raise
                raise FetchError("missing", f"{store} has no {name}; upload a complete encoded folder") from error
            partial.replace(path / name)


class ShardCache:
    """Downloads shards, and deletes shards to keep the cache below its limit.

    Args:
        path: the cache.
        shards: size and SHA-256 of each shard by its name.
        limit: the largest size of the cache in bytes, with the downloads in progress; None for no limit.

    The oldest download is deleted first; after `keep_by`, the shard that is needed last.

    Raises:
        ValueError: if the limit is smaller than four shards.
    """

    def __init__(
        self, path: Path, store: Store, shards: Mapping[str, Expected], limit: int | None, limits: FetchLimits
    ) -> None:
        self.path, self.store, self.shards, self.limit, self.limits = path, store, shards, limit, limits
        self._schedule: Schedule | None = None
        self._failures: dict[str, FetchError] = {}  # of fetches ahead, for the reader that needs the shard
        largest = max(_bytes(shard) for shard in shards.values())
        if limit is not None and limit < 4 * largest:
            raise ValueError(
                f"data.cache_limit: {limit}; allowed: {4 * largest} bytes and up (four of the largest shards)"
            )
        (path / _INCOMING).mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()

    @property
    def look_ahead(self) -> int:
        """Bytes of the shards that are downloaded on this node before they are needed."""
        whole = sum(_bytes(shard) for shard in self.shards.values())
        most = min(MAX_LOOK_AHEAD, whole)
        return most if self.limit is None else min(most, int(self.limit * LOOK_AHEAD_PART))

    def keep_by(self, schedule: Schedule) -> None:
        """Delete shards by their next use from now on.

        Raises:
            ValueError: if the limit is smaller than the shards in use at the same time, and those downloaded ahead.
        """
        self._schedule = schedule
        if self.limit is None:
            return
        in_use, whole = schedule.bytes_in_use(), sum(_bytes(shard) for shard in self.shards.values())
        needed = min(int(in_use / (1 - LOOK_AHEAD_PART)) + 1, whole)
        if self.limit < needed:
            raise ValueError(
                f"data.cache_limit: {self.limit} bytes ({self.limit / 2**30:.3g}gb); allowed: {needed} bytes and up "
                f"({needed / 2**30:.3g}gb): {in_use} bytes of shards are in use at the same time, and a quarter of the "
                "limit is for downloads ahead; or lower data.shuffle_block"
            )

    def has(self, name: str) -> bool:
        return (self.path / name).exists()

    def fetch(self, name: str, cancelled: Callable[[], bool] = lambda: False) -> None:
        """Download a shard for a reader that needs it now, unless it is there. Wait if another process downloads it.

        Raises:
            FetchError: if it cannot be downloaded; also the error of a fetch ahead.
        """
        with locked(self.path, name, self.limits, cancelled):
            failure = self._failures.pop(name, None)
            if self.has(name):
                return
            if failure is not None:
                raise failure
            self._download(name, cancelled)

    def fetch_ahead(self, name: str, cancelled: Callable[[], bool]) -> bool:
        """Download a shard before it is needed; returns False if another process or thread downloads it now.

        An error is kept for the reader, if it needs the shard.

        Raises:
            FetchError: if it cannot be downloaded.
        """
        if self.has(name):
            return True
        with try_locked(self.path, name) as own:
            if not own:
                return False
            if not self.has(name):
                try:
                    self._download(name, cancelled)
                except FetchError as error:
                    self._failures[name] = error
                    raise
            return True

    def _download(self, name: str, cancelled: Callable[[], bool]) -> None:
        incoming = self.path / _INCOMING / name
        try:
            self._make_room(name, incoming)
            download(self.store, name, incoming, self.shards[name], self.limits, cancelled)
            incoming.replace(self.path / name)
        finally:
            incoming.unlink(missing_ok=True)

    def _make_room(self, name: str, incoming: Path) -> None:
        """Reserve the size of a shard: create its incoming file, and delete shards until the cache has room for it."""
        if self.limit is None:
            return
        with locked(self.path, "evict", self.limits):
            incoming.touch()
            arriving = [self.shards[e.name] for e in os.scandir(incoming.parent) if e.name in self.shards]
            cached = [e.name for e in os.scandir(self.path) if e.name in self.shards]
            total = sum(_bytes(shard) for shard in arriving) + sum(_bytes(self.shards[name]) for name in cached)
            if total <= self.limit:
                return
            for victim in sorted(cached, key=self._keep_longest):
                (self.path / victim).unlink(missing_ok=True)
                total -= _bytes(self.shards[victim])
                if total <= self.limit:
                    return

    def _keep_longest(self, name: str) -> float:
        """Shards with the lowest value are deleted first."""
        if self._schedule is not None:
            return -self._schedule.next_use(name)
        try:
            return (self.path / name).stat().st_mtime_ns
        except FileNotFoundError:  # deleted by a reader with another cache limit
            return -math.inf

    def _remove_leftovers(self) -> None:
        """Delete the partial downloads of processes that died. A live process holds the lock of its download."""
        for entry in list((self.path / _INCOMING).iterdir()):
            shard = next((n for n in (entry.name, *_parents(entry.name)) if n in self.shards), entry.name)
            with try_locked(self.path, shard) as own:
                if own and not entry.is_dir():
                    entry.unlink(missing_ok=True)


def _parents(name: str) -> Iterator[str]:
    """A file name without its last suffixes: shard.00000.mds.1a2B → shard.00000.mds, …"""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _bytes(shard: Expected) -> int:
    assert shard.bytes is not None
    return shard.bytes
