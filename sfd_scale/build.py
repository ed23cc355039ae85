"""A recipe as objects: model, engine, metrics and footprint. The kind of the run (sfd_scale.tasks) makes the rest."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
from torch import nn

from sfd_scale.engines.deepspeed import DeepSpeedConfig, make_deepspeed
from sfd_scale.engines.engine import Engine
from sfd_scale.engines.fsdp import make_fsdp
from sfd_scale.engines.muon import MuonConfig
from sfd_scale.planning.costs import MEMORY_FOR_WHOLE_WEIGHTS, AnyEngineConfig, with_resharding
from sfd_scale.planning.flops import training_flops
from sfd_scale.planning.footprint import Footprint, trace
from sfd_scale.planning.work import Work, trace_work
from sfd_scale.recipe import TrainRecipe
from sfd_scale.runs import decisive_settings
from sfd_scale.runtime import distributed
from sfd_scale.runtime.batch_split import BatchSplit
from sfd_scale.runtime.device import peak_flops
from sfd_scale.runtime.matmul import measured_flops
from sfd_scale.runtime.memory import require_memory
from sfd_scale.tasks.task import Loader, check_fingerprint, meta_model
from sfd_scale.tokenizers.make import make_texture
from sfd_scale.training.metrics import TrainingMetrics

logger = logging.getLogger(__name__)


def make_model(recipe: TrainRecipe) -> nn.Module:
    """The model with its initial fp32 weights, drawn from the recipe's seed.init.

    Raises:
        ValueError: if the ranks of this machine have no memory for it.
    """
    ranks = distributed.local_world_size()
    size = 4 * parameter_count(recipe) * ranks
    # Linux would end the process without a word.
    what = f"model: with fp32 weights for every rank of this machine ({ranks}), it"
    require_memory(size, what, "use a smaller model")
    model: Any = recipe.task.make_model()
    model.init_weights(recipe.seeds.init)
    return model


def parameter_count(recipe: TrainRecipe) -> int:
    return sum(parameter.numel() for parameter in meta_model(recipe.task).parameters())


def engine_settings(recipe: TrainRecipe, split: BatchSplit, device: torch.device) -> AnyEngineConfig:
    """The recipe's engine with `reshard_after_forward: auto` decided by the planner for the memory of this device.

    On the CPU, weights are freed: gathering is a copy in the same memory.
    """
    engine = recipe.engine
    if isinstance(engine, DeepSpeedConfig) or engine.reshard_after_forward != "auto":
        return engine
    if device.type != "cuda":
        return dataclasses.replace(engine, reshard_after_forward=True)
    return with_resharding(
        footprint(recipe), engine, MEMORY_FOR_WHOLE_WEIGHTS * torch.cuda.get_device_properties(device).total_memory,
        ranks=split.world_size, ranks_per_node=distributed.local_world_size(), micro_batch=split.micro_batch,
        grad_accum_steps=split.grad_accum_steps,
    )  # fmt: skip


def make_engine(model: nn.Module, recipe: TrainRecipe, settings: AnyEngineConfig) -> Engine:
    """The engine of a recipe, by the settings of `engine_settings`."""
    if isinstance(settings, DeepSpeedConfig):
        return make_deepspeed(model, recipe.optimizer, settings)
    return make_fsdp(model, recipe.optimizer, settings)


def matmul_dtype(recipe: TrainRecipe) -> torch.dtype:
    """The type of the matrix products of forward and backward."""
    return torch.bfloat16 if recipe.engine.precision == "bf16" else torch.float32


def compatibility(recipe: TrainRecipe, loader: Loader) -> dict[str, Any]:
    """What every checkpoint records, and what a resumed run has to share with it."""
    return {"recipe": decisive_settings(recipe), "data": loader.fingerprint, "stats_hash": loader.stats_hash}


def check_texture(recipe: TrainRecipe, loader: Loader) -> None:
    """Training needs no texture codec, but the samples of the run are decoded by the codec of its recipe.

    Raises:
        ValueError: on all ranks, if its file is here and is not the one that the data was encoded with.
    """
    texture, failure = recipe.tokenizer.texture, None
    if texture is None or texture.weights is None or loader.manifest.tokenizers.get("texture") is None:
        return
    if distributed.is_main() and not texture.weights.exists():
        logger.warning("tokenizer.texture.weights: %s is not here; samples of this run need it", texture.weights)
    elif distributed.is_main():
        try:
            own = make_texture(texture, torch.device("cpu")).fingerprint
            check_fingerprint("texture", loader, {"texture": own})
        except Exception as error:  # noqa: BLE001 (the other ranks wait for the answer)
            failure = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    if failure := distributed.broadcast_object(failure):
        raise ValueError(failure)


def make_metrics(recipe: TrainRecipe, device: torch.device) -> TrainingMetrics:
    """Metrics with the FLOPs of the recipe's model and the peak of the device, measured if the recipe asks for it."""
    peak = peak_flops(device)
    if recipe.metrics.peak == "measured":
        own = measured_flops(device, matmul_dtype(recipe))
        peak = distributed.all_reduce_mean(torch.tensor(own, dtype=torch.float64)).item()
        logger.info("peak of one rank, measured: %.4g TFLOP/s", peak / 1e12)
    return TrainingMetrics(device=device, flops_per_sample=flops(recipe), peak_flops=peak)


def footprint(recipe: TrainRecipe, activations: bool = True) -> Footprint:
    """The footprint of a recipe's model in the precision of its engine; `activations` takes a second or two."""
    task = recipe.task
    meta_model(task)  # refuses sizes that PyTorch cannot count

    def forward(model: nn.Module, samples: int) -> Any:
        return model(*task.example_inputs(samples))

    muon = recipe.optimizer if isinstance(recipe.optimizer, MuonConfig) else None
    return trace(task.make_model, forward if activations else None, recipe.engine.precision, muon)


def work(recipe: TrainRecipe) -> Work:
    """The kernels of a training step of a recipe's model, in the precision of its engine."""
    task = recipe.task
    fused = recipe.attention != "math"
    return trace_work(task.make_model, task.example_inputs, recipe.engine.precision, fused)


def flops(recipe: TrainRecipe) -> float:
    """FLOPs of forward and backward for one sample."""
    task = recipe.task
    return training_flops(task.make_model, lambda: task.example_inputs(1))
