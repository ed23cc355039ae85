"""What a checkpoint and the run that goes on from it share: the settings that decide the loss curve, and the data."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfd_scale import config
from sfd_scale.recipe import TrainRecipe

logger = logging.getLogger(__name__)
_DECISIVE = ("seed", "model", "objective", "latents", "schedule", "optimizer", "lr", "ema")


def trajectory(recipe: TrainRecipe) -> dict[str, Any]:
    """The settings that decide the loss curve, which a resumed run may not change. Engine, portions, logging,
    retention and where things are may change."""
    return _decisive(config.to_dict(recipe))


def written_trajectory(path: Path) -> dict[str, Any]:
    """That of a run's recipe.yaml, which another release may have written.

    Raises:
        ConfigError: if the file cannot be read.
    """
    return _decisive(config.with_defaults(TrainRecipe, config.tree(path)))


def _decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    flat = config.flatten(settings)
    kept = {key: settings[key] for key in _DECISIVE if key in settings}
    return {**kept, "global_batch": flat.get("train.global_batch"), "precision": flat.get("engine.precision")}


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
        stored["recipe"] = {**stored["recipe"], **{key: filled[key] for key in _DECISIVE if key in filled}}
    check_same(own, stored, run, allow_foreign)


def check_same(own: Mapping[str, Any], stored: Mapping[str, Any], run: Path, allow_foreign: bool) -> None:
    """Compare nested plain data, defaults filled in; see `check_state`."""
    flat_own, flat_stored = config.flatten(own), config.flatten(stored)
    names = sorted({*flat_own, *flat_stored})
    different = [n for n in names if n not in flat_own or n not in flat_stored or flat_own[n] != flat_stored[n]]
    if not different:
        return
    listed = "; ".join(f"{n}: {flat_own.get(n)!r}, in the checkpoint {flat_stored.get(n)!r}" for n in different)
    if not allow_foreign:
        raise ValueError(
            f"{run} holds a run of another recipe ({listed}); give another --run, or that recipe, or "
            "--allow-foreign to go on with this one"
        )
    logger.warning("%s goes on under another recipe: %s", run, listed)
