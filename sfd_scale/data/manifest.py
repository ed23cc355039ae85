"""What a folder of shards holds: columns, and the manifest beside index.json."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sfd_scale import config
from sfd_scale.runtime.files import sha256, write_json

FORMAT = 1
MANIFEST = "manifest.json"
STATS = "stats.safetensors"
FLIPPED = "_flip"  # suffix of the columns of the mirrored image
StoredDtype = Literal["float16", "bfloat16"]
_ENCODING = re.compile(r"int|ndarray:(?:u?int(?:8|16|32|64)|float(?:16|32|64))(?::\d{1,6}(?:,\d{1,6})*)?")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Written when an encode is complete; a folder without one is not.

    columns: MDS column → encoding. dtype: of latents and features; bfloat16 is stored as its 16 bits.
    stats_hash: LatentStats.hash of the stored latents, or None for images alone. classes: names by class index, where
    the source has some.
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
        """Raises ValueError where there is none, or one of a newer release."""
        path = folder / MANIFEST
        if not path.is_file():
            raise ValueError(f"{folder}: no {MANIFEST}; encode the data first, or finish an encode that was cut off")
        data = read_json(path)
        number = data.get("format", FORMAT)
        if isinstance(number, int) and number > FORMAT:
            raise ValueError(f"{path}: format {number}; this release reads up to {FORMAT}: update sfd-scale")
        return config.from_dict(cls, data, str(path))


def read_index(folder: Path) -> dict[str, Any]:
    """The index.json of a folder of MDS shards, with every file name checked.

    Raises:
        ValueError: for a shard that is not MDS as `sfd encode` writes it, or a name that leads out of the folder.
    """
    path = folder / "index.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no index.json; it is not a folder of shards")
    index = read_json(path)
    if not isinstance(index.get("shards"), list):
        raise ValueError(f"{path}: it has no list of shards; encode the data anew")
    for shard in index["shards"]:
        try:
            problem = _shard_problem(shard)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}: a shard that is not described as it should be: {error!r}") from error
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
    if Path(name).name != name or name in ("", ".", "..") or "\0" in name:
        return f"the shard name {name!r} leads out of the folder"
    if not all(type(n) is int and n >= 0 for n in (shard["samples"], raw["bytes"])):
        return f"{name}: {shard['samples']!r} samples in {raw['bytes']!r} bytes"
    if shard["samples"] * 4 > raw["bytes"]:  # each has an offset of four bytes
        return f"{name}: {shard['samples']} samples do not fit in {raw['bytes']} bytes"
    columns = list(zip(shard["column_names"], shard["column_encodings"], shard["column_sizes"], strict=True))
    for column, form, size in columns:
        if type(column) is not str or not _ENCODING.fullmatch(form):
            # `pkl` would run code; the others bring decoders that nothing here needs.
            return f"column {column!r} has the encoding {form!r}; allowed: int, ndarray:TYPE:SHAPE"
        if size is not None and not (type(size) is int and size >= 0):
            return f"column {column!r} has the size {size!r}"
    return None


def index_sha256(folder: Path) -> str:
    return sha256(folder / "index.json")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a data folder.

    Raises:
        ValueError: that names the file, if it holds anything else.
    """
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged ({error}); encode into this folder again") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: damaged (a {type(data).__name__} where an object should be); encode it again")
    return data


def encoding(dtype: StoredDtype, shape: tuple[int, ...]) -> str:
    """The MDS encoding of an array; MDS has no bfloat16, whose bits are kept as uint16."""
    return f"ndarray:{'float16' if dtype == 'float16' else 'uint16'}:{','.join(map(str, shape))}"


def stored(values: Tensor, dtype: StoredDtype) -> np.ndarray[Any, Any]:
    """Values as they are stored.

    Raises:
        ValueError: if one is not finite in that form.
    """
    narrow = values.detach().cpu().to(torch.float16 if dtype == "float16" else torch.bfloat16)
    if not bool(narrow.isfinite().all()):
        cause = "beyond the range of float16; set store.dtype=bfloat16" if values.isfinite().all() else "not finite"
        raise ValueError(f"values up to {values.abs().max().item()}: {cause}")
    return (narrow if dtype == "float16" else narrow.view(torch.uint16)).numpy()


def as_stored(rows: np.ndarray[Any, Any] | list[np.ndarray[Any, Any]], dtype: StoredDtype) -> Tensor:
    """Rows of a column as the 16-bit tensor that was stored: (N, *shape)."""
    values = torch.from_numpy(np.stack(rows) if isinstance(rows, list) else rows)
    return values.view(torch.bfloat16) if dtype == "bfloat16" else values


def restored(rows: np.ndarray[Any, Any] | list[np.ndarray[Any, Any]], dtype: StoredDtype) -> Tensor:
    """The inverse of `stored`: (N, *shape) float32."""
    return as_stored(rows, dtype).float()
