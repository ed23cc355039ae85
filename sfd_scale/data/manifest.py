"""The manifest of a folder of shards, its index.json, and the encoding of its columns."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sfd_scale import config
from sfd_scale.runtime.files import read_json, sha256, write_json

FORMAT = 1
MANIFEST = "manifest.json"
STATS = "stats.safetensors"
FLIPPED = "_flip"  # suffix of columns of the mirrored image
StoredDtype = Literal["float16", "bfloat16"]
_ENCODING = re.compile(r"int|ndarray:(?:u?int(?:8|16|32|64)|float(?:16|32|64))(?::\d{1,6}(?:,\d{1,6})*)?")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Describes a complete folder of shards. `sfd encode` writes it last.

    columns: MDS encoding of each column.
    dtype: of latents and features; bfloat16 is stored as uint16 with the same bits.
    stats_hash: LatentStats.hash of the stored latents; None if there are no latents.
    tokenizers: fingerprint of each codec that made the data.
    unreadable: error messages of images that were left out.
    classes: class names by index; empty if the source has none.
    recipe: settings of the encode.
    """

    num_samples: int
    num_classes: int
    image_size: int
    columns: dict[str, str]
    dtype: StoredDtype
    index_sha256: str
    stats_hash: str | None
    tokenizers: dict[str, str] = field(default_factory=dict)
    unreadable: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    recipe: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        write_json(folder / MANIFEST, dataclasses.asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a folder.

        Raises:
            ValueError: if it is missing, damaged, or of a newer release.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise ValueError(f"{folder}: no {MANIFEST}; encode the data first, or complete an interrupted encode")
        data = _read_object(path)
        number = data.get("format", FORMAT)
        if isinstance(number, int) and number > FORMAT:
            raise ValueError(f"{path}: format {number}; this release reads up to {FORMAT}: update sfd-scale")
        return config.from_dict(cls, data, str(path))


def read_index(folder: Path) -> dict[str, Any]:
    """Read and check the index.json of a folder of MDS shards, which may come from outside.

    Raises:
        ValueError: if a shard has a format that `sfd encode` does not write, or a name outside the folder.
    """
    path = folder / "index.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no index.json, so this is not a folder of shards")
    index = _read_object(path)
    if not isinstance(index.get("shards"), list):
        raise ValueError(f"{path}: it has no list of shards; encode the data again")
    for shard in index["shards"]:
        try:
            problem = _shard_problem(shard)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}: malformed entry of a shard: {error!r}") from error
        if problem:
            raise ValueError(f"{path}: {problem}")
    return index


def _shard_problem(shard: Any) -> str | None:
    if shard["format"] != "mds" or shard["version"] != 2:
        return f"a shard of format {shard['format']!r}, version {shard['version']!r}; allowed: mds, 2"
    if shard["compression"] is not None or shard["zip_data"] is not None:
        return "a compressed shard, which `sfd encode` does not write; allowed: compression null"
    raw = shard["raw_data"]
    name = raw["basename"]
    if "/" in name and not {"", ".", ".."} & set(name.split("/")):
        return f"the shard {name!r} lies in another folder, as after merge_index; allowed: shards beside index.json"
    if Path(name).name != name or name in ("", ".", "..") or "\0" in name:
        return f"the shard name {name!r} points outside the folder"
    if not all(type(n) is int and n >= 0 for n in (shard["samples"], raw["bytes"])):
        return f"{name}: {shard['samples']!r} samples in {raw['bytes']!r} bytes"
    if not isinstance(raw["hashes"], dict):
        return f"{name}: its hashes are {raw['hashes']!r}"
    if shard["samples"] * 4 > raw["bytes"]:  # each sample has an offset of four bytes in the header
        return f"{name}: {shard['samples']} samples do not fit in {raw['bytes']} bytes"
    columns = list(zip(shard["column_names"], shard["column_encodings"], shard["column_sizes"], strict=True))
    for column, form, size in columns:
        if type(column) is not str or not _ENCODING.fullmatch(form):
            # `pkl` would execute code; other encodings need decoders that we do not use.
            return f"column {column!r} has the encoding {form!r}; allowed: int, ndarray:TYPE:SHAPE"
        if size is not None and not (type(size) is int and size >= 0):
            return f"column {column!r} has the size {size!r}"
    return None


def index_sha256(folder: Path) -> str:
    return sha256(folder / "index.json")


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: names the file, if it is not a JSON object.
    """
    try:
        data = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}, or encode into this folder again") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: damaged ({type(data).__name__}, not an object); encode into this folder again")
    return data


def encoding(dtype: StoredDtype, shape: tuple[int, ...]) -> str:
    """The MDS encoding of an array. MDS has no bfloat16, so its bits are stored as uint16."""
    return f"ndarray:{'float16' if dtype == 'float16' else 'uint16'}:{','.join(map(str, shape))}"


def stored(values: Tensor, dtype: StoredDtype) -> np.ndarray[Any, Any]:
    """Convert values to their stored form.

    Raises:
        ValueError: if a value is not finite in `dtype`.
    """
    narrow = values.detach().cpu().to(torch.float16 if dtype == "float16" else torch.bfloat16)
    if not bool(narrow.isfinite().all()):
        cause = "beyond the range of float16; set store.dtype=bfloat16" if values.isfinite().all() else "not finite"
        raise ValueError(f"values up to {values.abs().max().item()}: {cause}")
    return (narrow if dtype == "float16" else narrow.view(torch.uint16)).numpy()


def as_stored(samples: np.ndarray[Any, Any] | list[np.ndarray[Any, Any]], dtype: StoredDtype) -> Tensor:
    """Samples of a column as the 16-bit tensor that was stored: (N, *shape)."""
    values = torch.from_numpy(np.stack(samples) if isinstance(samples, list) else samples)
    return values.view(torch.bfloat16) if dtype == "bfloat16" else values


def restored(samples: np.ndarray[Any, Any] | list[np.ndarray[Any, Any]], dtype: StoredDtype) -> Tensor:
    """The inverse of `stored`: (N, *shape) float32."""
    return as_stored(samples, dtype).float()
