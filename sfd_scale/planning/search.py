"""Search the settings of a run on N GPUs: engine, sharding, micro-batch, checkpointing, compilation and overlap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from sfd_scale.engines.block_transforms import Checkpointing
from sfd_scale.engines.deepspeed import DeepSpeedConfig
from sfd_scale.engines.fsdp import FSDPConfig
from sfd_scale.planning.convergence import CriticalBatch
from sfd_scale.planning.costs import AnyEngineConfig
from sfd_scale.planning.efficiency import Efficiency
from sfd_scale.planning.hardware import GPUS, Hardware
from sfd_scale.planning.planner import USABLE, Plan, PlannedRun, check_ranks, memory_of, plan
from sfd_scale.runtime.batch_split import divisors

# The rate at which added GPUs still pay: half of that of the first ones.
KNEE = 0.5


@dataclass(frozen=True)
class Choice:
    """Settings with their plan. `job` has them; `overrides` are the keys that a command line sets."""

    job: PlannedRun
    overrides: tuple[str, ...]
    plan: Plan


@dataclass(frozen=True)
class Engine:
    """An engine to try, with the keys that set it."""

    config: AnyEngineConfig
    overrides: tuple[str, ...]


def engines(recipe: AnyEngineConfig, *, several_nodes: bool, has_blocks: bool) -> Iterator[Engine]:
    """Every engine that a recipe may take; precision and clipping stay those of the recipe."""
    kinds: list[tuple[type[AnyEngineConfig], dict[str, Any]]] = [
        (FSDPConfig, {"kind": "fsdp", "sharding": name})
        for name in ("full", "replicate", *(["hybrid"] if several_nodes else []))
    ]
    stages = (0,) if recipe.precision == "fp32" else (1, 2, 3)
    kinds += [(DeepSpeedConfig, {"kind": "deepspeed", "zero_stage": stage}) for stage in stages]
    if recipe.precision == "bf16":
        kinds.append((DeepSpeedConfig, {"kind": "deepspeed", "zero_stage": 3, "offload_optimizer": True}))
        # Without overlap there is one reduction bucket, in place of two.
        kinds += [(DeepSpeedConfig, {"kind": "deepspeed", "zero_stage": n, "overlap_comm": False}) for n in (2, 3)]
    for config, settings in kinds:
        for mode in get_args(Checkpointing) if has_blocks else ("none",):
            for compiled in (True, False) if has_blocks else (False,):
                chosen = {**settings, "activation_checkpointing": mode, "compile": compiled}
                try:
                    made = config(**chosen, precision=recipe.precision, grad_clip=recipe.grad_clip)
                except ValueError:  # the engine does not allow this combination
                    continue
                yield Engine(made, tuple(f"engine.{name}={_yaml(value)}" for name, value in chosen.items()))


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def choices(job: PlannedRun, hardware: Hardware, efficiency: Efficiency) -> list[Choice]:
    """All settings that fit, the fastest first.

    Raises:
        ValueError: if the ranks cannot divide the batch.
    """
    check_ranks(job.ranks, job.ranks_per_node)
    if job.global_batch % job.ranks:
        plan(replace(job, micro_batch=None), hardware, efficiency)  # raises, and names the nearest
    share, found = job.global_batch // job.ranks, []
    for engine in _engines_of(job):
        tried = replace(job, engine=engine.config)
        usable = USABLE * hardware.memory
        fitting = [m for m in divisors(share) if memory_of(tried, m, share // m).total <= usable]
        # Accumulation takes longer than a larger micro-batch. But a smaller one may leave room for whole weights.
        for micro_batch in fitting[-2:]:
            run = replace(tried, micro_batch=micro_batch)
            keys = (*engine.overrides, f"train.micro_batch={micro_batch}")
            found.append(Choice(run, keys, plan(run, hardware, efficiency)))
    return sorted(found, key=lambda choice: choice.plan.step_seconds)


def _engines_of(job: PlannedRun) -> Iterator[Engine]:
    several, blocks = job.ranks > job.ranks_per_node, job.work.blocks > 0
    for engine in engines(job.engine, several_nodes=several, has_blocks=blocks):
        offloads = isinstance(engine.config, DeepSpeedConfig) and engine.config.offload_optimizer
        if not (offloads and job.footprint.muon.matrices):  # Muon works on the GPU
            yield engine


@dataclass(frozen=True)
class Nearest:
    """The settings that need the least memory, where nothing fits. gpus: known GPUs that have enough."""

    overrides: tuple[str, ...]
    memory: int
    gpus: tuple[str, ...]

    def describe(self) -> str:
        larger = ", ".join(self.gpus) or "no known GPU"
        return (
            f"nothing fits; the least memory is {self.memory / 2**30:.1f} GiB, by {' '.join(self.overrides)}; that "
            f"fits {larger}"
        )


def nearest(job: PlannedRun) -> Nearest:
    """The settings with the least memory, at micro-batch 1, and the GPUs on which they fit."""
    share = job.global_batch // job.ranks
    needs = [(memory_of(replace(job, engine=e.config), 1, share).total, e.overrides) for e in _engines_of(job)]
    memory, overrides = min(needs)
    gpus = tuple(name for name, gpu in GPUS.items() if memory <= USABLE * gpu.memory)
    return Nearest((*overrides, "train.micro_batch=1"), memory, gpus)


@dataclass(frozen=True)
class Advice:
    """The best settings for each number of GPUs and batch, and what was refused.

    days, gpu_hours: to the quality of the recipe's own steps and batch, with failures.
    """

    choice: Choice
    ranks: int
    batch: int
    days: float

    @property
    def gpu_hours(self) -> float:
        return 24 * self.days * self.ranks


def advise(
    job: PlannedRun, counts: Sequence[int], hardware: Hardware, efficiency: Efficiency, curve: CriticalBatch,
    gpus_per_node: int,
) -> tuple[list[Advice], list[str]]:  # fmt: skip
    """For each number of GPUs the fastest settings at the recipe's batch, and at a larger batch if that takes fewer
    days to the same quality. Second: why a number of GPUs was left out."""
    found, refused = [], []
    for ranks in counts:
        here = replace(job, ranks=ranks, ranks_per_node=min(gpus_per_node, ranks), micro_batch=None)
        own, reason = _best(here, job.global_batch, hardware, efficiency, curve)
        larger = [_best(here, job.global_batch * factor, hardware, efficiency, curve)[0] for factor in (2, 4, 8)]
        better = min((a for a in larger if a is not None), key=lambda advice: advice.days, default=None)
        if own is not None:
            found.append(own)
        else:
            refused.append(f"{ranks} GPUs: {reason}")
        if better is not None and (own is None or better.days < 0.95 * own.days):
            found.append(better)
    return found, refused


def _best(
    job: PlannedRun, batch: int, hardware: Hardware, efficiency: Efficiency, curve: CriticalBatch
) -> tuple[Advice | None, str]:
    factor = curve.samples_factor(batch, job.global_batch)
    steps = max(1, round(job.steps * factor * job.global_batch / batch))
    run = replace(job, global_batch=batch, steps=steps)
    try:
        found = choices(run, hardware, efficiency)
    except ValueError as error:
        return None, str(error)
    if not found:
        return None, nearest(run).describe()
    return Advice(found[0], job.ranks, batch, found[0].plan.days_with_failures), ""


def knee(advice: Sequence[Advice]) -> int | None:
    """The largest number of GPUs whose last added ones still give half of the rate of the first ones; None for one.

    Args:
        advice: at one batch, by rising number of GPUs.
    """
    if len(advice) < 2:
        return None
    first = advice[0]
    rate, last = 1 / (first.days * first.ranks), first
    for entry in advice[1:]:
        gained = (1 / entry.days - 1 / last.days) / (entry.ranks - last.ranks)
        if gained < KNEE * rate:
            break
        last = entry
    return last.ranks
