"""The golden set: what the authors' code returned for fixed small inputs (tests/golden/README.md)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfd_scale.models.alignment import AlignmentConfig
from sfd_scale.models.lightningdit import LightningDiT, LightningDiTConfig

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


def golden_model(name: str) -> LightningDiT:
    """`main`, `guide`, `sync/main` or `sync/guide` with its golden weights, every key loaded, in eval mode."""
    base = name.removeprefix("sync/")
    authors, sync, state = settings[base], name != base, arrays(f"weights_{base}")
    if sync:
        # The models with one clock share all other weights.
        own = {key.removeprefix(f"{base}/"): value for key, value in arrays("weights_sync").items() if base in key}
        state = {key: value for key, value in state.items() if not key.startswith("t_embedder")} | own
    config = LightningDiTConfig(
        size=None,
        depth=authors["depth"],
        width=authors["hidden_size"],
        heads=authors["num_heads"],
        num_classes=authors["num_classes"],
        alignment=AlignmentConfig(depth=authors["repa_depth"], hidden=authors["repa_projector_dim"], dim=384),
    )
    model = LightningDiT(
        config, in_channels=authors["in_channels"], input_size=authors["input_size"], two_clocks=not sync
    )
    model.load_state_dict(state)
    return model.eval()
