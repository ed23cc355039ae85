"""The golden arrays: outputs of the official code for fixed small inputs (tests/golden/README.md).

`SFD_GOLDEN` selects another folder of the same format. It may have other shapes, seeds and settings, because tests read
these from the manifest.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfd_scale.models.alignment import AlignmentConfig
from sfd_scale.models.lightningdit import LightningDiT, LightningDiTConfig

FOLDER = Path(os.environ.get("SFD_GOLDEN", Path(__file__).parents[1] / "golden"))
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


@dataclass(frozen=True)
class Comparison:
    """The error of our result for one array, and its bound."""

    error: float
    bound: float


COMPARED: dict[str, Comparison] = {}  # by file and array, for the table of conftest.py


@dataclass(frozen=True)
class Exact:
    """A sampler's distance from the exact solution, and the fewest and most evaluations of a sample."""

    error: float
    fewest: int
    most: int


EXACT: dict[tuple[str, str, bool], Exact] = {}  # by guidance, error control and `jump`


def check(
    actual: Tensor, file: str, name: str, bound: float = 1e-5, *, of: Callable[[Tensor], Tensor] = lambda array: array
) -> None:
    """Assert that the relative error for an array (or for `of` of it) is within its bound, and record it."""
    error, key = relative_error(actual, of(arrays(file)[name])), f"{file}/{name}"
    COMPARED[key] = Comparison(max(error, COMPARED[key].error if key in COMPARED else 0.0), bound)
    assert error <= bound, f"{key}: relative error {error:.1e}, allowed {bound:.0e}"


@cache
def noise(name: str) -> float:
    """How much the official samples of that name change with threads and compilation (README of the golden arrays)."""
    row = re.search(rf"^\| `{re.escape(name)}` \|.*\| ([-+.e0-9]+) \|$", (FOLDER / "README.md").read_text(), re.M)
    return float(row[1]) if row else 0.0


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, divided by the largest expected value."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return ((actual.detach() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def golden_model(name: str) -> LightningDiT:
    """`main`, `guide`, `sync/main` or `sync/guide` with its golden weights, in eval mode."""
    base = name.removeprefix("sync/")
    arguments, sync, state = settings[base], name != base, arrays(f"weights_{base}")
    if sync:
        # The models with one clock share all other weights.
        own = {key.removeprefix(f"{base}/"): value for key, value in arrays("weights_sync").items() if base in key}
        state = {key: value for key, value in state.items() if not key.startswith("t_embedder")} | own
    model = build(arguments, two_clocks=not sync)
    model.load_state_dict(state)
    return model.eval()


def build(arguments: dict[str, Any], two_clocks: bool) -> LightningDiT:
    """Our model for the arguments of the official model."""
    alignment = None
    if arguments.get("use_repa"):
        alignment = AlignmentConfig(
            depth=arguments["repa_depth"],
            hidden=arguments["repa_projector_dim"],
            dim=arrays("inputs")["feats"].shape[1],
        )
    config = LightningDiTConfig(
        depth=arguments["depth"],
        width=arguments["hidden_size"],
        heads=arguments["num_heads"],
        patch_size=arguments["patch_size"],
        num_classes=arguments["num_classes"],
        alignment=alignment,
        norm="rmsnorm" if arguments["use_rmsnorm"] else "layernorm",
        mlp="swiglu" if arguments["use_swiglu"] else "gelu",
        mlp_ratio=arguments.get("mlp_ratio", 4.0),
        rope=arguments["use_rope"],
        qk_norm=arguments["use_qknorm"],
        shift=not arguments["wo_shift"],
        learn_sigma=arguments.get("learn_sigma", False),
    )
    return LightningDiT(
        config, in_channels=arguments["in_channels"], input_size=arguments["input_size"], two_clocks=two_clocks
    )
