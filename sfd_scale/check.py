"""Does a checkpoint belong to this data? Its loss by the clock, beside what training recorded when it was saved."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from sfd_scale.checkpoint import Checkpoint, load_weights, load_whole
from sfd_scale.export import EXPORT_KEY
from sfd_scale.recipe import TrainRecipe
from sfd_scale.runs import RunFolder
from sfd_scale.runtime import distributed
from sfd_scale.runtime.progress import progress
from sfd_scale.runtime.weight_files import safetensors_metadata
from sfd_scale.tasks import diffusion_task
from sfd_scale.tokenizers.make import make_semantic
from sfd_scale.training.alignment_targets import DecodedFeatures
from sfd_scale.training.metrics import CLOCK_BINS, ClockLosses

logger = logging.getLogger(__name__)
TOLERANCE, ERRORS = 0.1, 4.0  # a bin differs beyond this share and this many standard errors


@dataclass(frozen=True)
class Bin:
    """Losses of samples whose global clock is in one tenth of its way: mean, standard error, number; and the mean and
    number that training recorded, or None."""

    mean: float
    error: float
    count: int
    recorded: float | None
    recorded_count: int

    @property
    def differs(self) -> bool | None:
        """None where one of both is not known well enough to say."""
        if self.recorded is None or self.count < 8:
            return None
        # The samples of the record spread like ours.
        error = self.error * math.sqrt(1 + self.count / max(self.recorded_count, 1))
        return abs(self.mean - self.recorded) > TOLERANCE * self.recorded + ERRORS * error


@dataclass(frozen=True)
class CheckpointCheck:
    """The verdict: statistics that differ, or bins that do, say that model and data do not belong together."""

    bins: list[Bin]
    stats_hash: str
    recorded_stats_hash: str | None
    samples: int

    @property
    def belongs(self) -> bool | None:
        """None where the checkpoint records neither statistics nor losses."""
        same_stats = None if self.recorded_stats_hash is None else self.recorded_stats_hash == self.stats_hash
        verdicts = [same_stats, *(None if own.differs is None else not own.differs for own in self.bins)]
        known = [verdict for verdict in verdicts if verdict is not None]
        return all(known) if known else None

    def table(self) -> Table:
        table = Table("clock", "loss", "±", "samples", "recorded", "")
        for index, own in enumerate(self.bins):
            recorded = "" if own.recorded is None else f"{own.recorded:.4f}"
            verdict = {None: "", False: "same", True: "differs"}[own.differs]
            clock = f"{index / CLOCK_BINS:.1f} to {(index + 1) / CLOCK_BINS:.1f}"
            figures = (f"{own.mean:.4f}", f"{own.error:.4f}") if own.count else ("", "")
            table.add_row(clock, *figures, str(own.count), recorded, verdict)
        return table


def check_checkpoint(recipe: TrainRecipe, path: Path, samples: int = 2048) -> CheckpointCheck:
    """The loss of a checkpoint on the first samples of the recipe's data, drawn as in training.

    Args:
        path: a run folder, a checkpoint of one, or a file of `sfd export`. Training records the loss of the weights
            themselves, so those of a folder are taken; an export may hold their average, whose loss is a little lower.

    Raises:
        ValueError: if the recipe trains no diffusion model, or the checkpoint is not one of its model.
    """
    task = diffusion_task(recipe)
    weights, record = _read(path)
    device = distributed.device()
    reader = task.latent_loader()
    model = task.make_model()
    load_whole(model, weights, path)
    model.to(device).eval()
    objective = task.make_objective(reader, device)
    steps = range(-(-samples // recipe.train.global_batch))
    keys = [key for step in steps for part in reader.keys(step) for key in part]
    clocks, losses = [], []
    with torch.no_grad(), progress(len(keys), "check", "samples") as bar:
        for part in (keys[start : start + 32] for start in range(0, len(keys), 32)):
            terms = objective(model, reader.batch(part).to(device))
            assert terms.clock is not None and terms.per_sample is not None
            clocks.append(terms.clock.cpu())
            losses.append(terms.per_sample.float().cpu())
            bar.advance(len(part))
    bins = binned(torch.cat(clocks), torch.cat(losses), record.get("loss_by_clock"))
    return CheckpointCheck(bins, reader.stats.hash, record.get("stats_hash"), len(keys))


def binned(clock: Tensor, losses: Tensor, recorded: ClockLosses | None) -> list[Bin]:
    """Losses (N,) by tenths of the clock (N,) in [0, 1], beside what was recorded."""
    index = (clock * CLOCK_BINS).long().clamp(0, CLOCK_BINS - 1)
    out = []
    for number in range(CLOCK_BINS):
        own = losses[index == number].double()
        mean, count = recorded[number] if recorded else (None, 0)
        spread = own.std().item() / math.sqrt(len(own)) if len(own) > 1 else math.inf
        out.append(Bin(own.mean().item() if len(own) else math.nan, spread, len(own), mean, int(count)))
    return out


def decoded_cosine(recipe: TrainRecipe, samples: int = 2048) -> tuple[float, float]:
    """How close the features that the semantic codec decodes from stored latents are to the true ones: mean cosine over
    tokens, and the 1st percentile over tokens. The true ones are stored, or made online, as data.features says.

    Raises:
        ValueError: if the recipe has no semantic codec, or the data neither features nor images.
    """
    codec = recipe.tokenizer.semantic
    if codec is None:
        raise ValueError("tokenizer.semantic: null; name the semantic codec that the data was encoded with")
    device = distributed.device()
    if recipe.data.features != "online":
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, features="shards"))
    task = diffusion_task(recipe)
    reader = task.latent_loader()
    if recipe.data.features == "shards" and reader.feature_dim is None:
        raise ValueError(
            f"data.path: {recipe.data.path} stores no features to compare with; encode a part with "
            "store.features=shards, or with store.image=true and give data.features=online"
        )
    true = task.alignment_targets(reader, device)
    decoded = DecodedFeatures(make_semantic(codec, device), recipe.latents, reader.stats)
    cosines = []
    for start in range(0, min(samples, reader.manifest.num_samples), 32):
        keys = [(0, index) for index in range(start, min(start + 32, reader.manifest.num_samples))]
        batch = reader.batch(keys).to(device)
        features = batch.features if true is None else true(batch)
        assert features is not None
        cosines.append(functional.cosine_similarity(decoded(batch), features.float(), dim=1).flatten().cpu())
    every = torch.cat(cosines)
    return every.mean().item(), every.kthvalue(max(1, len(every) // 100)).values.item()


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of a checkpoint, and what it records of its training."""
    if path.is_file():
        weights, metadata = load_weights(path), safetensors_metadata(path)
        return weights, json.loads(metadata[EXPORT_KEY]) if EXPORT_KEY in metadata else {}
    whole = [Checkpoint(path)] if Checkpoint(path).is_whole else RunFolder(path).checkpoints
    if not whole:
        raise ValueError(f"--checkpoint: {path}; allowed: a run folder, a checkpoint of one, or a file of `sfd export`")
    return whole[-1].weights("params"), whole[-1].state


if __name__ == "__main__":
    from sfd_scale.__main__ import main

    main("check")
