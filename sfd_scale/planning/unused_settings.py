"""The settings of a training recipe that cannot have their effect, because the run is too short for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sfd_scale.recipe import TrainRecipe


def unused_settings(recipe: TrainRecipe, step: int = 0) -> list[str]:
    """A sentence for each setting that needs more steps than the run has.

    Args:
        step: of the checkpoint from which the run goes on; 0 for a new run.
    """
    steps, lr = recipe.train.steps, recipe.lr
    end = f"train.steps is {steps}"
    found = []
    if step > steps:
        found.append(f"train.steps: {steps}, but the run is at step {step}; there is nothing to train")
    if lr.warmup_steps > steps:
        found.append(f"lr.warmup_steps: {lr.warmup_steps}, but {end}; the learning rate does not reach optimizer.lr")
    elif lr.kind != "constant" and lr.warmup_steps == steps:
        found.append(f"lr.kind: {lr.kind}, but {end}, and all of them are warm-up; the learning rate does not fall")
    elif lr.decay_steps is not None and lr.warmup_steps + lr.decay_steps >= steps:
        found.append(
            f"lr.decay_steps: {lr.decay_steps} after {lr.warmup_steps} steps of warm-up, but {end}; the stable part is "
            "missing"
        )
    if recipe.profile.steps is not None and recipe.profile.window.start >= steps:
        found.append(f"profile.steps: {recipe.profile.steps}, but {end}; no step is profiled (the first one is 0)")
    every = {
        "ema.snapshot_every": recipe.ema.snapshot_every,
        "checkpoint.keep_every": recipe.checkpoint.keep_every,
        "train.replica_check_every": recipe.train.replica_check_every,
    }
    found += [f"{key}: {value}, but {end}; it never comes" for key, value in every.items() if (value or 0) > steps]
    return found
