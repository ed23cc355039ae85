"""Recipe → objects: where models, objectives and engines are chosen by their `kind`."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sfd_scale import config
from sfd_scale.checkpoint import CheckpointConfig, CheckpointManager, power_averages, start_weights
from sfd_scale.data.dataloader import FeatureLoader, ImageLoader, LatentLoader
from sfd_scale.engines.deepspeed import DeepSpeedConfig, make_deepspeed
from sfd_scale.engines.ema import EMA
from sfd_scale.engines.engine import Engine
from sfd_scale.engines.fsdp import make_fsdp
from sfd_scale.engines.optim import learning_rate
from sfd_scale.engines.replica_check import require_replicas
from sfd_scale.models import attention
from sfd_scale.models.lightningdit import LightningDiTConfig, flops_per_sample
from sfd_scale.models.make import bare_model
from sfd_scale.models.semantic_vae import SemanticVAEConfig
from sfd_scale.planning.costs import memory_per_rank
from sfd_scale.planning.footprint import Footprint, trace
from sfd_scale.recipe import TrainRecipe
from sfd_scale.runs import RunFolder, begin, check_checkpoint_matches, decisive_settings
from sfd_scale.runtime import distributed
from sfd_scale.runtime.batch_split import BatchSplit, split_batch
from sfd_scale.runtime.device import peak_flops
from sfd_scale.runtime.hang_dump import HangDump
from sfd_scale.runtime.locks import run_lock
from sfd_scale.runtime.logging import log_summary
from sfd_scale.runtime.matmul import bf16_matmul_on_cpu, measured_flops, no_tf32
from sfd_scale.runtime.profiling import StepProfiler
from sfd_scale.tokenizers.make import make_features, make_semantic, make_texture
from sfd_scale.training.alignment_targets import DecodedFeatures, OnlineFeatures
from sfd_scale.training.divergence import DivergenceWatch
from sfd_scale.training.metrics import TrainingMetrics
from sfd_scale.training.metrics_writer import MetricsWriter
from sfd_scale.training.objective import (
    ClassificationConfig,
    ClassificationObjective,
    Objective,
    SemanticFirstConfig,
    SemanticFirstObjective,
    SemanticVAELossConfig,
    SemanticVAEObjective,
)
from sfd_scale.training.trainer import Trainer

logger = logging.getLogger(__name__)
Reader = LatentLoader | ImageLoader | FeatureLoader


# ------------------------------------------------------------------------------------------------ training


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
        with run_lock(run):
            return _train(recipe, RunFolder(run), source, hangs, allow_foreign)


def _train(recipe: TrainRecipe, run: RunFolder, source: str | None, hangs: HangDump, allow_foreign: bool) -> bool:
    split = split_batch(recipe.train.global_batch, recipe.train.micro_batch, distributed.world_size())
    reader = make_reader(recipe, split)
    own = compatibility(recipe, reader)
    check_texture(recipe, reader)

    def check(state: Mapping[str, Any]) -> None:
        check_checkpoint_matches(
            own, state, run, allow_foreign=allow_foreign, allow_stats_mismatch=recipe.data.allow_stats_mismatch
        )

    model = make_model(recipe)
    checkpoints = CheckpointManager(run.checkpoints_folder, recipe.checkpoint)
    if recipe.init_from is not None and checkpoints.latest() is None:
        model.load_state_dict(start_weights(recipe.init_from.path, recipe.init_from.weights, model), strict=False)
    engine = make_engine(model, recipe)
    if recipe.train.replica_check_every is not None:
        require_replicas(engine.replicas())
    attention.activate(recipe.attention, engine.device, *_head(recipe))
    objective = make_objective(recipe, reader, engine.device)
    facts = _facts(recipe, split, engine, reader)
    begin(run, recipe, source, facts, allow_foreign=allow_foreign)
    writer = MetricsWriter(run, recipe.wandb, config.to_dict(recipe), tensorboard=recipe.tensorboard)
    profiler = StepProfiler(recipe.profile, run.profile_folder, engine.device)

    def before_step(step: int) -> None:
        hangs.alive()
        profiler.before_step(step)

    trainer = Trainer(
        config=recipe.train,
        engine=engine,
        objective=objective,
        batches=reader.batches,
        grad_accum_steps=split.grad_accum_steps,
        learning_rate=lambda step: learning_rate(recipe.optimizer.lr, recipe.lr, step, recipe.train.steps),
        ema=EMA(engine.fragments(), recipe.ema),
        checkpoints=checkpoints,
        snapshots=_snapshots(recipe, run),
        metrics=make_metrics(recipe, engine.device),
        watch=DivergenceWatch(recipe.divergence, run),
        writer=writer,
        state=own,
        check_state=check,
        before_step=before_step,
    )
    log_summary(recipe.name, {**facts, "run folder": run.path})
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


def _snapshots(recipe: TrainRecipe, run: RunFolder) -> CheckpointManager | None:
    if recipe.ema.snapshot_every is None:
        return None
    every = CheckpointConfig(every=recipe.ema.snapshot_every, keep_last=None, background=recipe.checkpoint.background)
    return CheckpointManager(run.snapshots_folder, every, parts=power_averages, replace=True)


def make_model(recipe: TrainRecipe) -> nn.Module:
    """The model with its initial fp32 weights, drawn from the recipe's seed."""
    model = bare_model(recipe.model, recipe.latents, recipe.schedule)
    model.init_weights(recipe.seed)
    return model


