"""A run's weights as one file, and that file as a model that draws images."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sfd_scale import checkpoint, config
from sfd_scale.build import make_model, make_reader
from sfd_scale.data.dataloader import LatentLoader
from sfd_scale.diffusion.latents import LatentStats
from sfd_scale.recipe import TrainRecipe
from sfd_scale.runtime.batch_split import split_batch
from sfd_scale.training.objective import SemanticFirstConfig

logger = logging.getLogger(__name__)
TEXTURE = "texture.safetensors"  # the texture codec's weights in a folder for the hub
EXPORT_KEY = "sfd"  # the metadata entry of an exported file that holds all that sampling needs to know


def export(
    run: Path, out: Path, *, weights: str = "ema", step: int | None = None, initial: bool = False,
    ema_length: float | None = None,
) -> Path:  # fmt: skip
    """Write the weights of a run, with the settings that sampling needs, as one safetensors file.

    Args:
        run: a run folder, or one checkpoint folder of it.
        step: a saved step; the newest if None.
        initial: the weights before training, drawn anew from the seed.
        ema_length: sigma_rel of the average, made from the power-function averages that the run kept.
    """
    if ema_length is not None and (weights != "ema" or initial):
        raise ValueError("--ema-length: with --weights params or --initial; allowed with averaged weights only")
    if weights not in ("ema", "params"):
        raise ValueError(f"--weights: {weights!r}; allowed: ema, params")
    folder, recipe = run_of(run)
    reader = latent_reader(recipe)
    stats, tokenizers = (None, None) if reader is None else (reader.stats, reader.manifest.tokenizers)
    if initial:
        note = note_of(recipe, 0, stats, tokenizers)
        weights_now = {name: value.detach() for name, value in make_model(recipe).named_parameters()}
        return checkpoint.save_weights(weights_now, out, {EXPORT_KEY: json.dumps(note)})
    if ema_length is not None:
        at = checkpoint.read_state(run)["step"] if run != folder else step
        tensors, averaged, error = checkpoint.reconstruct(folder, ema_length, at)
        note = note_of(recipe, averaged, stats, tokenizers)
        note["ema_length"], note["ema_fit_error"] = ema_length, error
        text = "%s: averaged with sigma_rel %g at step %d; its profile is met to within %.2g"
        logger.log(logging.WARNING if error > 0.05 else logging.INFO, text, out, ema_length, averaged, error)
        return checkpoint.save_weights(tensors, out, {EXPORT_KEY: json.dumps(note), "weights": weights})
    found = checkpoint_of(run, folder, step)
    state = checkpoint.read_state(found)
    note = note_of(recipe, state["step"], stats, tokenizers) | {"loss_by_clock": state.get("loss_by_clock")}
    note["weights"] = weights
    path = checkpoint.export_weights(
        found, out, "ema" if weights == "ema" else "params", {EXPORT_KEY: json.dumps(note)}
    )
    logger.info("%s: %s weights of %s", path, weights, found)
    return path


def run_of(path: Path) -> tuple[Path, TrainRecipe]:
    """The run folder that `path` is, or is a checkpoint of, and its recipe.

    Raises:
        ValueError: if it is neither.
    """
    folder = path.parent.parent if path.name.startswith("step-") else path
    if not (folder / "recipe.yaml").is_file():
        raise ValueError(f"{path}: neither a run folder nor a checkpoint of one (no recipe.yaml)")
    return folder, config.load(folder / "recipe.yaml", TrainRecipe)


def latent_reader(recipe: TrainRecipe) -> LatentLoader | None:
    """The reader of a diffusion run's data; None for other runs."""
    if not isinstance(recipe.objective, SemanticFirstConfig):
        return None
    reader = make_reader(recipe, split_batch(recipe.train.global_batch, None, 1))
    assert isinstance(reader, LatentLoader)
    return reader


def note_of(
    recipe: TrainRecipe, step: int, stats: LatentStats | None = None, tokenizers: dict[str, str] | None = None
) -> dict[str, Any]:
    """What an exported file says of itself under EXPORT_KEY; sampling needs stats and tokenizers."""
    note = {"recipe": config.to_dict(recipe), "recipe_digest": config.digest(recipe), "step": step}
    if stats is not None:
        note["stats"] = {"mean": stats.mean.tolist(), "std": stats.std.tolist()}
        note["stats_hash"], note["tokenizers"] = stats.hash, tokenizers
    return note


def checkpoint_of(run: Path, folder: Path, step: int | None) -> Path:
    """`run`, if it is a checkpoint; else the checkpoint of that step, or the newest of the run folder."""
    if run != folder:
        return run
    by_step = {checkpoint.read_state(path)["step"]: path for path in checkpoint.committed(folder / "checkpoints")}
    if not by_step:
        raise ValueError(f"{folder}: no whole checkpoint in it yet")
    if step is not None and step not in by_step:
        raise ValueError(f"--step: {step}; saved in {folder}: {sorted(by_step)}")
    return by_step[max(by_step) if step is None else step]


def read_note(path: Path) -> dict[str, Any]:
    """What an exported file says of itself (`note_of`).

    Raises:
        ValueError: if it is no such file.
    """
    if not path.is_file() or path.suffix != ".safetensors":
        raise ValueError(f"{path}: no such file of `sfd export` (.safetensors)")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged, or not a safetensors file: {error}") from error
    if EXPORT_KEY not in metadata:
        raise ValueError(
            f"{path}: written neither by `sfd export` nor by `sfd import`: it says nothing of the model it belongs to"
        )
    try:
        note = json.loads(metadata[EXPORT_KEY])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its note on the run is damaged: {error}") from error
    require_note(note, path, {"recipe": dict})
    return note


def require_note(note: Any, path: Path, needed: Mapping[str, type]) -> None:
    wrong = [key for key, kind in needed.items() if not isinstance(note, dict) or not isinstance(note.get(key), kind)]
    if wrong:
        raise ValueError(f"{path}: its note on the run is damaged: {', '.join(wrong)} missing or of another type")
