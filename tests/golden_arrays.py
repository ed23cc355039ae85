"""The golden set: what the authors' code returned for fixed small inputs (tests/golden/README.md)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"
manifest: dict[str, Any] = json.loads((FOLDER / "manifest.json").read_text())
settings: dict[str, Any] = manifest["config"]


@cache
def arrays(name: str) -> dict[str, Any]:
    """All arrays of `<name>.npz`: floats as float32 tensors, integers as tensors, names as lists of str."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: _tensor(file[key]) for key in file.files}


def _tensor(value: np.ndarray) -> Any:
    if value.dtype.kind == "U":
        return value.tolist()
    return torch.from_numpy(value.astype(np.float32) if value.dtype == np.float16 else value)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over largest expected value."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return ((actual.detach() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
