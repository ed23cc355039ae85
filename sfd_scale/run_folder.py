"""What a run folder says of its run: the recipe, and the machine and packages that it runs on."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sfd_scale import config, distributed
from sfd_scale.checkpoint import committed
from sfd_scale.checkpoint.folder import step_of
from sfd_scale.files import write_atomically, write_json
from sfd_scale.identity import check_recipe
from sfd_scale.recipe import TrainRecipe


def claim(run: Path, recipe: TrainRecipe, source: str | None, facts: Mapping[str, str], allow_foreign: bool) -> None:
    """Write what runs in the run folder, and where. Rank 0 writes.

    Raises:
        ValueError: if its checkpoints are of another recipe, whose files are left as they are.
    """
    if whole := committed(run / "checkpoints"):
        check_recipe(recipe, run, step_of(whole[-1]) or 0, allow_foreign=allow_foreign)
    distributed.barrier()
    if distributed.is_main():
        write_atomically(run / "recipe.yaml", config.with_source(config.to_yaml(recipe), source))
        write_json(run / "environment.json", {**environment(), "run": facts})
    distributed.barrier()


def environment() -> dict[str, Any]:
    """Versions and machine; no environment variables, which hold secrets."""
    packages = ("sfd-scale", "torch", "deepspeed", "mosaicml-streaming", "numpy", "wandb", "torch-fidelity")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "world_size": distributed.world_size(),
        "device": str(distributed.device()),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": {name: importlib.metadata.version(name) for name in packages},
    }
