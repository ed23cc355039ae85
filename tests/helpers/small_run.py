"""The smallest complete training run: recipe, data and results, for tests that start, stop and damage runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from sfd_scale import config
from sfd_scale.checkpoint import load_weights
from sfd_scale.recipe import TrainRecipe
from tests.helpers.encoded import LAYOUT, encode_digits

COUNT, BATCH = 40, 8  # samples, global batch: 5 steps per epoch
FSDP = {"kind": "fsdp", "precision": "fp32", "grad_clip": 1.0}
ZERO1 = {"kind": "deepspeed", "zero_stage": 1, "precision": "bf16", "grad_clip": 1.0}


def encode(out: Path) -> Path:
    encode_digits(out, COUNT, chunk=20)
    return out


def settings(data: Path, /, steps: int = 12, every: int = 4, **changed: Any) -> dict[str, Any]:
    """A recipe as plain data; `changed` replaces whole keys."""
    return {
        "kind": "train", "name": "small", "data": {"path": str(data), "order": "blocks"}, "engine": FSDP,
        "latents": dataclasses.asdict(LAYOUT),
        "model": {"kind": "lightningdit", "depth": 1, "width": 16, "heads": 2, "patch_size": 4, "num_classes": 10},
        "objective": {"kind": "semantic_first", "alignment_weight": 0.0}, "optimizer": {"lr": 0.01},
        "train": {"steps": steps, "global_batch": BATCH, "log_every": 1, "timeout_s": 120.0},
        "checkpoint": {"every": every}, "wandb": {"mode": "disabled"}, **changed,
    }  # fmt: skip


def recipe(data: Path, /, **changed: Any) -> TrainRecipe:
    return config.from_dict(TrainRecipe, settings(data, **changed))


def write_recipe(path: Path, data: Path, /, **changed: Any) -> Path:
    path.write_text(yaml.safe_dump(settings(data, **changed)))
    return path


def weights(run: Path, step: int) -> dict[str, Tensor]:
    """Weights and averages of a checkpoint, by name."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    return {f"{kind}.{n}": t for kind in ("params", "ema") for n, t in load_weights(folder, kind).items()}  # type: ignore[arg-type]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether both are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
