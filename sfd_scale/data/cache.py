"""A local cache of a remote folder of shards. All processes of a node share it, and any of them may be killed.

MosaicML streaming downloads, retries and checks the hashes. We do not use its StreamingDataset for two reasons: after
a kill it refuses the cache until its shared memory is cleaned by hand, and it keeps a shard whose hash is wrong.
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
    """Hold a lock of the cache (flock). The operating system releases the lock of a killed process."""
    folder = path / _LOCKS
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fetch_description(path: Path, remote: str) -> None:
    """Download manifest, index and statistics to the cache, unless they are there.

    Raises:
        ValueError: if one of them is missing in the remote folder.
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
                raise ValueError(f"data.remote: {remote} has no {name}; upload a complete encoded folder") from error
            partial.replace(path / name)


class ShardCache:
    """Downloads shards, and deletes the oldest downloads to keep the cache below its limit.

    Args:
        path: the cache.
        limit: the largest size of the cache, such as 100gb; None for no limit.
        largest: size of the largest shard in bytes.

    Raises:
        ValueError: if the limit is smaller than four shards.
    """

    def __init__(self, path: Path, remote: str, limit: str | None, largest: int) -> None:
        bytes_to_int = streaming("streaming.base.util").bytes_to_int
        self.path, self.remote = path, remote
        self.limit: int | None = None if limit is None else bytes_to_int(limit)
        if self.limit is not None and self.limit < 4 * largest:
            raise ValueError(
                f"data.cache_limit: {limit}; allowed: {4 * largest} bytes and up (four of the largest shards)"
            )
        self._stream = streaming().Stream(
            remote=remote, local=str(path / _INCOMING), download_retry=_RETRIES, download_timeout=_TIMEOUT_S,
            validate_hash="sha256", keep_zip=False,
        )  # fmt: skip

    def fetch(self, shard: Any) -> None:
        """Download a shard to the cache, unless it is there, and check its SHA-256.

        Raises:
            ValueError: if its SHA-256 does not match index.json.
        """
        name = shard.raw_data.basename
        final, incoming = self.path / name, self.path / _INCOMING / name
        with locked(self.path, name):
            if final.exists():  # downloaded by another process
                return
            incoming.unlink(missing_ok=True)  # an interrupted download
            try:
                self._stream.prepare_shard(shard)
            except ValueError as error:
                incoming.unlink(missing_ok=True)
                raise ValueError(
                    f"data.remote: the SHA-256 of {self.remote}/{name} does not match index.json"
                ) from error
            incoming.replace(final)
        if self.limit is not None:
            self._evict(keep=final, limit=self.limit)

    def _evict(self, keep: Path, limit: int) -> None:
        with locked(self.path, "evict"):
            if not keep.exists():  # evicted by another process
                return
            cached = sorted((p for p in self.path.glob("*.mds") if p != keep), key=lambda p: p.stat().st_mtime_ns)
            total = keep.stat().st_size + sum(p.stat().st_size for p in cached)
            for file in cached:
                if total <= limit:
                    break
                total -= file.stat().st_size
                file.unlink()
