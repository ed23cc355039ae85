"""A small model and a small feature extractor for tests of the evaluation harness, the same on every rank."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval import generate
from eval import score as scoring
from eval.features.extract import open_features, read_features
from eval.features.extractor import Features, LazyExtractor
from eval.generate import PreparedGeneration, make_labels
from eval.images.outputs import OutputsConfig
from eval.metrics import precision_recall as neighbours
from eval.metrics.config import MetricsConfig
from eval.recipe import EvalRecipe
from eval.reference import Judge, load_reference
from eval.results import Results
from eval.work.chunks import ChunkFolder
from sfd_scale.diffusion.conditioning import ClassLabels
from sfd_scale.diffusion.fixed_step import FixedStepConfig
from sfd_scale.diffusion.guidance import ClassifierFreeGuidance, guided
from sfd_scale.diffusion.latents import LatentLayout, LatentStats
from sfd_scale.diffusion.sampler import Sampler
from sfd_scale.diffusion.schedule import SemanticFirstSchedule
from sfd_scale.models.lightningdit import LightningDiT, LightningDiTConfig
from sfd_scale.runtime import distributed

LAYOUT = LatentLayout(texture_channels=3, semantic_channels=2, size=4)
SCHEDULE = SemanticFirstSchedule(delta_t=0.3)
CLASSES = 5
CPU = torch.device("cpu")


class TinyExtractor:
    """Fixed random convolutions: pool 12, spatial 4·4·7 in (row, column, channel) order, 5 logits."""

    fingerprint = "tiny:1"

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(3)
        self.weight = torch.randn(12, 3, 4, 4, generator=draw) / 7
        self.bias = torch.randn(12, generator=draw)
        self.head = torch.randn(12, CLASSES, generator=draw)
        self.calls: list[int] = []

    def __call__(self, images: Tensor) -> Features:
        self.calls.append(len(images))
        maps = torch.conv2d(images.float() / 128 - 1, self.weight, self.bias, stride=4).relu()
        maps = torch.nn.functional.adaptive_avg_pool2d(maps, 4)
        pool = maps.mean((2, 3))
        return Features(pool, maps[:, :7].permute(0, 2, 3, 1).flatten(1), pool @ self.head)


class SmallerExtractor:
    """Another network without spatial features and logits: means and deviations of the channels, pool 6."""

    fingerprint = "smaller:1"

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, images: Tensor) -> Features:
        self.calls.append(len(images))
        pixels = images.float() / 255
        return Features(torch.cat([pixels.mean((2, 3)), pixels.std((2, 3))], dim=1), None, None)


def decode(latents: Tensor) -> Tensor:
    """Show the 3 texture channels as colours, 4x4 pixels per latent position."""
    pixels = LAYOUT.split(latents)[0].repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    return (127.5 * pixels + 128).clamp(0, 255).floor().to(torch.uint8)


def model(seed: int = 0) -> LightningDiT:
    config = LightningDiTConfig(size=None, depth=2, width=32, heads=2, num_classes=CLASSES, alignment=None)
    net = LightningDiT(config, in_channels=LAYOUT.channels, input_size=LAYOUT.size, two_clocks=not SCHEDULE.synchronous)
    net.init_weights(seed)
    with torch.no_grad():
        # Blocks and output are initialised to zero, which would hide errors.
        for name, parameter in net.named_parameters():
            if "adaLN" in name or name.startswith("final_layer.linear"):
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(seed + 1))
    return net.eval()


STATS = LatentStats(torch.linspace(-0.2, 0.2, 5).double(), torch.linspace(0.4, 0.6, 5).double())


def sampler(batch: int, seed: int = 0, **changes: Any) -> Sampler:
    guidance = ClassifierFreeGuidance(scale_texture=1.5, scale_semantic=1.2)
    velocity = guided(model(), guidance, LAYOUT, conditioning=ClassLabels(CLASSES))
    settings: dict[str, Any] = {
        "velocity": velocity, "layout": LAYOUT, "schedule": SCHEDULE, "config": FixedStepConfig(num_steps=4),
        "stats": STATS, "decode": decode, "seed": seed, "batch": batch, "device": CPU,
    }  # fmt: skip
    return Sampler(**settings | changes)


def recipe(folder: Path, **changes: Any) -> EvalRecipe:
    settings: dict[str, Any] = {
        "num_samples": 53,
        "batch": 8,
        "extractor_batch": 16,
        "cache": folder / "cache",
        "metrics": MetricsConfig(is_split=20, kid_subsets=3, kid_size=20, reference_images=40, mind_projections=50),
        "outputs": OutputsConfig(grid=2, grid_classes=3),
    }
    return EvalRecipe(**settings | changes)


def lazy(extractor: TinyExtractor | None = None) -> LazyExtractor:
    return LazyExtractor(TinyExtractor.fingerprint, lambda: extractor or TinyExtractor())


def lazy_further(extractor: SmallerExtractor | None = None) -> dict[str, LazyExtractor]:
    return {"smaller": LazyExtractor(SmallerExtractor.fingerprint, lambda: extractor or SmallerExtractor())}


def job(
    settings: EvalRecipe,
    extractor: TinyExtractor | None = None,
    further: dict[str, LazyExtractor] | None = None,
    **changes: Any,
) -> PreparedGeneration:
    """The generation job that `prepare` would return, with the tiny model."""
    config = {
        "kind": "generated", "extractor": TinyExtractor.fingerprint, "num_samples": settings.num_samples,
        "batch": settings.batch, "seed": settings.seed, "checkpoint": {"name": "tiny", "step": 0, "sha256": "0"},
        "sampler": {"kind": "euler"}, "guidance": {"kind": "none"},
    }  # fmt: skip
    drawn = sampler(settings.batch, settings.seed, **changes)
    conditioning = ClassLabels(CLASSES)
    return PreparedGeneration(
        drawn, make_labels(settings, conditioning), conditioning, lazy(extractor), config, further or {}
    )


# ------------------------------------------------------------------------------------------------- ranks


def whole_run(settings: EvalRecipe, out: Path) -> Results:
    """Generate and score with the tiny extractor."""
    generate.generate(settings, out, job(settings))
    return scoring.score(settings, out, out / "results.json", lazy())


def with_further(settings: EvalRecipe, out: Path) -> Results:
    """Generate and score with two extractors, and keep the scores of both."""
    further = lazy_further()
    generate.generate(settings, out, job(settings, further=further))
    judges = {name: Judge(own, load_reference(settings, own, name)) for name, own in further.items()}
    return scoring.score(settings, out, out / "results.json", lazy(), judges=judges)


def killed_run(settings: EvalRecipe, out: Path, dying: int, after: int) -> None:
    """Generate, but kill rank `dying` after its `after` chunks."""
    commit, made = ChunkFolder.commit, 0

    def counted(self: ChunkFolder, chunk: int, tensors: dict[str, Tensor]) -> None:
        nonlocal made
        if distributed.rank() == dying and made == after:
            os._exit(9)
        if distributed.rank() != dying:
            time.sleep(0.5)  # leave enough chunks to the other rank
        commit(self, chunk, tensors)
        made += 1

    ChunkFolder.commit = counted  # type: ignore[method-assign]
    generate.generate(settings, out, job(settings))


def in_other_ways(settings: EvalRecipe, out: Path) -> dict[str, Any]:
    """Scores of a finished folder in low_memory mode, and precision and recall computed in small blocks."""
    low = dataclasses.replace(settings.metrics, mode="low_memory")
    scores = scoring.score(dataclasses.replace(settings, metrics=low), out, out / "low.json", lazy()).scores
    features = read_features(open_features(out))
    rows, neighbours.ROWS = neighbours.ROWS, 7
    blocks = neighbours.precision_recall(features.pool, features.pool[:20] + 0.01, 3)
    neighbours.ROWS = rows
    return {"low_memory": scores.by_key(), "blocks": list(blocks)}


def with_a_slow_rank(settings: EvalRecipe, out: Path) -> list[int]:
    """Number of chunks of each rank if rank 1 is slow."""
    made = 0

    def decode_slowly(latents: Tensor) -> Tensor:
        nonlocal made
        made += 1
        time.sleep(2.0 * distributed.rank())
        return decode(latents)

    generate.generate(settings, out, job(settings, decode=decode_slowly))
    return distributed.all_gather_object(made)


def two_ranks(settings: EvalRecipe, folder: Path) -> Results:
    results = whole_run(settings, folder / "two")
    ways = in_other_ways(settings, folder / "two") | {"made": with_a_slow_rank(settings, folder / "slow")}
    if distributed.is_main():
        (folder / "two" / "ways.json").write_text(json.dumps(ways))
    killed_run(settings, folder / "killed", dying=1, after=2)
    return results


def without_run(results: Results) -> dict[str, Any]:
    """What may not depend on ranks, times and places."""
    data = results.as_json()
    for found in data.get("representations", {}).values():  # absent with one extractor
        del found["features"]
    return {key: value for key, value in data.items() if key != "run"}
