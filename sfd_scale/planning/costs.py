"""What an engine holds on each rank and sends each step, as arithmetic on a model's footprint.

Checked against the real engines by test_planner.py. P parameters · N ranks · s ranks that share one copy of the state
(N, or a group of HSDP).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from sfd_scale.engines.deepspeed import DeepSpeedConfig
from sfd_scale.engines.fsdp import FSDPConfig
from sfd_scale.planning.footprint import BYTES, Footprint
from sfd_scale.runtime.batch_split import divisors

# Elements of the smallest cut of a flat ZeRO-1/2 partition, times the ranks.
_ZERO_ALIGNMENT = 2


AnyEngineConfig = DeepSpeedConfig | FSDPConfig


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank. `host` is in host memory, everything else on the GPU."""

    params: int
    gradients: int
    optimizer: int  # fp32 master weights, where they are not the params, and both moments
    ema: int
    buffers: int  # buckets and gathered weights
    activations: int
    host: int = 0

    @property
    def state(self) -> int:
        """All that does not depend on the batch."""
        return self.params + self.gradients + self.optimizer + self.ema + self.buffers

    @property
    def total(self) -> int:
        return self.state + self.activations


def shard_group(engine: AnyEngineConfig, ranks: int, ranks_per_node: int) -> int:
    """Over how many ranks one copy of the optimizer state is spread.

    Raises:
        ValueError: where the ranks do not divide into such groups.
    """
    if isinstance(engine, DeepSpeedConfig):
        if ranks % engine.hpz_partition_size:
            raise ValueError(
                f"engine.hpz_partition_size: {engine.hpz_partition_size} does not divide {ranks} ranks; allowed here: "
                f"{divisors(ranks)}"
            )
        return ranks if engine.zero_stage > 0 else 1
    if engine.sharding == "replicate":
        return 1
    size = ranks if engine.sharding == "full" else engine.shard_size or min(ranks, ranks_per_node)
    if ranks % size:
        raise ValueError(f"engine.shard_size: {size} does not divide {ranks} ranks; allowed here: {divisors(ranks)}")
    return size


def memory_per_rank(
    model: Footprint,
    engine: AnyEngineConfig,
    *,
    ranks: int,
    ranks_per_node: int,
    micro_batch: int,
    grad_accum_steps: int,
) -> Memory:
    """Memory of the fullest rank, between backward and the optimizer's step."""
    activations = micro_batch * int(getattr(model.activations, engine.activation_checkpointing))
    group = shard_group(engine, ranks, ranks_per_node)
    if isinstance(engine, DeepSpeedConfig):
        return _deepspeed(model, engine, ranks, grad_accum_steps, activations)
    return _fsdp(model, engine, group, grad_accum_steps, activations)


def _deepspeed(
    model: Footprint, engine: DeepSpeedConfig, ranks: int, grad_accum_steps: int, activations: int
) -> Memory:
    weight, whole, stage = BYTES[engine.precision], model.parameters, engine.zero_stage
    if stage == 0:  # fp32: the weights are the masters
        return Memory(4 * whole, 4 * whole, 8 * whole, 4 * whole, model.buffers, activations)
    # The bucket that gradients are reduced in, and its copy in fp32.
    bucket = min(engine.reduce_bucket_elements, whole) * (weight if weight == 4 else weight + 4)
    buffers = model.buffers + bucket * (2 if engine.overlaps else 1)
    if stage < 3:
        align = _ZERO_ALIGNMENT * ranks
        part = math.ceil(whole / align) * align // ranks
        params = weight * part * ranks
        # Stage 1 keeps them whole until it reduces, after backward; micro-batches add up in fp32.
        sums = 4 * whole if grad_accum_steps > 1 and weight < 4 else 0
        gradients = weight * whole + sums if stage == 1 else 4 * part
    else:
        # Small parameters stay whole on every rank, beside their part.
        small = sum(n for n in map(math.prod, model.shapes) if n <= engine.persistent_elements)
        part = sum(math.ceil(math.prod(shape) / ranks) for shape in model.shapes)
        params = weight * ((0 if engine.offload_params else part) + small)
        gradients = 4 * part
        buffers += weight * 2 * model.largest_block  # the weights of the block at work and of the next one
        if engine.hpz_partition_size > 1:
            params += weight * math.ceil(whole / engine.hpz_partition_size)
    optimizer, ema = 12 * part, 4 * part
    if not engine.offload_optimizer:
        return Memory(params, gradients, optimizer, ema, buffers, activations)
    # The EMA averages the masters where they are. Stage 3 keeps gradients twice: as they come, and for the CPU's Adam.
    host = optimizer + ema + (4 if stage < 3 else 8) * part + (weight * part if engine.offload_params else 0)
    return Memory(params, gradients if stage == 1 else 0, 0, 0, buffers, activations, host)


