"""A run's weights as one file, and that file as a model that draws images."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sfd_scale import checkpoint, config, distributed
from sfd_scale.build import bare_model, make_model, make_reader
from sfd_scale.data.reader import LatentReader
from sfd_scale.diffusion.guidance import NoGuidance, guided
from sfd_scale.diffusion.samplers import EulerConfig
from sfd_scale.diffusion.schedule import SemanticFirstSchedule
from sfd_scale.latents import LatentLayout, LatentStats
from sfd_scale.models.lightningdit import LightningDiT, LightningDiTConfig
from sfd_scale.objective import SemanticFirstConfig
from sfd_scale.portions import portions
from sfd_scale.recipe import TrainRecipe
from sfd_scale.sample import Sampler
from sfd_scale.tokenizers.config import TextureConfig, make_texture

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
    path = checkpoint.export(found, out, "ema" if weights == "ema" else "params", {EXPORT_KEY: json.dumps(note)})
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


def latent_reader(recipe: TrainRecipe) -> LatentReader | None:
    """The reader of a diffusion run's data; None for other runs."""
    if not isinstance(recipe.objective, SemanticFirstConfig):
        return None
    reader = make_reader(recipe, portions(recipe.train.global_batch, None, 1))
    assert isinstance(reader, LatentReader)
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


@dataclass(frozen=True)
class Loaded:
    """A trained model with all that turns its latents into images."""

    model: LightningDiT
    layout: LatentLayout
    schedule: SemanticFirstSchedule
    stats: LatentStats
    decode: Callable[[Tensor], Tensor]
    num_classes: int
    null_label: int | None  # the label of no class; None for a model that was never trained on it
    provenance: dict[str, Any]


def load_for_sampling(path: Path, device: torch.device) -> Loaded:
    """The model of an exported file in eval mode, and the texture codec that its data was made with.

    Raises:
        ValueError: if the file is not an export of a diffusion run, or the codec is not the one of its data.
    """
    note = read_note(path)
    recipe = config.from_dict(TrainRecipe, note["recipe"], str(path))
    if not isinstance(recipe.model, LightningDiTConfig):
        raise ValueError(f"{path}: an export of {recipe.model.kind!r}; images are drawn from a 'lightningdit'")
    if "stats" not in note:
        raise ValueError(f"{path}: without the statistics of its latents; import it again with --stats")
    _require(note, path, {"recipe_digest": str, "step": int, "stats": dict, "stats_hash": str, "tokenizers": dict})
    if recipe.tokenizer.texture is None:
        raise ValueError(f"{path}: its recipe names no tokenizer.texture, which decodes latents to images")
    model = bare_model(recipe.model, recipe.latents, recipe.schedule)
    weights = checkpoint.load_weights(path)
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{path}: its weights do not fit its recipe's model and latents: {error}") from error
    missing = [name for name in missing if name not in dict(model.named_buffers())]
    if missing or unexpected:
        raise ValueError(f"{path}: missing weights {missing}, unexpected {unexpected}")
    texture = make_texture(_codec_beside(path, recipe.tokenizer.texture), device)
    if texture.identity not in note["tokenizers"].values():
        raise ValueError(
            f"{path}: trained on latents of {note['tokenizers']}, but its tokenizer.texture is {texture.identity}; "
            "start the run again with the tokenizer.texture that the data was encoded with (it has nothing left to "
            "train), and export again"
        )
    dropped = isinstance(recipe.objective, SemanticFirstConfig) and recipe.objective.label_dropout > 0
    stats = LatentStats(*(torch.tensor(note["stats"][key], dtype=torch.float64) for key in ("mean", "std")))

    def decode(latents: Tensor) -> Tensor:
        return texture.decode(recipe.latents.split(latents)[0])

    return Loaded(
        model.to(device).eval(), recipe.latents, recipe.schedule, stats, decode, recipe.model.num_classes,
        recipe.model.num_classes if dropped else None,
        {key: note[key] for key in ("recipe_digest", "step", "stats_hash")} | {"name": recipe.name},
    )  # fmt: skip


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
    _require(note, path, {"recipe": dict})
    return note


def _codec_beside(path: Path, texture: TextureConfig) -> TextureConfig:
    """The codec of a folder for the hub, where the file that the recipe names is not on this machine. Its identity is
    checked like any other's."""
    beside = path.with_name(TEXTURE)
    missing = texture.weights is not None and not texture.weights.exists() and beside.is_file()
    return dataclasses.replace(texture, weights=beside) if missing else texture


def _require(note: Any, path: Path, needed: Mapping[str, type]) -> None:
    wrong = [key for key, kind in needed.items() if not isinstance(note, dict) or not isinstance(note.get(key), kind)]
    if wrong:
        raise ValueError(f"{path}: its note on the run is damaged: {', '.join(wrong)} missing or of another type")


def sample_grid(checkpoint_file: Path, out: Path, *, count: int, label: int | None, steps: int, seed: int) -> Path:
    """Draw images by Euler's method without guidance, the classes in turn or one of them, as a PNG grid."""
    device = distributed.device()
    loaded = load_for_sampling(checkpoint_file, device)
    if label is not None and not 0 <= label < loaded.num_classes:
        raise ValueError(f"--label: {label}; allowed: 0 to {loaded.num_classes - 1}")
    velocity = guided(loaded.model, NoGuidance(), loaded.layout)
    sampler = Sampler(
        velocity, loaded.layout, loaded.schedule, EulerConfig(num_steps=steps), loaded.stats, loaded.decode,
        seed, count, device,
    )  # fmt: skip
    labels = torch.arange(count) % loaded.num_classes if label is None else torch.full((count,), label)
    images = sampler.images(range(count), labels).images
    from torchvision.utils import save_image  # it imports the compiler, which takes seconds

    out.parent.mkdir(parents=True, exist_ok=True)
    save_image(images.float() / 255, str(out), nrow=math.isqrt(count - 1) + 1)
    logger.info("%s: %d images", out, count)
    return out
