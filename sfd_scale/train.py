"""Train a recipe, or resume it, in a run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from sfd_scale import build, config
from sfd_scale.checkpoint import CheckpointConfig, CheckpointManager, power_averages, start_weights
from sfd_scale.engines.ema import EMA
from sfd_scale.engines.engine import Engine
from sfd_scale.engines.muon import MuonConfig
from sfd_scale.engines.optim import learning_rate
from sfd_scale.engines.replica_check import require_replicas
from sfd_scale.models import attention
from sfd_scale.planning.costs import memory_per_rank
from sfd_scale.planning.slow_settings import slow_settings
from sfd_scale.planning.unused_settings import unused_settings
from sfd_scale.recipe import TrainRecipe
from sfd_scale.runs import RunFolder, begin, check_checkpoint_matches, with_data_order
from sfd_scale.runtime import distributed
from sfd_scale.runtime.batch_split import BatchSplit, split_batch
from sfd_scale.runtime.hang_dump import HangDump
from sfd_scale.runtime.locks import folder_lock
from sfd_scale.runtime.logging import log_summary
from sfd_scale.runtime.matmul import bf16_matmul_on_cpu, no_tf32
from sfd_scale.runtime.profiling import StepProfiler
from sfd_scale.tasks.task import Loader
from sfd_scale.training.data_record import write_record
from sfd_scale.training.divergence import DivergenceWatch
from sfd_scale.training.metrics import TrainingMetrics
from sfd_scale.training.metrics_writer import MetricsWriter
from sfd_scale.training.trainer import Trainer

logger = logging.getLogger(__name__)


def train(recipe: TrainRecipe, run: Path, allow_foreign: bool = False, source: str | None = None) -> bool:
    """Train or resume in the run folder; True if the last step was reached, False if it was asked to stop.

    Args:
        allow_foreign: go on from checkpoints of another recipe, with a warning that names the differences.
        source: the recipe's name or file, for those who read the run folder.

    Raises:
        ValueError: if the folder is in use or holds a run of another recipe, or the recipe does not fit data or world
            size.
    """
    # Before the process group, so that a start that hangs is recorded too.
    with HangDump(RunFolder(run).logs_folder, recipe.train.timeout_s) as hangs:
        distributed.init(recipe.train.timeout_s)
        with folder_lock(run):
            return _train(recipe, RunFolder(run), source, hangs, allow_foreign)


def _train(recipe: TrainRecipe, run: RunFolder, source: str | None, hangs: HangDump, allow_foreign: bool) -> bool:
    split = split_batch(recipe.train.global_batch, recipe.train.micro_batch, distributed.world_size())
    checkpoints = CheckpointManager(run.checkpoints_folder, recipe.checkpoint)
    latest = checkpoints.latest()
    recipe = with_data_order(recipe, None if latest is None else latest.state)
    loader = recipe.task.make_loader(split)
    own = build.compatibility(recipe, loader)
    build.check_texture(recipe, loader)

    def check(state: Mapping[str, Any]) -> None:
        check_checkpoint_matches(
            own, state, run, allow_foreign=allow_foreign, allow_stats_mismatch=recipe.data.allow_stats_mismatch
        )

    model = _start_model(recipe, checkpoints)
    head_dims = attention.head_dims(model)
    settings = build.engine_settings(recipe, split, distributed.device())
    engine = build.make_engine(model, recipe, settings)
    if recipe.train.replica_check_every is not None:
        require_replicas(engine.replicas())
    attention.activate(recipe.attention, engine.device, head_dims, build.matmul_dtype(recipe))
    objective = recipe.task.make_objective(loader, engine.device)
    metrics = build.make_metrics(recipe, engine.device)
    decided = dataclasses.replace(recipe, engine=settings)
    facts = _facts(recipe, split, engine, loader) | _costs(decided, split, engine, head_dims, metrics)
    begin(run, recipe, source, facts, allow_foreign=allow_foreign)
    write_record(run, recipe, loader)
    writer = MetricsWriter(run, recipe.wandb, config.to_dict(recipe), tensorboard=recipe.tensorboard)
    profiler = StepProfiler(recipe.profile, run.profile_folder, engine.device)

    def before_step(step: int) -> None:
        hangs.alive()
        profiler.before_step(step)

    trainer = Trainer(
        config=recipe.train,
        engine=engine,
        objective=objective,
        batches=loader.batches,
        grad_accum_steps=split.grad_accum_steps,
        learning_rate=lambda step: learning_rate(recipe.optimizer.lr, recipe.lr, step, recipe.train.steps),
        ema=EMA(engine.fragments(), recipe.ema),
        checkpoints=checkpoints,
        snapshots=_snapshots(recipe, run),
        metrics=metrics,
        watch=DivergenceWatch(recipe.divergence, run),
        writer=writer,
        state=own,
        check_state=check,
        before_step=before_step,
    )
    log_summary(recipe.name, {**facts, "run folder": run.path})
    for unused in unused_settings(recipe, 0 if latest is None else latest.step) if distributed.is_main() else []:
        logger.warning("%s", unused)
    try:
        exact = no_tf32() if recipe.engine.precision == "fp32" else contextlib.nullcontext()
        with exact, bf16_matmul_on_cpu(engine.device):
            finished = trainer.run()
    finally:
        profiler.close()
        writer.close()
        engine.close()
    # Launchers kill the ranks that are still at work when the first one leaves.
    distributed.barrier()
    return finished


def _start_model(recipe: TrainRecipe, checkpoints: CheckpointManager) -> nn.Module:
    """The model with its start values, or with the weights of `init_from` where the run has no checkpoint yet."""
    model = build.make_model(recipe)
    if recipe.init_from is not None and checkpoints.latest() is None:
        model.load_state_dict(start_weights(recipe.init_from.path, recipe.init_from.weights, model), strict=False)
    return model


def _snapshots(recipe: TrainRecipe, run: RunFolder) -> CheckpointManager | None:
    if recipe.ema.snapshot_every is None:
        return None
    every = CheckpointConfig(every=recipe.ema.snapshot_every, keep_last=None, background=recipe.checkpoint.background)
    return CheckpointManager(run.snapshots_folder, every, parts=power_averages, replace=True)


# ------------------------------------------------------------------------------------------------ summary


def _facts(recipe: TrainRecipe, split: BatchSplit, engine: Engine, loader: Loader) -> dict[str, str]:
    """What a run is, for people: shown before its first step and kept in environment.json."""
    kind, samples = recipe.task.summary(), loader.manifest.num_samples
    return {
        "recipe": f"{recipe.name}, digest {config.digest(recipe)[:12]}",
        **kind,
        "model": f"{kind['model']}, {build.parameter_count(recipe) / 1e6:,.1f}M parameters",
        "engine": ", ".join(f"{name} {value}" for name, value in engine.describe().items() if name != "fragments"),
        "world": f"{split.world_size} ranks, {distributed.local_world_size()} per node, on {engine.device.type}",
        "global batch": (
            f"{recipe.train.global_batch} = {split.micro_batch} × {split.grad_accum_steps} accumulation × "
            f"{split.world_size} ranks"
        ),
        "steps": f"{recipe.train.steps:,}",
        "precision": f"{recipe.engine.precision}, weights and moments fp32",
        "data": f"{recipe.data.path}, {samples:,} samples, {config.digest(loader.fingerprint)[:12]}",
        "W&B": recipe.wandb.describe(),
    }


def _costs(
    recipe: TrainRecipe, split: BatchSplit, engine: Engine, head_dims: Collection[int], metrics: TrainingMetrics
) -> dict[str, str]:
    """The kernels, FLOPs and memory of a run, for people."""
    facts = {}
    if head_dims:
        dtype = build.matmul_dtype(recipe)
        kernels = [attention.kernel_name(engine.device, dtype, head_dim) for head_dim in head_dims]
        facts["attention"] = f"{recipe.attention}: {', '.join(dict.fromkeys(kernels))}"
    facts["FLOPs"] = f"{metrics.flops_per_sample / 1e9:,.4g} G per sample, forward and backward"
    if isinstance(recipe.optimizer, MuonConfig):
        muon = build.footprint(recipe, activations=False).muon.flops
        facts["FLOPs"] += f"; {muon / 1e9:,.4g} G of Muon per step, which MFU does not count"
    facts["MFU"] = (
        f"of {metrics.peak_flops / 1e12:,.4g} TFLOP/s per rank"
        if math.isfinite(metrics.peak_flops)
        else "not reported: the peak of this device is not known; metrics.peak=measured measures it"
    )
    if slow := slow_settings(recipe, engine.device, split):
        facts["slow here"] = "; ".join(slow)
    if distributed.is_main():
        facts["planned memory"] = planned_memory(recipe, split, activations=engine.device.type == "cuda")
    return facts


def planned_memory(recipe: TrainRecipe, split: BatchSplit, activations: bool) -> str:
    """Memory of the fullest rank, as `sfd plan` computes it; with activations where they can end a run."""
    planned = memory_per_rank(
        build.footprint(recipe, activations), recipe.engine, ranks=split.world_size,
        ranks_per_node=distributed.local_world_size(), micro_batch=split.micro_batch,
        grad_accum_steps=split.grad_accum_steps,
    )  # fmt: skip
    total, state, more, host = (
        f"{size / 2**30:.2f} GiB" for size in (planned.total, planned.state, planned.activations, planned.host)
    )
    text = f"{total} per rank: weights, gradients, moments, EMA and buffers {state}, activations {more}"
    if not activations:
        text = f"{state} per rank, without activations"
    return f"{text}; in host memory {host}" if planned.host else text


if __name__ == "__main__":
    from sfd_scale.__main__ import main

    main("train")
