"""`sfd replicate`: train one recipe with several seeds, each as a normal run folder, and evaluate each on request."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from eval.recipe import EvalRecipe
from eval.watch import watch
from sfd_scale import train
from sfd_scale.recipe import TrainRecipe
from sfd_scale.runtime import distributed
from sfd_scale.runtime.chunks import Claims
from sfd_scale.runtime.seeds import SEED_PARTS

logger = logging.getLogger(__name__)


def parse_vary(text: str) -> tuple[str, ...]:
    """The parts of the seed that vary, from a list such as `init,noise`, in the order of the recipe.

    Raises:
        ValueError: for another word.
    """
    words = [word.strip() for word in text.split(",")]
    if unknown := [word for word in words if word not in SEED_PARTS]:
        raise ValueError(f"--vary: {unknown[0]!r}; allowed: one or more of {', '.join(SEED_PARTS)}, with commas")
    return tuple(part for part in SEED_PARTS if part in words)


def replicates(recipe: TrainRecipe, count: int, vary: Sequence[str] = SEED_PARTS) -> list[TrainRecipe]:
    """The recipe with `count` seeds, ascending from its own in the parts of `vary`.

    The folder and the name of each end in its seeds, such as sfd.seed3 or sfd.init3-data0-noise0. So the first
    replicate of every `vary` is one and the same folder.
    """
    found = []
    for number in range(count):
        seeds = dataclasses.replace(recipe.seeds, **{part: getattr(recipe.seeds, part) + number for part in vary})
        run = recipe.run.with_name(f"{recipe.run.name}.{seeds.name}")
        found.append(dataclasses.replace(recipe, seed=seeds, run=run, name=f"{recipe.name}.{seeds.name}"))
    return found


def replicate(todo: Sequence[TrainRecipe], evaluation: EvalRecipe | None = None, source: str | None = None) -> bool:
    """Train each recipe in its run folder, and evaluate its checkpoints there. The same call resumes.

    Several processes may do the same at once: they share the replicates. All ranks of one process group train together.

    Args:
        evaluation: scores every checkpoint into evaluations/ of the run folder.
        source: the name or file of the recipe, for readers of the run folders.

    Returns:
        False after a request to stop.

    Raises:
        ValueError: if a folder holds a run of another recipe, see `train.train`.
    """
    distributed.init(todo[0].train.timeout_s)
    with Claims(_claims_folder(todo[0].run)) as claims:
        for number, recipe in enumerate(todo, start=1):
            mine = distributed.broadcast_object(claims.take(recipe.run.name) if distributed.is_main() else None)
            if not mine:
                logger.info("replicate %d of %d, %s: another process does it", number, len(todo), recipe.run)
                continue
            logger.info("replicate %d of %d: %s", number, len(todo), recipe.run)
            if not train.train(recipe, recipe.run, source=source):
                return False
            if evaluation is not None:
                watch(evaluation, recipe.run, once=True)
    return True


def _claims_folder(run: Path) -> Path:
    """Hidden, so that no pattern such as sfd.* finds it."""
    return run.with_name(f".{run.name.partition('.')[0]}.claims")
