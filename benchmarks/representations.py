"""What further extractors cost: six representations of one generation, beside one.

The sampler, the decoder, the chunks on disk and the scores are the real ones. The networks are random projections of
the pixels to the widths of Inception (2,048 pooled, 2,023 spatial, 1,008 logits) and of five others (1,024). Their
forward passes are measured apart and taken off: the rest of six may cost 1.5 times one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Figure, Options
from eval import generate, score
from eval.features.extractor import Extractor, Features, LazyExtractor
from eval.images.outputs import OutputsConfig
from eval.images.sources import NpzSource
from eval.recipe import EvalRecipe
from eval.reference import Judge, load_reference
from sfd_scale.diffusion.conditioning import ClassLabels
from sfd_scale.diffusion.fixed_step import FixedStepConfig
from sfd_scale.diffusion.guidance import NoGuidance, guided
from sfd_scale.diffusion.latents import LatentLayout, LatentStats
from sfd_scale.diffusion.sampler import Sampler
from sfd_scale.diffusion.schedule import SemanticFirstSchedule
from sfd_scale.models.lightningdit import LightningDiT, LightningDiTConfig

LAYOUT = LatentLayout(texture_channels=3, semantic_channels=2, size=16)
CLASSES, FURTHER, ALLOWED = 10, 5, 1.5
WIDTHS = {"pool": 2048, "spatial": 17 * 17 * 7, "logits": 1008}
QUICK_WIDTHS = {"pool": 64, "spatial": 49, "logits": 10}


class Projection:
    """A random projection of the pixels, clipped at 0."""

    def __init__(self, name: str, widths: Mapping[str, int]) -> None:
        self.fingerprint = name
        draw = torch.Generator().manual_seed(len(name))
        pixels = 3 * (4 * LAYOUT.size) ** 2
        self.weights = {key: torch.randn(pixels, dim, generator=draw) / pixels**0.5 for key, dim in widths.items()}

    def __call__(self, images: Tensor) -> Features:
        rows = images.flatten(1).float() / 128 - 1
        found = {key: (rows @ weight).relu() for key, weight in self.weights.items()}
        return Features(found["pool"], found.get("spatial"), found.get("logits"))


def decode(latents: Tensor) -> Tensor:
    """Show the texture channels as colours, 4x4 pixels per latent position."""
    pixels = LAYOUT.split(latents)[0].repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    return (127.5 * pixels + 128).clamp(0, 255).to(torch.uint8)


def sampler(recipe: EvalRecipe) -> Sampler:
    assert isinstance(recipe.batch, int)
    schedule = SemanticFirstSchedule(delta_t=0.3)
    settings = LightningDiTConfig(size=None, depth=6, width=192, heads=3, num_classes=CLASSES, alignment=None)
    model = LightningDiT(settings, in_channels=LAYOUT.channels, input_size=LAYOUT.size, two_clocks=True)
    model.init_weights(0)
    stats = LatentStats(torch.zeros(LAYOUT.channels).double(), torch.ones(LAYOUT.channels).double())
    velocity = guided(model.eval(), NoGuidance(), LAYOUT, conditioning=ClassLabels(CLASSES))
    return Sampler(
        velocity=velocity, layout=LAYOUT, schedule=schedule, config=recipe.sampler, stats=stats, decode=decode,
        seed=0, batch=recipe.batch, device=torch.device("cpu"),
    )  # fmt: skip


def _lazy(extractor: Extractor) -> LazyExtractor:
    return LazyExtractor(extractor.fingerprint, lambda: extractor)


class Evaluation:
    """Generate and score with the main extractor, or with all; each in a new folder."""

    def __init__(self, folder: Path, count: int, steps: int, widths: Mapping[str, int]) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
        np.savez(folder / "reference.npz", pixels)
        self.folder, self.number = folder, 0
        self.recipe = EvalRecipe(
            num_samples=count, batch=32, sampler=FixedStepConfig(num_steps=steps), precision="fp32",
            reference=NpzSource(path=folder / "reference.npz"), cache=folder / "cache", outputs=OutputsConfig(grid=0),
        )  # fmt: skip
        self.sampler, self.main = sampler(self.recipe), Projection("main", widths)
        self.further = [
            Projection(f"further{'+' * number}", {"pool": widths["pool"] // 2}) for number in range(FURTHER)
        ]
        self.reference = load_reference(self.recipe, _lazy(self.main))
        self.judges = {
            found.fingerprint: Judge(_lazy(found), load_reference(self.recipe, _lazy(found), found.fingerprint))
            for found in self.further
        }

    def run(self, judges: Mapping[str, Judge]) -> None:
        self.number += 1
        out, conditioning = self.folder / f"out{self.number}", ClassLabels(CLASSES)
        settings = {"kind": "generated", "num_samples": self.recipe.num_samples, "batch": 32, "extractor": "main"}
        job = generate.PreparedGeneration(
            self.sampler, generate.make_labels(self.recipe, conditioning), conditioning, _lazy(self.main), settings,
            {name: judge.extractor for name, judge in judges.items()},
        )  # fmt: skip
        generate.generate(self.recipe, out, job)
        score.score(self.recipe, out, out / "results.json", _lazy(self.main), self.reference, judges)

    def forward_passes(self) -> None:
        """The forward passes of the further networks alone, in batches of the same size."""
        images = torch.zeros(32, 3, 64, 64, dtype=torch.uint8)
        for _ in range(-(-self.recipe.num_samples // 32)):
            for network in self.further:
                network(images)


def run(options: Options) -> list[Figure]:
    """Six representations beside one, without their forward passes."""
    count, steps, widths = (64, 2, QUICK_WIDTHS) if options.quick else (128, 10, WIDTHS)
    with tempfile.TemporaryDirectory() as name:
        evaluation = Evaluation(Path(name), count, steps, widths)
        seconds = harness.race(
            {
                "one": lambda: evaluation.run({}),
                "six": lambda: evaluation.run(evaluation.judges),
                "forward": evaluation.forward_passes,
            },
            options.repeats or 2,
            warmup=0,
        )
    rest = [six - forward for six, forward in zip(seconds["six"], seconds["forward"], strict=True)]
    figure = harness.compare(
        f"six representations of {count} images, without their forward passes",
        {"ours": rest, "peer": seconds["one"]}, against="one representation", work=None, unit="s", target=1 / ALLOWED,
    )  # fmt: skip
    return [figure]


if __name__ == "__main__":
    harness.main("representations", run)
