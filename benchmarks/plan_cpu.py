"""The time model with the constants of this CPU, on the quickstart's training step."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from benchmarks import harness
from sfd_scale import build, config
from sfd_scale.data.batches import LatentBatch
from sfd_scale.engines.ema import EMA
from sfd_scale.models.lightningdit import LightningDiTConfig
from sfd_scale.planning.calibration import MeasuredStep, calibrate
from sfd_scale.planning.efficiency import Efficiency, Quantity
from sfd_scale.planning.hardware import Hardware
from sfd_scale.planning.step_time import Step, step_time
from sfd_scale.recipe import TrainRecipe
from sfd_scale.runtime.batch_split import BatchSplit
from sfd_scale.runtime.matmul import bf16_matmul_on_cpu, measured_flops
from sfd_scale.training.semantic_first import SemanticFirstConfig, SemanticFirstObjective

# Depth, width, heads and micro-batch: of the steps that the constants are fitted to, and of the quickstart.
FITTED = ((2, 128, 4, 64), (6, 128, 4, 32), (4, 64, 4, 64), (4, 256, 8, 32), (4, 128, 4, 16))
QUICKSTART = (4, 128, 4, 64)
_SERVER = 2.5  # the constants of the host are divided by it: a server's core is faster than the one they come from


@dataclass(frozen=True)
class Quickstart:
    """Seconds of a step, and the number of steps that the constants were fitted to."""

    measured: float
    predicted: float
    fitted: int
    micro_batch: int

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def quickstart_check(repeats: int = 15) -> Quickstart:
    """Time steps of several sizes in turns, fit the CPU's constants to all but the quickstart's, and predict that."""
    sizes = (*FITTED, QUICKSTART)
    recipes = [_recipe(*size) for size in sizes]
    contenders = {str(size): _real_step(recipe, size[-1]) for size, recipe in zip(sizes, recipes, strict=True)}
    seconds = harness.race(contenders, repeats, warmup=3)
    measured = [
        MeasuredStep(str(size), _planned_step(recipe, size[-1]), statistics.median(seconds[str(size)]))
        for size, recipe in zip(sizes, recipes, strict=True)
    ]
    found = calibrate(measured[:-1], _cpu(), _cpu_constants(), "benchmarks/plan_check.py")
    predicted = step_time(measured[-1].step, found.hardware, found.efficiency).total
    return Quickstart(measured[-1].seconds, predicted, len(FITTED), QUICKSTART[-1])


def _recipe(depth: int, width: int, heads: int, micro_batch: int) -> TrainRecipe:
    overrides = [f"model.depth={depth}", f"model.width={width}", f"model.heads={heads}"]
    overrides += ["engine.precision=bf16", "latents.texture_channels=32"]
    return config.load("quickstart/sfd", TrainRecipe, [*overrides, f"train.global_batch={micro_batch}"])


def _planned_step(recipe: TrainRecipe, micro_batch: int) -> Step:
    model, work = build.footprint(recipe, activations=False), build.work(recipe)
    return Step(model, work, recipe.engine, BatchSplit(micro_batch, 1, 1), ranks_per_node=1)


def _real_step(recipe: TrainRecipe, micro_batch: int) -> Callable[[], object]:
    """A step of the trainer: draws, loss, backward, optimizer and EMA, on random latents."""
    engine = build.make_engine(build.make_model(recipe), recipe, recipe.engine)
    layout, generator = recipe.latents, torch.Generator().manual_seed(0)
    batch = LatentBatch(
        latents=torch.randn(micro_batch, *layout.shape, generator=generator),
        labels=torch.randint(10, (micro_batch,), generator=generator),
        keys=torch.stack([torch.zeros(micro_batch, dtype=torch.int64), torch.arange(micro_batch)], dim=1),
        features=torch.randn(micro_batch, 96, layout.size, layout.size, generator=generator),
    )
    assert isinstance(recipe.objective, SemanticFirstConfig) and isinstance(recipe.model, LightningDiTConfig)
    conditioning = recipe.model.conditioning
    objective = SemanticFirstObjective(recipe.objective, layout, recipe.schedule, conditioning, recipe.seeds.noise)
    ema, steps = EMA(engine.fragments(), recipe.ema), itertools.count()

    def step() -> None:
        with bf16_matmul_on_cpu(engine.device):
            losses = objective(engine.model, batch)
            engine.backward(losses.total, last=True)
            engine.step(1e-4)
            ema.update(next(steps))

    return step


def _cpu() -> Hardware:
    """This CPU: the measured peak of matmuls, and a bandwidth that the calibration corrects."""
    peak = measured_flops(torch.device("cpu"), torch.float32)
    return Hardware(
        device="CPU", memory=1e10, peak_bf16=peak, peak_tf32=peak, peak_fp32=peak, bandwidth=20e9, processors=1,
        nvlink=1e9, asynchronous=False,
    )  # fmt: skip


def _cpu_constants() -> Efficiency:
    usual = Efficiency()

    def slow(quantity: Quantity) -> Quantity:
        return replace(quantity, value=_SERVER * quantity.value)

    nothing = Quantity(0.0, "s", "given", "no such time on a CPU")
    return replace(
        usual, launch=slow(usual.launch), draw=slow(usual.draw), hook_zero1=slow(usual.hook_zero1), kernel=nothing,
        read=nothing,
    )  # fmt: skip