def make_engine(model: nn.Module, recipe: TrainRecipe) -> Engine:
    if isinstance(recipe.engine, DeepSpeedConfig):
        return make_deepspeed(model, recipe.optimizer, recipe.engine)
    return make_fsdp(model, recipe.optimizer, recipe.engine)


def make_objective(recipe: TrainRecipe, reader: Reader, device: torch.device) -> Objective:
    match recipe.objective, recipe.model:
        case SemanticFirstConfig() as settings, LightningDiTConfig() as model:
            assert isinstance(reader, LatentLoader)
            return SemanticFirstObjective(
                settings, recipe.latents, recipe.schedule, model.num_classes, recipe.seed,
                make_targets(recipe, reader, device),
            )  # fmt: skip
        case SemanticVAELossConfig() as settings, SemanticVAEConfig() as model:
            vision = None if isinstance(reader, FeatureLoader) else make_features(recipe.tokenizer, device)
            return SemanticVAEObjective(settings, vision, model.bottleneck_dim, recipe.seed)
        case ClassificationConfig() as settings, _:
            return ClassificationObjective(settings, recipe.seed)
    raise AssertionError(recipe.objective)


def make_targets(
    recipe: TrainRecipe, reader: LatentLoader, device: torch.device
) -> OnlineFeatures | DecodedFeatures | None:
    """What makes the alignment features; None where they are stored, or not needed.

    Raises:
        ValueError: if that is not what the data was encoded with, or the alignment head has another width.
    """
    assert isinstance(recipe.model, LightningDiTConfig)
    if recipe.model.alignment is None:
        return None
    targets: OnlineFeatures | DecodedFeatures | None = None
    if recipe.data.features == "online":
        online = make_features(recipe.tokenizer, device)
        _check_fingerprints("vision", reader, online.fingerprints)
        targets = OnlineFeatures(online)
    elif recipe.data.features == "decoded":
        assert recipe.tokenizer.semantic is not None
        semantic = make_semantic(recipe.tokenizer.semantic, device)
        _check_fingerprints("semantic", reader, {"semantic": semantic.fingerprint})
        targets = DecodedFeatures(semantic, recipe.latents, reader.stats.to(device))
    dim = reader.feature_dim if targets is None else targets.dim
    if dim is None:
        raise ValueError(
            f"data.features: shards, but {recipe.data.path} stores none; set data.features=decoded, or online where it "
            "stores images, or encode with store.features=shards"
        )
    if dim != recipe.model.alignment.dim:
        raise ValueError(f"model.alignment.dim: {recipe.model.alignment.dim}; the features have {dim} channels")
    return targets


