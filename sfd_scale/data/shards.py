"""MosaicML streaming: the one file that opens its dataset, and what the library does not check by itself."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

from sfd_scale.data.schema import read_index


def open_shards(path: Path, remote: str | None = None, cache_limit: str | None = None) -> Any:
    """Random access to the samples of a folder of shards: a StreamingDataset, `rows[i]` → {column: value}.

    `remote` (s3://, gs://, az://, oci://, hf:// or a folder) is downloaded shard by shard into `path` as samples are
    asked for. The order of samples is ours (sfd_scale.data.reader), so the library's own shuffling stays off.
    """
    from streaming import StreamingDataset  # seconds to import

    if remote is None:
        check_sizes(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return StreamingDataset(
            local=str(path), remote=remote, shuffle=False, batch_size=1, cache_limit=cache_limit,
            validate_hash="sha256" if remote else None, allow_unsafe_types=False,
        )  # fmt: skip


def check_sizes(path: Path) -> None:
    """Every local shard is there, in its full length.

    Raises:
        ValueError: naming the first file that is not; the library would end the epoch early without a word.
    """
    for shard in read_index(path)["shards"]:
        file = path / shard["raw_data"]["basename"]
        if not file.is_file():
            raise ValueError(f"{file}: missing; encode the data again: whole shards are kept, lost ones are remade")
        if file.stat().st_size != shard["raw_data"]["bytes"]:
            raise ValueError(f"{file}: {file.stat().st_size} bytes, of {shard['raw_data']['bytes']}; it was cut off")


def check_data(path: Path) -> list[str]:
    """Verify every shard against the size and SHA-256 in index.json; one line for each damaged file."""
    bad = []
    for shard in read_index(path)["shards"]:
        entry = shard["raw_data"]
        file = path / entry["basename"]
        if not file.is_file():
            bad.append(f"{file}: missing")
        elif file.stat().st_size != entry["bytes"]:
            bad.append(f"{file}: {file.stat().st_size} bytes, of {entry['bytes']}")
        elif "sha256" in entry["hashes"]:
            with file.open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != entry["hashes"]["sha256"]:
                    bad.append(f"{file}: its content does not have the hash of index.json")
    return bad
