"""A folder that caches the shards of a remote one: any number of processes of a node share it, and any may be killed.

MosaicML streaming downloads, retries and checks the hashes. Its StreamingDataset is not used: after a kill it refuses
the cache until its shared memory is cleaned by hand, and a shard that fails its check stays in the cache as good.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sfd_scale.data.manifest import MANIFEST, STATS, Manifest
from sfd_scale.data.mosaic import streaming

_RETRIES, _TIMEOUT_S = 3, 600.0
_INCOMING, _LOCKS = ".incoming", ".locks"


@contextmanager
def locked(path: Path, name: str) -> Iterator[None]:
    """Hold a lock of the cache against other processes and readers; a killed process lets go of it."""
    folder = path / _LOCKS
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fetch_description(path: Path, remote: str) -> None:
    """Bring manifest, index and statistics into the cache, where they are not there yet.

    Raises:
        ValueError: if the remote folder lacks one of them.
    """
    with locked(path, "description"):
        for name in (MANIFEST, "index.json", STATS):
            if (path / name).exists() or (name == STATS and Manifest.read(path).stats_hash is None):
                continue
            partial = path / f"{name}.part"
            partial.unlink(missing_ok=True)
            try:
                streaming("streaming.base.storage").CloudDownloader.direct_download(
                    f"{remote.rstrip('/')}/{name}", str(partial)
                )
            except FileNotFoundError as error:
                raise ValueError(f"data.remote: {remote} has no {name}; upload a whole encoded folder") from error
            partial.replace(path / name)


class ShardCache:
    """Fetches shards, and drops those fetched longest ago where the cache would outgrow `limit` (such as 100gb).

    Raises:
        ValueError: if the limit is less than four shards.
    """

    def __init__(self, path: Path, remote: str, limit: str | None, largest: int) -> None:
        bytes_to_int = streaming("streaming.base.util").bytes_to_int
        self.path, self.remote = path, remote
        self.limit: int | None = None if limit is None else bytes_to_int(limit)
        if self.limit is not None and self.limit < 4 * largest:
            raise ValueError(
                f"data.cache_limit: {limit}; allowed: four of the largest shards, {4 * largest} bytes, and up"
            )
        self._stream = streaming().Stream(
            remote=remote, local=str(path / _INCOMING), download_retry=_RETRIES, download_timeout=_TIMEOUT_S,
            validate_hash="sha256", keep_zip=False,
        )  # fmt: skip

    def fetch(self, shard: Any) -> None:
        """Make a shard's file be there, whole and with the hash of the index.

        Raises:
            ValueError: if it has another hash.
        """
        name = shard.raw_data.basename
        final, incoming = self.path / name, self.path / _INCOMING / name
        with locked(self.path, name):
            if final.exists():  # another process was faster
                return
            incoming.unlink(missing_ok=True)  # of a download that was cut off
            try:
                self._stream.prepare_shard(shard)
            except ValueError as error:
                incoming.unlink(missing_ok=True)
                raise ValueError(f"data.remote: {self.remote}/{name} does not have the hash of index.json") from error
            incoming.replace(final)
        if self.limit is not None:
            self._drop(keep=final, limit=self.limit)

    def _drop(self, keep: Path, limit: int) -> None:
        with locked(self.path, "drop"):
            if not keep.exists():  # another process had no room for it
                return
            cached = sorted((p for p in self.path.glob("*.mds") if p != keep), key=lambda p: p.stat().st_mtime_ns)
            total = keep.stat().st_size + sum(p.stat().st_size for p in cached)
            for file in cached:
                if total <= limit:
                    break
                total -= file.stat().st_size
                file.unlink()
