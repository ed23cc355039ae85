"""MosaicML streaming: the one file that reads its shards, and what the library does not check by itself."""

from __future__ import annotations

import hashlib
import logging
import warnings
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError

from sfd_scale import distributed
from sfd_scale.data.schema import MANIFEST, STATS, Manifest, index_sha256, read_index
from sfd_scale.latents import LatentStats

logger = logging.getLogger(__name__)


class Rows(Protocol):
    """Random access to samples: `rows[i]` → {column: value}."""

    num_samples: int

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class LocalRows:
    """The shards of a local folder, through the library's own shard readers.

    Its StreamingDataset would take shared memory, lock files and a collective over all ranks, which files that are
    there already do not need: here any process may open any number of folders, alone, and be killed without a trace.
    """

    def __init__(self, path: Path) -> None:
        from streaming.base.format import reader_from_json  # seconds to import

        shards = read_index(path)["shards"]
        self._shards = [reader_from_json(str(path), None, shard) for shard in shards]
        self._ends = list(accumulate(shard["samples"] for shard in shards))
        self.num_samples = self._ends[-1] if shards else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.num_samples:
            raise IndexError(index)
        shard = bisect_right(self._ends, index)
        return self._shards[shard][index - self._ends[shard] + self._shards[shard].samples]


def open_shards(path: Path, remote: str | None = None, cache_limit: str | None = None) -> Rows:
    """Random access to the samples of a folder that `sfd encode` has completed.

    With `remote` (s3://, gs://, az://, oci://, hf:// or a folder), `path` is a cache on each node: manifest, statistics
    and index are fetched at once, shards as their samples are asked for, with their SHA-256 checked. Every rank must
    then open it, as the library synchronises them. The order of samples is ours (sfd_scale.data.reader), so the
    library's own partitioning and shuffling stay off.

    Raises:
        ValueError: if the folder is incomplete, or index.json is not the one of the manifest.
    """
    if remote is not None:
        _fetch(path, remote)
    manifest = Manifest.read(path)
    if index_sha256(path) != manifest.index_sha256:
        cause = "the cache of other data; empty it" if remote else "its shards were changed; encode them anew"
        raise ValueError(f"{path}: index.json is not the one that {MANIFEST} names: {cause}")
    sizes = read_index(path)["shards"]
    if sum(shard["samples"] for shard in sizes) != manifest.num_samples:
        raise ValueError(f"{path}: {sum(shard['samples'] for shard in sizes)} samples, of {manifest.num_samples}")
    if remote is None:
        check_sizes(path)
        return LocalRows(path)
    from streaming import StreamingDataset

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return StreamingDataset(
            local=str(path), remote=remote, shuffle=False, batch_size=1, cache_limit=cache_limit,
            validate_hash="sha256", allow_unsafe_types=False,
        )  # fmt: skip


def _fetch(path: Path, remote: str) -> None:
    """Bring the small files into the cache, once a node."""
    from streaming.base.storage import CloudDownloader

    if distributed.local_rank() == 0:
        path.mkdir(parents=True, exist_ok=True)
        folder = remote.rstrip("/")
        for name in (MANIFEST, "index.json", STATS):
            if name == STATS and Manifest.read(path).stats_hash is None:
                continue
            try:
                CloudDownloader.direct_download(f"{folder}/{name}", str(path / name))
            except FileNotFoundError as error:
                raise ValueError(
                    f"data.remote: {folder}/{name} does not exist; upload a whole encoded folder"
                ) from error
        logger.info("%s is a cache of %s", path, folder)
    distributed.barrier()


def check_sizes(path: Path) -> None:
    """Every local shard is there, in its full length.

    Raises:
        ValueError: naming the first file that is not; the library would end the epoch early without a word.
    """
    for shard in read_index(path)["shards"]:
        problem = _size_problem(path, shard)
        if problem:
            raise ValueError(f"{problem}; encode into this folder again: it keeps whole shards and remakes the others")


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
        if problem is None and _sha256(path / shard["raw_data"]["basename"]) != shard["raw_data"]["hashes"]["sha256"]:
            problem = f"{path / shard['raw_data']['basename']}: its content does not have the hash of index.json"
        if problem:
            bad.append(problem)
    return bad


def _stats_hash(path: Path) -> str | None:
    try:
        return LatentStats.load(path).hash
    except (OSError, ValueError, SafetensorError):
        return None


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
