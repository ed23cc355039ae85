"""Open a folder of MDS shards, local or remote, and check that it is complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sfd_scale.data.cache import ShardCache, fetch_description, parse_size
from sfd_scale.data.download import Expected, FetchLimits, Store, open_store
from sfd_scale.data.manifest import MANIFEST, STATS, Manifest, index_sha256, read_index
from sfd_scale.data.mds_reader import MAX_OPEN_FILES, REPAIR, MDSReader, SampleReader, Shard
from sfd_scale.diffusion.latents import LatentStats
from sfd_scale.runtime.files import sha256


class RemoteMDSReader(MDSReader):
    """Reads the samples of a remote folder. Downloads a shard to the cache when one of its samples is read first.

    Args:
        path: the cache.
        limit: the largest size of the cache in bytes.
    """

    def __init__(self, path: Path, store: Store, limit: int | None, limits: FetchLimits) -> None:
        # With a limit, other processes delete shards; an open file would keep the disk space of a deleted shard.
        super().__init__(path, max_open_files=MAX_OPEN_FILES if limit is None else 1)
        entries = [entry["raw_data"] for entry in read_index(path)["shards"]]
        shards = {raw["basename"]: Expected(raw["bytes"], raw["hashes"].get("sha256")) for raw in entries}
        self.cache = ShardCache(path, store, shards, limit, limits)

    def _open_shard(self, shard: Shard) -> int:
        while True:
            try:
                return shard.open()
            except FileNotFoundError:  # not downloaded yet, or deleted by another process
                self.cache.fetch(shard.path.name)


def open_shards(
    path: Path, remote: str | None = None, cache_limit: str | None = None, limits: FetchLimits | None = None
) -> SampleReader:
    """Open a complete folder of shards, as written by `sfd encode`.

    With `remote` (s3://, gs://, azure://, oci://, hf:// or a folder), `path` is the cache of one node. Manifest,
    statistics and index are downloaded at once. A shard is downloaded when one of its samples is read first, and its
    SHA-256 is checked.

    Raises:
        ValueError: if the folder is incomplete, or index.json does not match the manifest.
        FetchError: if a file of the remote folder cannot be downloaded.
    """
    limits = limits or FetchLimits()
    store = None if remote is None else open_store(remote, limits)
    if store is not None:
        fetch_description(path, store, limits)
    manifest = Manifest.read(path)
    if index_sha256(path) != manifest.index_sha256:
        cause = "the cache holds other data; empty it" if remote else "the shards were changed; encode them again"
        raise ValueError(f"{path}: index.json does not match {MANIFEST}: {cause}")
    count = sum(shard["samples"] for shard in read_index(path)["shards"])
    if count != manifest.num_samples:
        raise ValueError(f"{path}: {count} samples, expected {manifest.num_samples}")
    if store is not None:
        return RemoteMDSReader(path, store, None if cache_limit is None else parse_size(cache_limit), limits)
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
        known = shard["raw_data"]["hashes"].get("sha256")
        if problem is None and known is not None and sha256(path / shard["raw_data"]["basename"]) != known:
            problem = f"{path / shard['raw_data']['basename']}: its SHA-256 does not match index.json"
        if problem:
            bad.append(problem)
    return bad


def without_hash(path: Path) -> int:
    """The number of shards whose SHA-256 is not in index.json, so that only their size can be checked."""
    return sum("sha256" not in shard["raw_data"]["hashes"] for shard in read_index(path)["shards"])


def _stats_hash(path: Path) -> str | None:
    try:
        return LatentStats.load(path).hash
    except ValueError:
        return None
