"""Opening a folder of shards, local or remote, and what MosaicML streaming does not check by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sfd_scale.data.cache import ShardCache, fetch_description
from sfd_scale.data.manifest import MANIFEST, STATS, Manifest, index_sha256, read_index
from sfd_scale.data.mds_reader import MEND, LocalRows, Rows, Shard
from sfd_scale.data.mosaic import streaming
from sfd_scale.diffusion.latents import LatentStats
from sfd_scale.runtime.files import sha256


class CachedRows(LocalRows):
    """The samples of a remote folder, each shard fetched when one of its samples is asked for."""

    def __init__(self, path: Path, remote: str, limit: str | None) -> None:
        super().__init__(path)
        reader_from_json = streaming("streaming.base.format").reader_from_json
        entries = read_index(path)["shards"]
        self._entries = {entry["raw_data"]["basename"]: reader_from_json(str(path), None, entry) for entry in entries}
        self._cache = ShardCache(path, remote, limit, max(shard.bytes for shard in self.shards))
        if limit is not None:
            self._limit = 1  # an open file that another process drops would keep its disk

    def _opened(self, shard: Shard) -> int:
        while True:
            try:
                return shard.open()
            except FileNotFoundError:  # not fetched yet, or dropped by another process
                self._cache.fetch(self._entries[shard.path.name])


def open_shards(path: Path, remote: str | None = None, cache_limit: str | None = None) -> Rows:
    """Random access to the samples of a folder that `sfd encode` has completed. The order of samples is ours
    (sfd_scale.data.reader).

    With `remote` (s3://, gs://, azure://, oci://, hf:// or a folder), `path` is a cache on each node: manifest,
    statistics and index are fetched at once, shards as their samples are asked for, with their SHA-256 checked.

    Raises:
        ValueError: if the folder is incomplete, or index.json is not the one of the manifest.
    """
    if remote is not None:
        fetch_description(path, remote)
    manifest = Manifest.read(path)
    if index_sha256(path) != manifest.index_sha256:
        cause = "the cache of other data; empty it" if remote else "its shards were changed; encode them anew"
        raise ValueError(f"{path}: index.json is not the one that {MANIFEST} names: {cause}")
    count = sum(shard["samples"] for shard in read_index(path)["shards"])
    if count != manifest.num_samples:
        raise ValueError(f"{path}: {count} samples, of {manifest.num_samples}")
    if remote is not None:
        return CachedRows(path, remote, cache_limit)
    check_sizes(path)
    return LocalRows(path)


def check_sizes(path: Path) -> None:
    """Every local shard is there, in its full length.

    Raises:
        ValueError: naming the first file that is not; the library would end the epoch early without a word.
    """
    for shard in read_index(path)["shards"]:
        problem = _size_problem(path, shard)
        if problem:
            raise ValueError(f"{problem}; {MEND}")


def _size_problem(path: Path, shard: dict[str, Any]) -> str | None:
    entry = shard["raw_data"]
    file = path / entry["basename"]
    if not file.is_file():
        return f"{file}: missing"
    size = file.stat().st_size
    return None if size == entry["bytes"] else f"{file}: {size} bytes, of {entry['bytes']}"


def check_data(path: Path) -> list[str]:
    """Verify every shard against the size and SHA-256 in index.json, and that against the manifest; one line for each
    damaged file. A damaged shard is remade by deleting it and encoding into the folder again."""
    manifest = Manifest.read(path)
    bad = []
    if index_sha256(path) != manifest.index_sha256:
        bad.append(f"{path / 'index.json'}: not the one that {MANIFEST} names")
    if manifest.stats_hash is not None and _stats_hash(path / STATS) != manifest.stats_hash:
        bad.append(f"{path / STATS}: not the statistics that {MANIFEST} names")
    for shard in read_index(path)["shards"]:
        problem = _size_problem(path, shard)
        if problem is None and sha256(path / shard["raw_data"]["basename"]) != shard["raw_data"]["hashes"]["sha256"]:
            problem = f"{path / shard['raw_data']['basename']}: its content does not have the hash of index.json"
        if problem:
            bad.append(problem)
    return bad


def _stats_hash(path: Path) -> str | None:
    try:
        return LatentStats.load(path).hash
    except (OSError, ValueError, SafetensorError):
        return None
