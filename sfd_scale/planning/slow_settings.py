"""The settings of a training recipe that are slow on a machine, with the key that changes each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sfd_scale.engines.deepspeed import DeepSpeedConfig
from sfd_scale.engines.fsdp import FSDPConfig
from sfd_scale.runtime.batch_split import BatchSplit
from sfd_scale.runtime.device import fast_bf16

if TYPE_CHECKING:
    from sfd_scale.recipe import TrainRecipe

# An estimate from the host time of a step, for the larger models: below it the host launches kernels more slowly than
# the GPU runs them.
SMALL_MICRO_BATCH = 16


def slow_settings(recipe: TrainRecipe, device: torch.device, split: BatchSplit) -> list[str]:
    """A sentence for each setting that costs speed on this device, with the key that changes it.

    Settings that save memory are named too: whether the memory is needed, `sfd plan` says.
    """
    found = _on_gpu(recipe, split) if device.type == "cuda" else _on_cpu(recipe, device)
    if recipe.engine.activation_checkpointing != "none":
        mode = recipe.engine.activation_checkpointing
        found.append(
            f"engine.activation_checkpointing: {mode} computes parts of forward twice; none is faster where "
            "`sfd plan` says that it fits"
        )
    return found


def _on_gpu(recipe: TrainRecipe, split: BatchSplit) -> list[str]:
    engine, found = recipe.engine, []
    if isinstance(engine, DeepSpeedConfig) and engine.zero_stage == 3:
        found.append(
            "engine.zero_stage: 3 cannot compile its blocks, because its hooks gather weights inside them; "
            "engine.kind=fsdp shards as much and compiles"
        )
    elif not engine.compile:
        found.append("engine.compile: false launches a kernel for each small operation; engine.compile=true")
    if engine.precision == "fp32":
        found.append("engine.precision: fp32 leaves the tensor cores unused; engine.precision=bf16")
    if recipe.attention == "math":
        found.append("attention: math is plain matrix products; attention=auto")
    if split.micro_batch < SMALL_MICRO_BATCH and split.grad_accum_steps > 1:
        found.append(
            f"train.micro_batch: {split.micro_batch}, and {split.grad_accum_steps} accumulation steps; a larger one "
            "has fewer launches"
        )
    return found + (_traffic(engine) if split.world_size > 1 else []) + _offload(engine)


def _traffic(engine: DeepSpeedConfig | FSDPConfig) -> list[str]:
    if isinstance(engine, DeepSpeedConfig):
        if engine.zero_stage == 1:
            return ["engine.zero_stage: 1 reduces gradients after backward; engine.zero_stage=2 during it"]
        if not engine.overlaps and engine.zero_stage > 1:
            return ["engine.overlap_comm: false reduces gradients while the GPU waits; engine.overlap_comm=true"]
        return []
    if engine.reshard_after_forward is True and engine.sharding != "replicate":
        return [
            "engine.reshard_after_forward: true gathers the weights twice a step; engine.reshard_after_forward=auto "
            "keeps them where they fit"
        ]
    return []


def _offload(engine: DeepSpeedConfig | FSDPConfig) -> list[str]:
    name = "offload_optimizer" if isinstance(engine, DeepSpeedConfig) else "cpu_offload"
    used = engine.offload_optimizer if isinstance(engine, DeepSpeedConfig) else engine.cpu_offload
    return (
        [f"engine.{name}: true updates weights on the CPU; engine.{name}=false where memory allows it"] if used else []
    )


def _on_cpu(recipe: TrainRecipe, device: torch.device) -> list[str]:
    engine, found = recipe.engine, []
    if engine.precision == "bf16" and not fast_bf16(device):
        found.append("engine.precision: bf16 is emulated on this CPU; engine.precision=fp32")
    if engine.compile and engine.activation_checkpointing != "none" and not fast_bf16(device):
        found.append(
            "engine.compile: true with checkpointing takes the CPU's own bf16 products; "
            "engine.activation_checkpointing=none"
        )
    return found
