"""What a folder of shards holds: columns, and the manifest beside index.json."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

FORMAT = 1
MANIFEST = "manifest.json"
STATS = "stats.safetensors"
FLIPPED = "_flip"  # suffix of the columns of the mirrored image
StoredDtype = Literal["float16", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Written when an encode is complete; a folder without one is not.

    columns: MDS column → encoding. dtype: of latents and features; bfloat16 is stored as its 16 bits.
    stats_hash: LatentStats.hash of the stored latents, or None for images alone.
    """

    num_samples: int
    num_classes: int
    image_size: int
    columns: dict[str, str]
    dtype: StoredDtype
    index_sha256: str
    stats_hash: str | None
    tokenizers: dict[str, str] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        partial = folder / f"{MANIFEST}.tmp"
        partial.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")
        partial.replace(folder / MANIFEST)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises ValueError where there is none, or one of a newer release."""
        path = folder / MANIFEST
        if not path.is_file():
            raise ValueError(f"{folder}: no {MANIFEST}; encode the data first, or finish an encode that was cut off")
        data = _read_json(path)
        if data["format"] > FORMAT:
            raise ValueError(f"{path}: format {data['format']}; this release reads up to {FORMAT}: update sfd-scale")
        return cls(**data)


def read_index(folder: Path) -> dict[str, Any]:
    """The index.json of a folder of MDS shards, with every file name checked.

    Raises:
        ValueError: for a shard that is not MDS, a name that leads out of the folder, or a column that unpickles.
    """
    path = folder / "index.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no index.json; it is not a folder of shards")
    index = _read_json(path)
    for shard in index["shards"]:
        if shard["format"] != "mds":
            raise ValueError(f"{path}: a shard of format {shard['format']!r}; allowed: mds")
        for part in ("raw_data", "zip_data"):
            name = shard[part]["basename"] if shard[part] else "x"
            if Path(name).name != name or name in ("", ".", ".."):
                raise ValueError(f"{path}: the shard name {name!r} leads out of the folder")
        if "pkl" in shard["column_encodings"]:
            raise ValueError(f"{path}: a pickled column, which could run code; encode it in another form")
    return index


def index_sha256(folder: Path) -> str:
    return hashlib.sha256((folder / "index.json").read_bytes()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); encode into this folder again") from error
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


def restored(arrays: list[np.ndarray[Any, Any]], dtype: StoredDtype) -> Tensor:
    """The inverse of `stored` for one array a row: (N, *shape) float32."""
    rows = torch.from_numpy(np.stack(arrays))
    return (rows.view(torch.bfloat16) if dtype == "bfloat16" else rows).float()