def _fsdp(model: Footprint, engine: FSDPConfig, group: int, grad_accum_steps: int, activations: int) -> Memory:
    # Rows of the first dimension are dealt out; the first ranks have the larger parts.
    part = sum(math.ceil(shape[0] / group) * math.prod(shape[1:]) for shape in model.shapes)
    weight = BYTES[engine.precision]
    # Micro-batches before the last one add up whole, in fp32.
    gradients = 4 * part if grad_accum_steps == 1 else 4 * model.parameters
    # `auto` counts as resharding here; `with_resharding` decides it.
    live = 2 * model.largest_block if engine.reshard_after_forward else model.parameters
    # Weights on their way in, gradients on their way out.
    buffers = weight * live + 4 * 2 * model.largest_block if group > 1 else weight * live
    state = Memory(4 * part, gradients, 8 * part, 4 * part, buffers + model.buffers, activations)
    if not engine.cpu_offload:
        return state
    on_host = state.params + state.optimizer + state.ema + 4 * part
    return Memory(0, gradients if grad_accum_steps > 1 else 0, 0, 0, state.buffers, activations, on_host)


def bytes_sent_per_step(
    model: Footprint, engine: AnyEngineConfig, *, ranks: int, ranks_per_node: int, grad_accum_steps: int
) -> float:
    """Bytes that one rank sends a step, with ring collectives: (n - 1)/n of a tensor for a gather or a scatter."""
    whole, group = model.parameters, shard_group(engine, ranks, ranks_per_node)
    weight = BYTES[engine.precision]

    def ring(n: int, size: float) -> float:
        return (n - 1) / n * size

    if isinstance(engine, DeepSpeedConfig):
        if engine.zero_stage == 0:
            return ring(ranks, 2 * 4 * whole)
        if engine.zero_stage == 1:
            return ring(ranks, (4 + weight) * whole)
        reduced = ring(ranks, grad_accum_steps * 4 * whole)
        if engine.zero_stage == 2:
            return reduced + ring(ranks, weight * whole)
        near = engine.hpz_partition_size if engine.hpz_partition_size > 1 else ranks
        return reduced + grad_accum_steps * (ring(ranks, weight * whole) + ring(near, weight * whole))
    gathers = 2 if engine.reshard_after_forward else 1
    gathered = grad_accum_steps * gathers * ring(group, weight * whole) if group > 1 else 0.0
    replicas = ranks // group
    return gathered + ring(group, 4 * whole) + ring(replicas, 2 * 4 * whole / group)


def with_resharding(
    model: Footprint,
    engine: AnyEngineConfig,
    capacity: float,
    *,
    ranks: int,
    ranks_per_node: int,
    micro_batch: int,
    grad_accum_steps: int,
) -> AnyEngineConfig:
    """The engine with `reshard_after_forward: auto` decided: false where the whole weights fit beside all the rest.

    Args:
        capacity: bytes that the tensors of a rank may take.
    """
    if isinstance(engine, DeepSpeedConfig) or engine.reshard_after_forward != "auto":
        return engine
    kept = dataclasses.replace(engine, reshard_after_forward=False)
    planned = memory_per_rank(
        model, kept, ranks=ranks, ranks_per_node=ranks_per_node, micro_batch=micro_batch,
        grad_accum_steps=grad_accum_steps,
    )  # fmt: skip
    return kept if planned.total <= capacity else dataclasses.replace(engine, reshard_after_forward=True)


def recompute_fraction(engine: AnyEngineConfig) -> float:
    """The share of the blocks' forward pass that checkpointing does again; all but matrix products and attention is
    about a tenth of it in selective mode."""
    return {"none": 0.0, "selective": 0.1, "block": 1.0}[engine.activation_checkpointing]


def engine_name(engine: AnyEngineConfig) -> str:
    """As one says it: ZeRO-2, ZeRO-3 + offload, FSDP2, HSDP."""
    if isinstance(engine, DeepSpeedConfig):
        return f"ZeRO-{engine.zero_stage}{' + offload' if engine.offload_optimizer else ''}"
    return {"full": "FSDP2", "hybrid": "HSDP", "replicate": "FSDP2 replicate"}[engine.sharding]
