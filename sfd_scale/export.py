"""`sfd export`: the weights of a run as one safetensors file, with the settings that sampling needs."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sfd_scale import checkpoint as checkpoints
from sfd_scale import config
from sfd_scale.build import make_model
from sfd_scale.recipe import TrainRecipe
from sfd_scale.runs import open_run
from sfd_scale.runtime.weight_files import safetensors_metadata
from sfd_scale.training.data_record import DataRecord, codec_of, read_record, small_codec

logger = logging.getLogger(__name__)
TEXTURE = "texture.safetensors"  # the texture codec in a folder for the Hugging Face hub
EXPORT_KEY = "sfd"  # the metadata entry of an exported file that holds its note (`note_of`)


@dataclass(frozen=True, kw_only=True)
class WeightsChoice:
    """Which weights of a run to export."""

    weights: Literal["ema", "params"] = "ema"  # averaged, or raw
    step: int | None = None  # a saved step; None: the newest
    initial: bool = False  # the weights before training, drawn anew from the seed
    ema_length: float | None = None  # sigma_rel of a post-hoc average (arXiv 2312.02696)

    def __post_init__(self) -> None:
        if self.weights not in ("ema", "params"):
            raise ValueError(f"--weights: {self.weights!r}; allowed: ema, params")
        if self.ema_length is not None and (self.weights != "ema" or self.initial):
            raise ValueError("--ema-length: with --weights params or --initial; allowed with averaged weights only")


def export(source: Path, out: Path, choice: WeightsChoice | None = None) -> Path:
    """Write the weights of a run, with the settings that sampling needs, as one safetensors file.

    Args:
        source: a run folder, or the folder of one checkpoint.
        choice: the averaged weights of the newest step by default.

    Raises:
        ValueError: if the run lacks such weights.
    """
    choice = WeightsChoice() if choice is None else choice
    run, checkpoint = open_run(source)
    if checkpoint is not None and choice.step not in (None, checkpoint.step):
        raise ValueError(f"--step: {choice.step}, but {source} is one checkpoint; give the run folder")
    recipe = run.recipe
    record = read_record(run, recipe)
    codec = None if record is None else codec_of(run, recipe)
    if choice.initial:
        note = note_of(recipe, 0, record, codec)
        initial = {name: value.detach() for name, value in make_model(recipe).named_parameters()}
        return checkpoints.save_weights(initial, out, {EXPORT_KEY: json.dumps(note)})
    if choice.ema_length is not None:
        at = choice.step if checkpoint is None else checkpoint.step
        tensors, step, error = checkpoints.reconstruct(run, choice.ema_length, at)
        note = note_of(recipe, step, record, codec)
        note |= {"ema_length": choice.ema_length, "ema_fit_error": error}
        level = logging.WARNING if error > 0.05 else logging.INFO
        logger.log(
            level, "%s: post-hoc EMA with sigma_rel %g at step %d; relative error of its profile: %.2g", out,
            choice.ema_length, step, error,
        )  # fmt: skip
        return checkpoints.save_weights(tensors, out, {EXPORT_KEY: json.dumps(note), "weights": choice.weights})
    checkpoint = run.checkpoint(choice.step) if checkpoint is None else checkpoint
    state = checkpoint.state
    note = note_of(recipe, state["step"], record, codec)
    note |= {"loss_by_clock": state.get("loss_by_clock"), "weights": choice.weights}
    path = checkpoints.export_weights(checkpoint, out, choice.weights, {EXPORT_KEY: json.dumps(note)})
    logger.info("%s: %s weights of %s", path, choice.weights, checkpoint.path)
    return path


def note_of(
    recipe: TrainRecipe, step: int, record: DataRecord | None = None, codec: bytes | None = None
) -> dict[str, Any]:
    """The note of an exported file: recipe, step, and for sampling what is known of the data.

    Args:
        record: of the training data; None for a run that has no latents.
        codec: the file of a small texture codec; by default the one that the recipe names. With it the exported file
            alone is enough.
    """
    note = {"recipe": config.to_dict(recipe), "recipe_digest": config.digest(recipe), "step": step}
    if record is not None:
        note["stats"] = {"mean": record.stats.mean.tolist(), "std": record.stats.std.tolist()}
        note["stats_hash"], note["tokenizers"] = record.stats.hash, record.tokenizers
        note |= {"classes": list(record.classes)} if record.classes else {}
    codec = small_codec(recipe) if codec is None else codec
    if record is not None and codec is not None:
        note["texture_codec"] = base64.b64encode(codec).decode()
    return note


def read_note(path: Path) -> dict[str, Any]:
    """The note of an exported file (`note_of`).

    Raises:
        ValueError: if the file is not an export, or its note is damaged.
    """
    if not path.is_file():
        raise ValueError(f"{path}: not a file of `sfd export` (.safetensors)")
    metadata = safetensors_metadata(path)
    if EXPORT_KEY not in metadata:
        raise ValueError(f"{path}: it does not name its model; give a file of `sfd export` or `sfd import`")
    try:
        note = json.loads(metadata[EXPORT_KEY])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its note is damaged: {error}") from error
    require_note(note, path, {"recipe": dict})
    return note


def carried_codec(note: Mapping[str, Any], path: Path) -> bytes | None:
    """The file of the texture codec that an exported file carries; None if it carries none.

    Raises:
        ValueError: if the note is damaged.
    """
    if "texture_codec" not in note:
        return None
    try:
        return base64.b64decode(note["texture_codec"], validate=True)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: its note is damaged: texture_codec: {error}") from error


def require_note(note: Any, path: Path, needed: Mapping[str, type]) -> None:
    """Check the types of the entries of a note.

    Raises:
        ValueError: naming the entries that are missing or have another type.
    """
    wrong = [key for key, kind in needed.items() if not isinstance(note, dict) or not isinstance(note.get(key), kind)]
    if wrong:
        raise ValueError(f"{path}: its note is damaged: {', '.join(wrong)} missing or of another type")


if __name__ == "__main__":
    from sfd_scale.__main__ import main

    main("export")
