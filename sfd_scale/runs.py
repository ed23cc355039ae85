"""A run folder, and the settings that a resumed run has to share with its checkpoints."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from sfd_scale import config
from sfd_scale.checkpoint import Checkpoint, whole_checkpoints
from sfd_scale.engines.optim import learning_rate
from sfd_scale.recipe import TrainRecipe
from sfd_scale.runtime import distributed, locks
from sfd_scale.runtime.files import write_atomically, write_json
from sfd_scale.runtime.run_paths import RECIPE, RunPaths, step_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFolder(RunPaths):
    """A run on disk: its paths, its recipe and its checkpoints. Every access reads the folder anew."""

    @property
    def recipe(self) -> TrainRecipe:
        """The resolved recipe.

        Raises:
            ValueError: if this is no run folder, or the recipe is not valid.
        """
        if not self.recipe_file.is_file():
            raise ValueError(f"{self.path}: not a run folder (no {RECIPE} in it)")
        return config.load(self.recipe_file, TrainRecipe)

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The whole checkpoints, oldest first."""
        return whole_checkpoints(self.checkpoints_folder)

    def checkpoint(self, step: int | None = None) -> Checkpoint:
        """The whole checkpoint of a step; the newest without one.

        Raises:
            ValueError: if there is none.
        """
        by_step = {checkpoint.step: checkpoint for checkpoint in self.checkpoints}
        if not by_step:
            raise ValueError(f"{self.path}: no whole checkpoint in it yet")
        if step is not None and step not in by_step:
            raise ValueError(f"--step: {step}; saved in {self.path}: {sorted(by_step)}")
        return by_step[max(by_step) if step is None else step]

    @property
    def in_use(self) -> bool:
        """Whether a job of another process trains in the folder now."""
        return locks.in_use(self.path)


def open_run(path: Path) -> tuple[RunFolder, Checkpoint | None]:
    """The run folder at `path`; or, for the folder of a checkpoint, its run and that checkpoint.

    Raises:
        ValueError: if it is neither.
    """
    is_step = step_of(path) is not None
    run = RunFolder(path.parent.parent if is_step else path)
    if not run.recipe_file.is_file():
        raise ValueError(f"{path}: neither a run folder nor a checkpoint of one (no {RECIPE})")
    return run, Checkpoint(path) if is_step else None


def begin(
    run: RunFolder, recipe: TrainRecipe, source: str | None, facts: Mapping[str, str], *, allow_foreign: bool
) -> None:
    """Write recipe.yaml and environment.json. Rank 0 writes; all ranks have to call it.

    Args:
        source: the name or file of the recipe, for readers of the folder.
        facts: what the run is, in words.

    Raises:
        ValueError: if the folder's checkpoints are of another recipe. Its files stay as they are.
    """
    if whole := run.checkpoints:
        check_recipe_matches(recipe, run, whole[-1].step, allow_foreign=allow_foreign)
    distributed.barrier()
    if distributed.is_main():
        write_atomically(run.recipe_file, config.with_source(config.to_yaml(recipe), source))
        write_json(run.environment_file, {**environment(), "run": facts})
    distributed.barrier()


def environment() -> dict[str, Any]:
    """Versions and machine. Environment variables are left out: they hold secrets."""
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


def decisive_settings(recipe: TrainRecipe) -> dict[str, Any]:
    """The settings that decide the loss curve. A resumed run has to keep them; it may change engine, micro-batch,
    logging, retention and paths."""
    return _decisive(config.to_dict(recipe))


def with_data_order(recipe: TrainRecipe, state: Mapping[str, Any] | None) -> TrainRecipe:
    """The recipe with its order of samples decided: that of the checkpoint's `state`, or `window` for a new run."""
    if recipe.data.order is not None:
        return recipe
    recorded = None if state is None else state.get("data")
    # Release 0.1 knew the order `blocks` alone, and recorded no name.
    order: Literal["blocks", "window"] = (
        "blocks" if isinstance(recorded, Mapping) and "order" not in recorded else "window"
    )
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, order=order))


