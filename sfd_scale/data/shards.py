"""Open a folder of MDS shards, local or remote, and check that it is complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sfd_scale.data.cache import ShardCache, fetch_description
from sfd_scale.data.manifest import MANIFEST, STATS, Manifest, index_sha256, read_index
from sfd_scale.data.mds_reader import MAX_OPEN_FILES, REPAIR, MDSReader, SampleReader, Shard
from sfd_scale.data.mosaic import streaming
from sfd_scale.diffusion.latents import LatentStats
from sfd_scale.runtime.files import sha256


class RemoteMDSReader(MDSReader):
    """Reads the samples of a remote folder. Downloads a shard to the cache when one of its samples is read first.

    Args:
        path: the cache.
        limit: the largest size of the cache, such as 100gb.
    """

    def __init__(self, path: Path, remote: str, limit: str | None) -> None:
        # With a limit, other processes delete shards; an open file would keep the disk space of a deleted shard.
        super().__init__(path, max_open_files=MAX_OPEN_FILES if limit is None else 1)
        reader_from_json = streaming("streaming.base.format").reader_from_json
        entries = read_index(path)["shards"]
        self._entries = {entry["raw_data"]["basename"]: reader_from_json(str(path), None, entry) for entry in entries}
        self._cache = ShardCache(path, remote, limit, max(shard.bytes for shard in self.shards))

    def _open_shard(self, shard: Shard) -> int:
        while True:
            try:
                return shard.open()
            except FileNotFoundError:  # not downloaded yet, or deleted by another process
                self._cache.fetch(self._entries[shard.path.name])


def open_shards(path: Path, remote: str | None = None, cache_limit: str | None = None) -> SampleReader:
    """Open a complete folder of shards, as written by `sfd encode`.

    With `remote` (s3://, gs://, azure://, oci://, hf:// or a folder), `path` is the cache of one node. Manifest,
    statistics and index are downloaded at once. A shard is downloaded when one of its samples is read first, and its
    SHA-256 is checked.

    Raises:
        ValueError: if the folder is incomplete, or index.json does not match the manifest.
    """
    if remote is not None:
        fetch_description(path, remote)
    manifest = Manifest.read(path)
    if index_sha256(path) != manifest.index_sha256:
        cause = "the cache holds other data; empty it" if remote else "the shards were changed; encode them again"
        raise ValueError(f"{path}: index.json does not match {MANIFEST}: {cause}")
    count = sum(shard["samples"] for shard in read_index(path)["shards"])
    if count != manifest.num_samples:
        raise ValueError(f"{path}: {count} samples, expected {manifest.num_samples}")
    if remote is not None:
        return RemoteMDSReader(path, remote, cache_limit)
    check_sizes(path)
    return MDSReader(path)


def check_sizes(path: Path) -> None:
    """Check that every local shard exists and has its full size.

    Raises:
        ValueError: names the first shard that is missing or truncated.
    """
    for shard in read_index(path)["shards"]:
        problem = _size_problem(path, shard)
        if problem:
            raise ValueError(f"{problem}; {REPAIR}")


def _size_problem(path: Path, shard: dict[str, Any]) -> str | None:
    entry = shard["raw_data"]
    file = path / entry["basename"]
    if not file.is_file():
        return f"{file}: missing"
    size = file.stat().st_size
    return None if size == entry["bytes"] else f"{file}: {size} bytes, expected {entry['bytes']}"


def check_data(path: Path) -> list[str]:
    """Verify every shard by its size and SHA-256 in index.json, and index.json by the manifest.

    To repair a damaged shard, delete it and encode into the folder again.

    Returns:
        One line for each damaged file.
    """
    manifest = Manifest.read(path)
    bad = []
    if index_sha256(path) != manifest.index_sha256:
        bad.append(f"{path / 'index.json'}: does not match {MANIFEST}")
    if manifest.stats_hash is not None and _stats_hash(path / STATS) != manifest.stats_hash:
        bad.append(f"{path / STATS}: does not match {MANIFEST}")
    for shard in read_index(path)["shards"]:
        problem = _size_problem(path, shard)
        if problem is None and sha256(path / shard["raw_data"]["basename"]) != shard["raw_data"]["hashes"]["sha256"]:
            problem = f"{path / shard['raw_data']['basename']}: its SHA-256 does not match index.json"
        if problem:
            bad.append(problem)
    return bad


def _stats_hash(path: Path) -> str | None:
    try:
        return LatentStats.load(path).hash
    except ValueError:
        return None