def _check_fingerprints(part: str, reader: Reader, own: Mapping[str, str]) -> None:
    noted = reader.manifest.tokenizers.get(part)
    if noted is not None and noted != own[part]:
        raise ValueError(f"tokenizer.{part}: {own[part]}, but the data was encoded with {noted}; name that one")


def check_texture(recipe: TrainRecipe, reader: Reader) -> None:
    """Training needs no texture codec, but the run's recipe is what its samples are decoded by.

    Raises:
        ValueError: on all ranks, if its file is here and is not the one that the data was encoded with.
    """
    texture, failure = recipe.tokenizer.texture, None
    if texture is None or texture.weights is None or reader.manifest.tokenizers.get("texture") is None:
        return
    if distributed.is_main() and not texture.weights.exists():
        logger.warning("tokenizer.texture.weights: %s is not here; samples of this run need it", texture.weights)
    elif distributed.is_main():
        try:
            _check_fingerprints("texture", reader, {"texture": make_texture(texture, torch.device("cpu")).fingerprint})
        except Exception as error:  # noqa: BLE001 (the other ranks wait for the answer)
            failure = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    if failure := distributed.broadcast_object(failure):
        raise ValueError(failure)


def make_metrics(recipe: TrainRecipe, device: torch.device) -> TrainingMetrics:
    peak = peak_flops(device)
    if recipe.metrics.peak == "measured":
        own = measured_flops(device, torch.bfloat16 if recipe.engine.precision == "bf16" else torch.float32)
        peak = distributed.all_reduce_mean(torch.tensor(own, dtype=torch.float64)).item()
        logger.info("peak of one rank, measured: %.4g TFLOP/s", peak / 1e12)
    return TrainingMetrics(device=device, flops_per_sample=_flops(recipe), peak_flops=peak)


def make_reader(recipe: TrainRecipe, split: BatchSplit) -> Reader:
    data, kind = recipe.data, reader_kind(recipe)
    if isinstance(recipe.objective, SemanticFirstConfig) and recipe.objective.alignment_weight == 0:
        data = dataclasses.replace(data, features="none")  # what nobody looks at is not read
    reader = kind(
        data,
        seed=recipe.seed,
        split=split,
        rank=distributed.rank(),
    )
    classes = getattr(recipe.model, "num_classes", reader.num_classes)
    own_classes = isinstance(recipe.objective, ClassificationConfig) and recipe.objective.pretext != "none"
    if reader.num_classes > classes and not own_classes:
        raise ValueError(f"model.num_classes: {classes}, but the data in {recipe.data.path} has {reader.num_classes}")
    if reader.num_classes < classes and not own_classes:
        logger.warning(
            "model.num_classes: %d, of which the data in %s has %d; an evaluation draws labels of all of them", classes,
            recipe.data.path, reader.num_classes,
        )  # fmt: skip
    dim = getattr(recipe.model, "input_dim", None)
    if isinstance(reader, FeatureLoader) and reader.feature_dim != dim:
        raise ValueError(f"model.input_dim: {dim}; the stored features have {reader.feature_dim}")
    if isinstance(reader, LatentLoader) and reader.shape != recipe.latents.shape:
        raise ValueError(f"latents: {recipe.latents.shape}, but the data in {recipe.data.path} has {reader.shape}")
    return reader


def reader_kind(recipe: TrainRecipe) -> type[Reader]:
    if isinstance(recipe.objective, SemanticFirstConfig):
        return LatentLoader
    stored = isinstance(recipe.objective, SemanticVAELossConfig) and recipe.data.features == "shards"
    return FeatureLoader if stored else ImageLoader


def compatibility(recipe: TrainRecipe, reader: Reader) -> dict[str, Any]:
    """What every checkpoint records, and what a resumed run has to share with it."""
    return {"recipe": decisive_settings(recipe), "data": reader.fingerprint, "stats_hash": _stats_hash(reader)}


