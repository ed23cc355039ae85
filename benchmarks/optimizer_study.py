"""`python -m benchmarks.optimizer_study FOLDER`: steps to the final FID of AdamW, from the scores of `sfd study
study/optimizers`, and the time of a step by optimizer.

For each seed, the scores between two checkpoints lie on a line. The interval is Student's over the seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from scipy.stats import t as student
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Figure
from sfd_scale import build, config
from sfd_scale.engines.fsdp import FSDPConfig
from sfd_scale.recipe import TrainRecipe
from sfd_scale.training.semantic_first import SemanticFirstConfig

REFERENCE = "adamw"
BATCH = "train.global_batch=16"  # of recipes/study/optimizers
Curve = Sequence[tuple[int, float]]  # (step, FID), by rising step


def read(folder: Path) -> dict[str, dict[int, list[tuple[int, float]]]]:
    """The curve of every cell and seed in the results of a study."""
    found: dict[str, dict[int, list[tuple[int, float]]]] = {}
    for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(row["cell"], {}).setdefault(row["seed"], []).append((row["step"], row["fid"]))
    return {cell: {seed: sorted(curve) for seed, curve in seeds.items()} for cell, seeds in found.items()}


def steps_to(curve: Curve, score: float) -> float:
    """The first step at which a curve is at `score` or below; infinite if it never is."""
    before: tuple[int, float] | None = None
    for step, value in curve:
        if value <= score:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - score) / (before[1] - value)
        before = step, value
    return math.inf


def ratios(curves: Mapping[int, Curve], reference: Mapping[int, Curve]) -> list[float]:
    """For each seed: steps to the reference's final score, over the steps of the reference."""
    return [steps_to(curves[seed], reference[seed][-1][1]) / reference[seed][-1][0] for seed in sorted(curves)]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95% interval."""
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), float(half)


def table(found: Mapping[str, Mapping[int, Curve]]) -> str:
    steps = [step for step, _ in next(iter(found[REFERENCE].values()))]
    lines = [f"| cell | {' | '.join(f'FID at {step}' for step in steps)} | steps to AdamW's final FID |"]
    lines.append("|---|" + "---:|" * (len(steps) + 1))
    for cell, seeds in found.items():
        cells = []
        for index in range(len(steps)):
            values = [curve[index][1] for curve in seeds.values()]
            cells.append(f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}")
        own = ratios(seeds, found[REFERENCE])
        mean, half = interval(own) if math.isfinite(max(own)) else (math.inf, 0.0)
        shown = f"{mean:.2f} ± {half:.2f}" if math.isfinite(mean) else "not reached on every seed"
        each = ", ".join(f"{value:.2f}" for value in own)
        lines.append(f"| {cell} | {' | '.join(cells)} | {shown} ({each}) |")
    return "\n".join(lines)


def step_times(repeats: int) -> list[Figure]:
    """Time of a step of the study's cell under each optimizer, in turns in one process."""
    recipes = {
        "adamw": config.load("study/things/sfd", TrainRecipe, [BATCH]),
        "muon_fused": config.load("study/sfd_muon", TrainRecipe, [BATCH, "optimizer.split=none"]),
        "muon": config.load("study/sfd_muon", TrainRecipe, [BATCH]),
    }
    seconds = harness.race({name: _Step(recipe) for name, recipe in recipes.items()}, repeats, warmup=3)
    return [
        harness.compare(
            f"step of study/things/sfd, {name}",
            seconds,
            ours=name,
            peer=REFERENCE,
            against=REFERENCE,
            work=1,
            unit="steps/s",
        )
        for name in ("muon_fused", "muon")
    ]


class _Step:
    """A training step on random latents, without the reading of data and without EMA."""

    def __init__(self, recipe: TrainRecipe) -> None:
        assert isinstance(recipe.objective, SemanticFirstConfig) and isinstance(recipe.engine, FSDPConfig)
        self.engine = build.make_engine(build.make_model(recipe), recipe, recipe.engine)
        self.inputs: tuple[Tensor, ...] = recipe.task.example_inputs(recipe.train.global_batch)
        self.lr = recipe.optimizer.lr

    def __call__(self) -> None:
        velocity, projected = self.engine.model(*self.inputs)
        loss = (velocity - 1).square().mean() + (projected - 1).square().mean()
        self.engine.backward(loss, last=True)
        self.engine.step(self.lr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="of the study; without it, only the times of steps")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.folder is not None:
        print(table({cell: seeds for cell, seeds in read(options.folder).items()}))
    print(harness.markdown(step_times(options.repeats)))


if __name__ == "__main__":
    main()
