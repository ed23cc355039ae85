"""Import and export of checkpoints of the official code: weights to sample from, and runs to resume.

All weights and moments are converted. Anything that does not fit is an error.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sfd_scale import build, checkpoint, config, export, runs
from sfd_scale.checkpoint import Checkpoint, CheckpointManager
from sfd_scale.checkpoint.boxes import EXP_AVG_PART, EXP_AVG_SQ_PART, PARAMS_PART
from sfd_scale.checkpoint.official_checkpoint import (
    AdamMoments,
    Architecture,
    OfficialCheckpoint,
    check_weights,
    fixed_tables,
    infer_architecture,
    optimizer_state,
    read_moments,
    read_official,
    write_official,
)
from sfd_scale.data.dataloader import read_stats
from sfd_scale.diffusion.latents import LatentStats
from sfd_scale.engines import ema
from sfd_scale.engines.optim import AdamWConfig
from sfd_scale.models.lightningdit import LightningDiTConfig
from sfd_scale.recipe import TrainRecipe
from sfd_scale.runs import RunFolder
from sfd_scale.runtime.files import sha256
from sfd_scale.runtime.locks import folder_lock
from sfd_scale.runtime.weight_files import State
from sfd_scale.tasks import diffusion_task
from sfd_scale.tasks.diffusion import DiffusionTask
from sfd_scale.tokenizers.make import make_texture
from sfd_scale.training.data_record import DataRecord
from sfd_scale.training.divergence import DivergenceWatch

logger = logging.getLogger(__name__)
_HEAD = "repa_projector."


# --------------------------------------------------------------------------------------------------- in


def recipe_for(file: Path, name: str | None, overrides: Sequence[str]) -> TrainRecipe:
    """The training recipe `name`; without a name, `train/sfd_xl` with the model size of the file.

    Raises:
        ValueError: if the file's model has none of the known sizes.
    """
    if name is not None:
        return config.load(name, TrainRecipe, overrides)
    try:
        found = infer_architecture(read_official(file).weights).config
    except ValueError as error:
        raise ValueError(str(error) if str(file) in str(error) else f"{file}: {error}") from error
    if found.size is None:
        raise ValueError(f"{file}: depth, width, heads {tuple(found.dimensions)}: not a known size; name the recipe")
    shape = [f"model.size={found.size}", f"model.patch_size={found.patch_size}"]
    return config.load("train/sfd_xl", TrainRecipe, [*shape, f"model.num_classes={found.num_classes}", *overrides])


def import_weights(
    file: Path, out: Path, recipe: TrainRecipe, *, stats: Sequence[Path] = (), weights: Literal["ema", "params"] = "ema"
) -> Path:
    """Write one set of weights of an official file as a safetensors file, as `sfd export` does.

    Args:
        recipe: the recipe of the weights' training. If the file has no alignment head, it is dropped from the recipe.
        stats: latent statistics: the two official files (texture, semantic), or one .safetensors. By default those of
            the recipe's data. Without any, images cannot be drawn from the written file.
        weights: `ema`, from which the official code samples, or `params`, its `model`.

    Raises:
        ValueError: if the file or the texture codec cannot be read, or the file does not fit the recipe.
    """
    content = read_official(file)
    state = content.ema if weights == "ema" else content.model
    if state is None:
        raise ValueError(f"--weights: {weights}, but {file} holds none; allowed: {'ema' if content.ema else 'params'}")
    if not any(name.startswith(_HEAD) for name in state):
        recipe = _without_head(recipe)
    parameters = _fitted(content, state, recipe, file)
    found = _stats(stats, recipe)
    record = None
    if found is None:
        logger.warning("%s: no latent statistics (--stats), so images cannot be drawn from it", out)
    else:
        if recipe.tokenizer.texture is None:
            raise ValueError("tokenizer.texture: null; name the codec that decodes the latents of the file")
        codec = make_texture(recipe.tokenizer.texture, torch.device("cpu"))
        record = DataRecord(found, {"texture": codec.fingerprint})
    note = export.note_of(recipe, _step_of(file), record)
    origin = {"imported_from": file.name, "imported_sha256": sha256(file), "weights": weights}
    path = checkpoint.save_weights(parameters, out, {export.EXPORT_KEY: json.dumps(note), **origin})
    logger.info("%s: %s weights of %s", path, weights, file)
    return path


def import_run(file: Path, folder: Path, recipe: TrainRecipe, *, stats: Sequence[Path] = ()) -> Checkpoint:
    """Create a run folder that `sfd train` resumes, from the weights, moments, EMA and step of an official file.

    Args:
        stats: if given, the data of the recipe has to have these latent statistics.

    Raises:
        ValueError: if the file lacks something or does not fit, or the folder has a run already.
    """
    run = RunFolder(folder)
    if run.checkpoints:
        raise ValueError(f"--run: {run.path} has a run already; allowed: a new folder")
    if not isinstance(recipe.optimizer, AdamWConfig):
        raise ValueError(
            f"optimizer.kind: {recipe.optimizer.kind}; allowed: adamw, whose moments the official file holds. To start "
            "Muon from its weights, import them with --out and train with init_from.path"
        )
    if recipe.ema.lengths:
        raise ValueError(f"ema.lengths: {recipe.ema.lengths}; allowed: none, because official files hold one average")
    content = read_official(file, optimizer=True)
    moments = read_moments(content, str(file))
    if content.ema is None or content.model is None:
        raise ValueError(f"{file} holds no ema, which a resumed run needs")
    params, average = (_fitted(content, state, recipe, file) for state in (content.model, content.ema))
    reader = diffusion_task(recipe).latent_loader()
    wanted = _stats(stats, recipe) if stats else None
    if wanted is not None and wanted.hash != reader.stats.hash:
        raise ValueError(
            f"data.path: {recipe.data.path} has other statistics than --stats; set data.stats to those files, here and "
            "for training"
        )
    origin = {"imported_from": file.name, "imported_sha256": sha256(file)}
    with folder_lock(run.path):
        runs.begin(run, recipe, None, origin, allow_foreign=False)
        manager = CheckpointManager(run.checkpoints_folder, recipe.checkpoint)
        parts = {PARAMS_PART: params, ema.PART: average}
        parts |= {EXP_AVG_PART: moments.exp_avg, EXP_AVG_SQ_PART: moments.exp_avg_sq}
        watch = DivergenceWatch(recipe.divergence, run).state()
        state = {**build.compatibility(recipe, reader), "divergence": watch, "wandb_id": None, **origin}
        saved = manager.save_whole(moments.steps, parts, moments.steps, state)
    logger.info("%s: %s, with Adam's moments after %d updates", saved.path, file, moments.steps)
    return saved


def _fitted(content: OfficialCheckpoint, state: State, recipe: TrainRecipe, file: Path) -> State:
    """The parameters of a state in fp32, without the fixed tables.

    Raises:
        ValueError: if the state or the file's settings do not fit the recipe.
    """
    architecture = _architecture(recipe)
    official = (content.config or {}).get("model")
    pairs = {
        "schedule.delta_t": (recipe.schedule.delta_t, "semfirst_delta_t"),
        "latents.semantic_channels": (recipe.latents.semantic_channels, "semantic_chans"),
    }
    for key, (own, name) in pairs.items():
        if isinstance(official, Mapping) and name in official and official[name] != own:
            raise ValueError(f"{key}: {own}, but {file} was trained with {name} {official[name]}")
    try:
        check_weights(architecture, state, str(file))
    except ValueError as error:
        raise ValueError(f"{error}{_size_hint(state, architecture)}") from error
    with torch.device("meta"):
        names = [name for name, _ in architecture.build().named_parameters()]
    return {name: state[name].float().contiguous() for name in names}


def _size_hint(state: State, wanted: Architecture) -> str:
    try:
        found = infer_architecture(state).config
    except ValueError:
        return ""
    if found.dimensions == wanted.config.dimensions:
        return ""
    sizes = [c.size or f"of depth, width, heads {tuple(c.dimensions)}" for c in (found, wanted.config)]
    return f". The file's model is {sizes[0]}, the recipe's {sizes[1]}"


def _architecture(recipe: TrainRecipe) -> Architecture:
    layout, (_, model) = recipe.latents, _lightningdit(recipe)
    return Architecture(model, layout.channels, layout.size, not recipe.schedule.synchronous)


def _lightningdit(recipe: TrainRecipe) -> tuple[DiffusionTask, LightningDiTConfig]:
    """The task of a recipe, and its model, which the official code has.

    Raises:
        ValueError: for any other model.
    """
    task = diffusion_task(recipe)
    if not isinstance(task.model, LightningDiTConfig):
        raise ValueError(f"model.kind: {task.model.kind!r}; allowed: 'lightningdit', the model of the official code")
    if task.model.internal_depth is not None:
        raise ValueError(
            f"model.internal_depth: {task.model.internal_depth}; allowed: null, because the official model has no "
            "internal layer"
        )
    return task, task.model


def _without_head(recipe: TrainRecipe) -> TrainRecipe:
    task, model = _lightningdit(recipe)
    objective = dataclasses.replace(task.loss, alignment_weight=0.0)
    return dataclasses.replace(recipe, model=dataclasses.replace(model, alignment=None), objective=objective)


def _stats(paths: Sequence[Path], recipe: TrainRecipe) -> LatentStats | None:
    channels = recipe.latents.channels
    if len(paths) > 2:
        raise ValueError(f"--stats: {len(paths)} files; allowed: one .safetensors, or both official files")
    if len(paths) == 2:
        stats = LatentStats.from_official(paths[0], paths[1], recipe.latents)
    elif not paths and recipe.data.stats is not None:
        stats = read_stats(recipe.data.stats)
    else:
        path = paths[0] if paths else recipe.data.path / "stats.safetensors"
        if not path.is_file():
            if paths:
                raise ValueError(f"--stats: {path}; allowed: an existing file")
            return None
        if path.suffix != ".safetensors":
            raise ValueError(f"--stats: {path} alone; allowed: both official files, or one .safetensors")
        stats = LatentStats.load(path)
    if len(stats.mean) != channels:
        raise ValueError(f"--stats: {len(stats.mean)} channels; allowed: {channels}, those of latents (texture first)")
    return stats


def _step_of(file: Path) -> int:
    """The step in the name of an official file, such as 0400000.pt; 0 for any other name."""
    return int(file.stem) if re.fullmatch("[0-9]{1,18}", file.stem) else 0


# -------------------------------------------------------------------------------------------------- out


def export_official(source: Path, out: Path, step: int | None = None) -> Path:
    """Write a file for the official code: `ema` and `config`, and from a run also `model` and `opt`.

    Args:
        source: a run folder, the folder of one checkpoint, or a file of `sfd export`.
        step: a saved step of the run; the newest if None.

    Raises:
        ValueError: if its model is not a LightningDiT.
    """
    if source.suffix == ".safetensors":
        recipe = config.from_dict(TrainRecipe, export.read_note(source)["recipe"], str(source))
        names = _full(checkpoint.load_weights(source), recipe)
        write_official(out, ema=names, config=_official_config(recipe))
    else:
        run, saved = runs.open_run(source)
        recipe = run.recipe
        saved = run.checkpoint(step) if saved is None else saved
        average, params = (_full(saved.weights(name), recipe) for name in ("ema", "params"))
        opt = None
        if isinstance(recipe.optimizer, AdamWConfig):
            moments = AdamMoments(saved.weights("exp_avg"), saved.weights("exp_avg_sq"), saved.state["optimizer_steps"])
            opt = optimizer_state(params, moments, recipe.optimizer)
        else:
            logger.warning("%s: without opt, as the official code has no Muon; it cannot resume this run", out)
        write_official(out, ema=average, model=params, opt=opt, config=_official_config(recipe))
    logger.info("%s: in the format of the official code, from %s", out, source)
    return out


def _full(parameters: Mapping[str, Tensor], recipe: TrainRecipe) -> State:
    """Parameters and fixed tables, in the order of the model's state_dict."""
    architecture = _architecture(recipe)
    with torch.device("meta"):
        names = list(architecture.build().state_dict())
    tables = fixed_tables(architecture)
    return {name: tables[name] if name in tables else parameters[name] for name in names}


def _official_config(recipe: TrainRecipe) -> dict[str, Any]:
    """The settings of the model and of its loss under their official names, and the whole recipe."""
    task, model = _lightningdit(recipe)
    objective = task.loss
    named = {
        "model_type": f"LightningDiT-{'1p0B' if model.size == 'XXL' else model.size}/{model.patch_size}",
        "in_chans": recipe.latents.channels,
        "semantic_chans": recipe.latents.semantic_channels,
        "semfirst_delta_t": recipe.schedule.delta_t,
        "semantic_weight": objective.semantic_weight,
        "use_qknorm": model.qk_norm,
        "use_swiglu": model.mlp == "swiglu",
        "use_rope": model.rope,
        "use_rmsnorm": model.norm == "rmsnorm",
        "wo_shift": not model.shift,
        "use_repa": model.alignment is not None,
        "repa_weight": objective.alignment_weight,
        "repa_mode": objective.alignment_mode,
    }
    if model.alignment is not None:
        named["repa_feat_depth"] = model.alignment.depth
    return {"model": named, "sfd_scale": config.to_dict(recipe)}


if __name__ == "__main__":
    from sfd_scale.__main__ import main

    main("import")
