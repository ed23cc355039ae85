"""What a checkpoint and the run that goes on from it share: the settings that decide the loss curve, and the data."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfd_scale import config
from sfd_scale.optim import learning_rate
from sfd_scale.recipe import TrainRecipe

logger = logging.getLogger(__name__)
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
