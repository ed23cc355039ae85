"""A run folder: what it says of its run, and what a run that resumes from its checkpoints has to share with them."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sfd_scale import config
from sfd_scale.checkpoint import committed
from sfd_scale.checkpoint.folder import step_of
from sfd_scale.engines.optim import learning_rate
from sfd_scale.recipe import TrainRecipe
from sfd_scale.runtime import distributed
from sfd_scale.runtime.files import write_atomically, write_json

logger = logging.getLogger(__name__)


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


# ------------------------------------------------------------------------------------------ compatibility

_DECISIVE = ("seed", "model", "objective", "latents", "schedule", "optimizer", "lr", "ema")
_DECISIVE_PARTS = {"global_batch": "train", "precision": "engine", "grad_clip": "engine", "float8": "engine"}


def trajectory(recipe: TrainRecipe) -> dict[str, Any]:
    """The settings that decide the loss curve, which a resumed run may not change. Engine, portions, logging,
    retention and where things are may change."""
    return _decisive(config.to_dict(recipe))


def check_recipe(recipe: TrainRecipe, run: Path, step: int, *, allow_foreign: bool) -> None:
    """Compare with the recipe.yaml of a run, perhaps of another release, that has come to `step`.

    Other `train.steps` are those of another recipe where the learning rate at this step would be another, too.

    Raises:
        ValueError: naming every setting that differs, with both values; or if the file cannot be read.
    """
    written = config.with_defaults(TrainRecipe, config.tree(run / "recipe.yaml"))
    own, stored = {"recipe": trajectory(recipe)}, {"recipe": _decisive(written)}
    before = config.flatten(written).get("train.steps")
    if isinstance(before, int) and step > 0 and own == stored:
        now, then = (learning_rate(1.0, recipe.lr, step, steps) for steps in (recipe.train.steps, before))
        if now != then:
            own["recipe"]["steps"], stored["recipe"]["steps"] = recipe.train.steps, before
    check_same(own, stored, run, allow_foreign)


def _decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    flat = config.flatten(settings)
    kept = {key: settings[key] for key in _DECISIVE if key in settings}
    return {**kept, **{name: flat.get(f"{part}.{name}") or None for name, part in _DECISIVE_PARTS.items()}}


def check_state(
    own: Mapping[str, Any], state: Mapping[str, Any], run: Path, *, allow_foreign: bool = False, any_stats: bool = False
) -> None:
    """Compare what a checkpoint records with `own`, what it would record now.

    Args:
        allow_foreign: warn, and name the differences, in place of the error.
        any_stats: other statistics of the latents are a warning too.

    Raises:
        ValueError: naming every setting that differs, with both values.
    """
    if any_stats and state.get("stats_hash") != own["stats_hash"]:
        logger.warning("statistics %s, in the checkpoint %s", own["stats_hash"], state.get("stats_hash"))
        own = {key: value for key, value in own.items() if key != "stats_hash"}
    stored = {key: state[key] for key in own if key in state}
    if isinstance(stored.get("recipe"), Mapping):
        filled = config.with_defaults(TrainRecipe, stored["recipe"])
        whole = {key: filled[key] for key in _DECISIVE if key in filled}
        # Of these an older release has recorded some; its recipe.yaml has all.
        parts = {key: own["recipe"][key] for key in _DECISIVE_PARTS if key not in stored["recipe"]}
        stored["recipe"] = {**stored["recipe"], **parts, **whole}
    check_same(own, stored, run, allow_foreign)


def check_same(own: Mapping[str, Any], stored: Mapping[str, Any], run: Path, allow_foreign: bool) -> None:
    """Compare nested plain data, defaults filled in; see `check_state`."""
    different = config.differences(own, stored)
    if not different:
        return
    if different.keys() == {"stats_hash"} and not allow_foreign:
        raise ValueError(
            f"{run}: its checkpoints are of other statistics of the latents ({stored.get('stats_hash')}) than these "
            f"({own.get('stats_hash')}); give the data.stats that it was begun with, or data.allow_stats_mismatch=true"
        )
    listed = "; ".join(f"{n}: {now!r}, in the checkpoint {before!r}" for n, (now, before) in different.items())
    if not allow_foreign:
        raise ValueError(
            f"{run} holds a run of another recipe ({listed}); give another --run, or that recipe, or "
            "--allow-foreign to go on with this one"
        )
    logger.warning("%s goes on under another recipe: %s", run, listed)