def check_recipe_matches(recipe: TrainRecipe, run: RunFolder, step: int, *, allow_foreign: bool) -> None:
    """Compare the recipe with the recipe.yaml of a run that is at `step`, perhaps of an older release.

    A different `train.steps` matters only if it changes the learning rate at this step. A recipe.yaml that is lost or
    damaged stops no run: it is written anew, and the record in the checkpoint is compared (`check_checkpoint_matches`).

    Args:
        allow_foreign: log the differences as a warning instead of raising an error.

    Raises:
        ValueError: naming every setting that differs, with both values.
    """
    try:
        found = config.tree(run.recipe_file) if run.recipe_file.is_file() else {}
    except config.ConfigError as error:
        logger.warning("%s", error)
        found = {}
    if not found:
        logger.warning(
            "%s is missing, empty or damaged, and is written anew; the settings in the checkpoint are compared",
            run.recipe_file,
        )
        return
    written = config.with_defaults(TrainRecipe, found)
    own, stored = {"recipe": decisive_settings(recipe)}, {"recipe": _decisive(written)}
    before = config.flatten(written).get("train.steps")
    if isinstance(before, int) and step > 0 and own == stored:
        now, then = (learning_rate(1.0, recipe.lr, step, steps) for steps in (recipe.train.steps, before))
        if now != then:
            own["recipe"]["steps"], stored["recipe"]["steps"] = recipe.train.steps, before
    _refuse_differences(own, stored, run, allow_foreign)


def _decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    flat = config.flatten(settings)
    kept = {key: settings[key] for key in _DECISIVE if key in settings}
    return {**kept, **{name: flat.get(f"{part}.{name}") or None for name, part in _DECISIVE_PARTS.items()}}


def check_checkpoint_matches(
    own: Mapping[str, Any], state: Mapping[str, Any], run: RunFolder, *, allow_foreign: bool = False,
    allow_stats_mismatch: bool = False,
) -> None:  # fmt: skip
    """Compare the state of a checkpoint with `own`, the record that this run would save (`build.compatibility`).

    Args:
        allow_foreign: log the differences as a warning instead of raising an error.
        allow_stats_mismatch: the same for other statistics of the latents alone.

    Raises:
        ValueError: naming every setting that differs, with both values.
    """
    if allow_stats_mismatch and state.get("stats_hash") != own["stats_hash"]:
        logger.warning("statistics %s, in the checkpoint %s", own["stats_hash"], state.get("stats_hash"))
        own = {key: value for key, value in own.items() if key != "stats_hash"}
    stored = {key: state[key] for key in own if key in state}
    if isinstance(stored.get("recipe"), Mapping):
        filled = config.with_defaults(TrainRecipe, stored["recipe"])
        whole = {key: filled[key] for key in _DECISIVE if key in filled}
        # Older releases recorded only some of these. `check_recipe_matches` compares all of them.
        parts = {key: own["recipe"][key] for key in _DECISIVE_PARTS if key not in stored["recipe"]}
        stored["recipe"] = {**stored["recipe"], **parts, **whole}
    _refuse_differences(own, stored, run, allow_foreign)


def _refuse_differences(own: Mapping[str, Any], stored: Mapping[str, Any], run: RunFolder, allow_foreign: bool) -> None:
    """Compare nested plain data, with the defaults filled in."""
    different = config.differences(own, stored)
    if not different:
        return
    if different.keys() == {"stats_hash"} and not allow_foreign:
        raise ValueError(
            f"{run.path}: its checkpoints are of other latent statistics ({stored.get('stats_hash')}) than the data "
            f"({own.get('stats_hash')}); set data.stats to the statistics that the run began with, or "
            "data.allow_stats_mismatch=true"
        )
    listed = "; ".join(f"{n}: {now!r}, in the checkpoint {before!r}" for n, (now, before) in different.items())
    if not allow_foreign:
        raise ValueError(
            f"{run.path} holds a run of another recipe ({listed}); give another --run, or that recipe, or "
            "--allow-foreign to go on with this one"
        )
    logger.warning("%s goes on under another recipe: %s", run.path, listed)
