"""`sfd sample`: draw images from an exported file."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfd_scale import checkpoint, config
from sfd_scale.diffusion.conditioning import Conditioning
from sfd_scale.diffusion.fixed_step import FixedStepConfig
from sfd_scale.diffusion.guidance import NoGuidance, guided
from sfd_scale.diffusion.latents import LatentLayout, LatentStats
from sfd_scale.diffusion.sampler import Sampler
from sfd_scale.diffusion.schedule import SemanticFirstSchedule
from sfd_scale.export import TEXTURE, read_note, require_note
from sfd_scale.recipe import TrainRecipe
from sfd_scale.runtime import distributed
from sfd_scale.tasks import diffusion_task
from sfd_scale.tasks.diffusion import DiffusionModel, DiffusionTask
from sfd_scale.tokenizers.make import TextureConfig, make_texture

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A trained model, with the codec, statistics and schedule that turn its latents into images."""

    model: DiffusionModel
    layout: LatentLayout
    schedule: SemanticFirstSchedule
    stats: LatentStats
    decode: Callable[[Tensor], Tensor]
    conditioning: Conditioning
    null_trained: bool  # whether training dropped conditions; classifier-free guidance needs it
    provenance: dict[str, Any]


def load_for_sampling(path: Path, device: torch.device) -> Loaded:
    """The model of an exported file, in eval mode, with the texture codec of its data.

    Raises:
        ValueError: if the file is not an export of a diffusion run, or its data was encoded with another codec.
    """
    note = read_note(path)
    recipe = config.from_dict(TrainRecipe, note["recipe"], str(path))
    try:
        task = diffusion_task(recipe)
    except ValueError as error:
        raise ValueError(f"{path}: images cannot be drawn from it: {error}") from error
    if "stats" not in note:
        raise ValueError(f"{path}: it has no latent statistics; import it again with --stats")
    require_note(note, path, {"recipe_digest": str, "step": int, "stats": dict, "stats_hash": str, "tokenizers": dict})
    if recipe.tokenizer.texture is None:
        raise ValueError(f"{path}: its recipe has no tokenizer.texture, which decodes latents to images")
    weights = checkpoint.load_weights(path)
    _check_size(path, task, sum(weight.numel() for weight in weights.values()))
    model = task.make_model()
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{path}: its weights do not fit the model and latents of its recipe: {error}") from error
    missing = [name for name in missing if name not in dict(model.named_buffers())]
    if missing or unexpected:
        raise ValueError(f"{path}: missing weights {missing}, unexpected {unexpected}")
    texture = make_texture(_codec_beside(path, recipe.tokenizer.texture), device)
    if texture.fingerprint not in note["tokenizers"].values():
        raise ValueError(
            f"{path}: tokenizer.texture: {texture.fingerprint}, but the training data was encoded with "
            f"{note['tokenizers']}; give the run that tokenizer.texture, start it once more, which trains no further "
            "step, and export again"
        )
    stats = LatentStats(*(torch.tensor(note["stats"][key], dtype=torch.float64) for key in ("mean", "std")))

    def decode(latents: Tensor) -> Tensor:
        return texture.decode(recipe.latents.split(latents)[0])

    return Loaded(
        model.to(device).eval(), recipe.latents, recipe.schedule, stats, decode, task.model.conditioning,
        task.loss.label_dropout > 0,
        {key: note[key] for key in ("recipe_digest", "step", "stats_hash")} | {"name": recipe.name},
    )  # fmt: skip


def _check_size(path: Path, task: DiffusionTask, stored: int) -> None:
    """Refuse a recipe whose model is larger than the weights in the file, before it takes memory.

    Raises:
        ValueError: names the file.
    """
    with torch.device("meta"):
        wanted = sum(parameter.numel() for parameter in task.make_model().parameters() if parameter.requires_grad)
    if wanted > stored:
        raise ValueError(
            f"{path}: its weights do not fit the model and latents of its recipe: missing weights, {stored:,} values "
            f"of {wanted:,}"
        )


def _codec_beside(path: Path, texture: TextureConfig) -> TextureConfig:
    """The texture codec; the copy beside the exported file if this machine lacks the file that the recipe names."""
    beside = path.with_name(TEXTURE)
    missing = texture.weights is not None and not texture.weights.exists() and beside.is_file()
    return dataclasses.replace(texture, weights=beside) if missing else texture


def sample_grid(checkpoint_file: Path, out: Path, *, count: int, label: int | None, steps: int, seed: int) -> Path:
    """Draw a PNG grid of images with the Euler sampler, without guidance.

    Args:
        label: one class; all classes in turn if None.
        steps: Euler steps.
    """
    device = distributed.device()
    loaded = load_for_sampling(checkpoint_file, device)
    labels = loaded.conditioning.in_turn(count) if label is None else torch.full((count,), label)
    loaded.conditioning.check(labels, "--label")
    velocity = guided(loaded.model, NoGuidance(), loaded.layout)
    sampler = Sampler(
        velocity, loaded.layout, loaded.schedule, FixedStepConfig(num_steps=steps), loaded.stats, loaded.decode,
        seed, count, device,
    )  # fmt: skip
    images = sampler.images(range(count), labels).images
    from torchvision.utils import save_image  # a slow import: it loads the compiler

    out.parent.mkdir(parents=True, exist_ok=True)
    save_image(images.float() / 255, str(out), nrow=math.isqrt(count - 1) + 1)
    logger.info("%s: %d images", out, count)
    return out


if __name__ == "__main__":
    from sfd_scale.__main__ import main

    main("sample")