def _facts(recipe: TrainRecipe, split: BatchSplit, engine: Engine, reader: Reader) -> dict[str, str]:
    """What a run is, in words for people: shown before its first step and kept in environment.json."""
    count = sum(parameter.numel() for parameter in _bare_parameters(recipe))
    size = getattr(recipe.model, "size", None)
    described, samples = engine.describe(), reader.manifest.num_samples
    facts = {
        "recipe": f"{recipe.name}, digest {config.digest(recipe)[:12]}",
        "model": f"{recipe.model.kind}{f' {size}' if size else ''}, {count / 1e6:,.1f}M parameters",
        "engine": ", ".join(f"{name} {value}" for name, value in described.items() if name != "fragments"),
        "world": f"{split.world_size} ranks, {distributed.local_world_size()} a node, on {engine.device.type}",
        "global batch": (
            f"{recipe.train.global_batch} = {split.micro_batch} × {split.grad_accum_steps} accumulation × "
            f"{split.world_size} ranks"
        ),
        "steps": f"{recipe.train.steps:,}",
        "precision": f"{recipe.engine.precision}, weights and moments fp32",
        "data": f"{recipe.data.path}, {samples:,} samples, {config.digest(reader.fingerprint)[:12]}",
    }
    if isinstance(recipe.model, LightningDiTConfig):
        head_dim, dtype = _head(recipe)
        assert head_dim is not None
        facts["attention"] = f"{recipe.attention}: {attention.kernel_name(engine.device, dtype, head_dim)}"
        if distributed.is_main():
            facts["planned memory"] = planned_memory(recipe, split, activations=engine.device.type == "cuda")
    return facts


def planned_memory(recipe: TrainRecipe, split: BatchSplit, activations: bool) -> str:
    """Of the fullest rank, as `sfd plan` has it; without activations where memory is not what ends a run."""
    planned = memory_per_rank(
        footprint(recipe, activations), recipe.engine, ranks=split.world_size,
        ranks_per_node=distributed.local_world_size(), micro_batch=split.micro_batch,
        grad_accum_steps=split.grad_accum_steps,
    )  # fmt: skip
    total, state, more, host = (
        f"{size / 2**30:.2f} GiB" for size in (planned.total, planned.state, planned.activations, planned.host)
    )
    text = f"{total} a rank: weights, gradients, moments, EMA and buffers {state}, activations {more}"
    if not activations:
        text = f"{state} a rank, without activations"
    return f"{text}; in host memory {host}" if planned.host else text


def _head(recipe: TrainRecipe) -> tuple[int | None, torch.dtype]:
    """What the choice of an attention kernel needs: features of a head where the model says them, dtype of products."""
    dtype = torch.bfloat16 if recipe.engine.precision == "bf16" else torch.float32
    if not isinstance(recipe.model, LightningDiTConfig):
        return None, dtype
    _, width, heads = recipe.model.dimensions
    return width // heads, dtype


def _bare_parameters(recipe: TrainRecipe) -> list[nn.Parameter]:
    with torch.device("meta"):
        return list(bare_model(recipe.model, recipe.latents, recipe.schedule).parameters())


def footprint(recipe: TrainRecipe, activations: bool = True) -> Footprint:
    """The footprint of a recipe's model in the precision of its engine; `activations` takes a second or two.

    Raises:
        ValueError: for a recipe whose model is no diffusion transformer.
    """
    settings, layout = recipe.model, recipe.latents
    if not isinstance(settings, LightningDiTConfig):
        raise ValueError(f"model.kind: {settings.kind!r}; allowed for a plan: lightningdit")

    def forward(model: nn.Module, samples: int) -> Any:
        x, t = torch.zeros(samples, *layout.shape), torch.zeros(samples)
        return model(x, t, t, torch.zeros(samples, dtype=torch.long))

    make = partial(bare_model, settings, layout, recipe.schedule)
    return trace(make, forward if activations else None, _flops(recipe), recipe.engine.precision)


def _flops(recipe: TrainRecipe) -> float:
    if not isinstance(recipe.model, LightningDiTConfig):
        return 0.0
    layout = recipe.latents
    return flops_per_sample(
        recipe.model,
        in_channels=layout.channels,
        input_size=layout.size,
        training=True,
        two_clocks=not recipe.schedule.synchronous,
    )


def _stats_hash(reader: Reader) -> str | None:
    return reader.stats.hash if isinstance(reader, LatentLoader) else None
