"""The record of the training data in a run folder. With it a run is exported and sampled when its data is gone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sfd_scale.data.dataloader import LatentLoader
from sfd_scale.diffusion.latents import LatentStats
from sfd_scale.runtime import distributed
from sfd_scale.runtime.files import read_json, write_atomically, write_json
from sfd_scale.runtime.run_paths import RunPaths

if TYPE_CHECKING:
    from sfd_scale.recipe import TrainRecipe
    from sfd_scale.tasks.task import Loader

MAX_CODEC_BYTES = 4 << 20  # a larger texture codec, such as SD-VAE, is not copied


@dataclass(frozen=True)
class DataRecord:
    """The latent statistics of the training data, the fingerprints of its tokenizers, and its class names if known."""

    stats: LatentStats
    tokenizers: dict[str, str]
    classes: tuple[str, ...] = ()


def write_record(run: RunPaths, recipe: TrainRecipe, loader: Loader) -> None:
    """Keep what sampling needs of the data: data.json, and a copy of a small texture codec. Rank 0 writes."""
    if not distributed.is_main() or not isinstance(loader, LatentLoader):
        return
    stats = {"mean": loader.stats.mean.tolist(), "std": loader.stats.std.tolist()}
    manifest = loader.manifest
    data = {"tokenizers": manifest.tokenizers, "stats": stats}
    write_json(run.data_file, {**data, **({"classes": manifest.classes} if manifest.classes else {})})
    codec = small_codec(recipe)
    if codec is not None:
        write_atomically(run.texture_file, codec)


def read_record(run: RunPaths, recipe: TrainRecipe) -> DataRecord | None:
    """The record of a run, or of its data if an older release began it; None for a run that has no latents.

    Raises:
        ValueError: if there is neither, or the record is damaged.
    """
    if run.data_file.is_file():
        found = read_json(run.data_file)
        try:
            mean, std = (torch.tensor(found["stats"][key], dtype=torch.float64) for key in ("mean", "std"))
            classes = tuple(map(str, found.get("classes", ())))
            return DataRecord(LatentStats(mean, std), dict(found["tokenizers"]), classes)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{run.data_file}: damaged ({error!r}); start the run once more to write it anew"
            ) from error
    try:
        loader = recipe.task.latent_loader()
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{run.path}: it has no {run.data_file.name}, because an older release began it, so its data is needed for "
            f"the latent statistics: {error}. Put the data back, or start the run once more with data.path=… of the "
            "same data"
        ) from error
    if loader is None:
        return None
    return DataRecord(loader.stats, loader.manifest.tokenizers, loader.manifest.classes)


def codec_of(run: RunPaths, recipe: TrainRecipe) -> bytes | None:
    """The file of the texture codec, if it is small: the run's copy, or the file that the recipe names."""
    return run.texture_file.read_bytes() if run.texture_file.is_file() else small_codec(recipe)


def small_codec(recipe: TrainRecipe) -> bytes | None:
    """The file of the texture codec that a recipe names; None if it is missing or large."""
    path = None if recipe.tokenizer.texture is None else recipe.tokenizer.texture.weights
    if path is None or not path.is_file() or path.stat().st_size > MAX_CODEC_BYTES:
        return None
    return path.read_bytes()
