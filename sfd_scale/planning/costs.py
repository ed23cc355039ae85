"""Memory of each rank and the collectives of each step, by engine, as arithmetic on a model's footprint.

test_costs.py checks it against the real engines.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from sfd_scale.engines.deepspeed import DeepSpeedConfig
from sfd_scale.engines.fsdp import FSDPConfig
from sfd_scale.engines.fsdp_units import units_of
from sfd_scale.planning.collectives import Collective, Group
from sfd_scale.planning.footprint import BYTES, Footprint
from sfd_scale.planning.muon_cost import MESSAGE_BYTES, rounds, update_bytes
from sfd_scale.runtime.batch_split import divisors

# Share of a GPU's memory in which weights may stay whole. The plan is an estimate, and NCCL needs some memory.
MEMORY_FOR_WHOLE_WEIGHTS = 0.8
# ZeRO-1 and 2 pad a flat partition to a multiple of this many elements for each rank.
_ZERO_ALIGNMENT = 2

AnyEngineConfig = DeepSpeedConfig | FSDPConfig


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank. `host` is in host memory, everything else on the GPU.

    optimizer: the moments, and the fp32 master weights of an engine that keeps them beside bf16 params.
    buffers: communication buckets and gathered weights.
    update: of Muon, while it updates the weights; no activations are left by then.
    """

    params: int
    gradients: int
    optimizer: int
    ema: int
    buffers: int
    activations: int
    host: int = 0
    update: int = 0

    @property
    def state(self) -> int:
        """The part that does not depend on the batch."""
        return self.params + self.gradients + self.optimizer + self.ema + self.buffers

    @property
    def total(self) -> int:
        return self.state + max(self.activations, self.update)


def shard_group(engine: AnyEngineConfig, ranks: int, ranks_per_node: int) -> int:
    """The number of ranks that share one copy of the optimizer state.

    Raises:
        ValueError: if the ranks do not divide into groups of this size.
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
        found = _deepspeed(model, engine, ranks, grad_accum_steps, activations)
    else:
        found = _fsdp(model, engine, group, grad_accum_steps, activations)
    held = _matrix_elements(model, engine, group)
    # A matrix has no second moment.
    return dataclasses.replace(
        found, optimizer=found.optimizer - 4 * held, update=update_bytes(model.muon, ranks, held)
    )  # fmt: skip


def _matrix_elements(model: Footprint, engine: AnyEngineConfig, group: int) -> int:
    """Elements of Muon's matrices on the fullest rank of `group` ranks that share the optimizer state."""
    shapes, elements = model.muon.shapes, model.muon.elements
    if isinstance(engine, FSDPConfig):
        return sum(math.ceil(rows / group) * columns for rows, columns in shapes)
    if engine.zero_stage == 3:
        return sum(math.ceil(rows * columns / group) for rows, columns in shapes)
    return math.ceil(elements / group)


def _deepspeed(
    model: Footprint, engine: DeepSpeedConfig, ranks: int, grad_accum_steps: int, activations: int
) -> Memory:
    weight, whole, stage = BYTES[engine.precision], model.parameters, engine.zero_stage
    if stage == 0:  # fp32: the weights are the masters
        return Memory(4 * whole, 4 * whole, 8 * whole, 4 * whole, model.buffers, activations)
    # The bucket for reducing gradients, and its copy in fp32.
    bucket = min(engine.reduce_bucket_elements, whole) * (weight if weight == 4 else weight + 4)
    buffers = model.buffers + bucket * (2 if engine.overlaps else 1)
    if stage < 3:
        align = _ZERO_ALIGNMENT * ranks
        part = math.ceil(whole / align) * align // ranks
        params = weight * part * ranks
        # Stage 1 keeps whole gradients until it reduces them, after backward. It accumulates micro-batches in fp32.
        sums = 4 * whole if grad_accum_steps > 1 and weight < 4 else 0
        gradients = weight * whole + sums if stage == 1 else 4 * part
    else:
        # Every rank keeps small parameters whole, beside its part of them.
        small = sum(n for n in map(math.prod, model.shapes) if n <= engine.persistent_elements)
        part = sum(math.ceil(math.prod(shape) / ranks) for shape in model.shapes)
        params = weight * ((0 if engine.offload_params else part) + small)
        gradients = 4 * part
        buffers += weight * 2 * model.largest_block  # weights of the current and the next block
        if engine.hpz_partition_size > 1:
            params += weight * math.ceil(whole / engine.hpz_partition_size)
    optimizer, ema = 12 * part, 4 * part
    if not engine.offload_optimizer:
        return Memory(params, gradients, optimizer, ema, buffers, activations)
    # The EMA lies beside the master weights. Stage 3 has two copies of the gradients: the reduced ones, and those for
    # the CPU's Adam.
    host = optimizer + ema + (4 if stage < 3 else 8) * part + (weight * part if engine.offload_params else 0)
    return Memory(params, gradients if stage == 1 else 0, 0, 0, buffers, activations, host)


def _fsdp(model: Footprint, engine: FSDPConfig, group: int, grad_accum_steps: int, activations: int) -> Memory:
    # FSDP2 splits the first dimension; the first ranks have the larger parts.
    part = sum(math.ceil(shape[0] / group) * math.prod(shape[1:]) for shape in model.shapes)
    weight = BYTES[engine.precision]
    # Gradient accumulation adds up whole gradients in fp32.
    gradients = 4 * part if grad_accum_steps == 1 else 4 * model.parameters
    # `auto` counts as resharding here; `with_resharding` decides it.
    # The weights of the current and the next unit.
    largest = max(unit_elements(model, engine))
    live = 2 * largest if engine.reshard_after_forward else model.parameters
    # Gathered weights, and gradients that are being reduced.
    buffers = weight * live + 4 * 2 * largest if group > 1 else weight * live
    state = Memory(4 * part, gradients, 8 * part, 4 * part, buffers + model.buffers, activations)
    if not engine.cpu_offload:
        return state
    on_host = state.params + state.optimizer + state.ema + 4 * part
    return Memory(0, gradients if grad_accum_steps > 1 else 0, 0, 0, state.buffers, activations, on_host)


def unit_elements(model: Footprint, engine: FSDPConfig) -> list[int]:
    """Elements of each FSDP unit. The last one has the parameters outside of blocks."""
    elements = model.block_elements
    sizes = [BYTES[engine.precision] * count for count in elements]
    return [*map(sum, units_of(elements, sizes, engine.blocks_per_unit)), sum(map(math.prod, model.outside))]


def bytes_sent_per_step(
    model: Footprint, engine: AnyEngineConfig, *, ranks: int, ranks_per_node: int, grad_accum_steps: int
) -> float:
    """Bytes that each rank sends per step, with ring collectives."""
    found = collectives(
        model, engine, ranks=ranks, ranks_per_node=ranks_per_node, grad_accum_steps=grad_accum_steps
    )  # fmt: skip
    return sum(collective.bytes_sent for collective in found)


def collectives(
    model: Footprint, engine: AnyEngineConfig, *, ranks: int, ranks_per_node: int, grad_accum_steps: int
) -> list[Collective]:
    """The collectives of one step; empty for one rank."""
    if ranks == 1:
        return []
    world = Group(ranks, ranks_per_node)
    if isinstance(engine, DeepSpeedConfig):
        found = _deepspeed_collectives(model, engine, world, grad_accum_steps)
    else:
        found = _fsdp_collectives(model, engine, world, grad_accum_steps)
    return _muon_collectives(model, shard_group(engine, ranks, ranks_per_node), world) + found


def _muon_collectives(model: Footprint, shards: int, world: Group) -> list[Collective]:
    """Parts of matrices to their owners, while these compute other matrices, and the results to every replica."""
    if not model.muon.matrices:
        return []
    size, calls = MESSAGE_BYTES * model.muon.elements, rounds(model.muon, world.size)
    # An owner has one of the `shards` parts of its matrices itself. Every part of a result goes to each replica.
    arriving, leaving = size * (shards - 1) / shards, size / shards * (world.size - 1)
    others = (world.size - 1) / world.size  # of what a rank has, it sends this share
    return [
        Collective("all_to_all", "step", arriving / others, calls, world, True),
        Collective("all_to_all", "step", leaving / others, calls, world, False),
    ]


def _deepspeed_collectives(
    model: Footprint, engine: DeepSpeedConfig, world: Group, grad_accum_steps: int
) -> list[Collective]:
    whole, steps, overlap = model.parameters, grad_accum_steps, engine.overlaps
    weights, buckets = BYTES[engine.precision] * whole, math.ceil(whole / engine.reduce_bucket_elements)
    if engine.zero_stage == 0:
        return [Collective("all_reduce", "step", 4 * whole, buckets, world, False)]
    updated = Collective(
        "all_gather", "step", weights, math.ceil(whole / engine.allgather_bucket_elements), world, False
    )
    if engine.zero_stage == 1:  # reduces once, after the last backward pass
        return [Collective("reduce_scatter", "step", 4 * whole, buckets, world, False), updated]
    reduced = Collective("reduce_scatter", "backward", steps * 4 * whole, steps * buckets, world, overlap)
    if engine.zero_stage == 2:
        return [reduced, updated]
    hpz = engine.hpz_partition_size
    near = Group(hpz, world.ranks_per_node) if hpz > 1 else world
    # Stage 3 gathers each layer separately: its weight with its bias.
    gathers = steps * math.ceil(len(model.shapes) / 2)
    return [
        reduced,
        Collective("all_gather", "forward", steps * weights, gathers, world, True),
        Collective("all_gather", "backward", steps * weights, gathers, near, True),
    ]


def _fsdp_collectives(model: Footprint, engine: FSDPConfig, world: Group, grad_accum_steps: int) -> list[Collective]:
    shards = shard_group(engine, world.size, world.ranks_per_node)
    weights, steps = BYTES[engine.precision] * model.parameters, grad_accum_steps
    units = len(unit_elements(model, engine))
    found = []
    if shards > 1:
        group = Group(shards, world.ranks_per_node)
        found = [
            Collective("all_gather", "forward", steps * weights, steps * units, group, True),
            Collective("reduce_scatter", "backward", 4 * model.parameters, units, group, True),
        ]
        if engine.reshard_after_forward:
            found.append(Collective("all_gather", "backward", steps * weights, steps * units, group, True))
    if world.size > shards:
        across = Group(world.size // shards, world.ranks_per_node, stride=shards)
        found.append(Collective("all_reduce", "backward", 4 * model.parameters / shards, units, across, True))
    return found


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
    """The share of the blocks' forward FLOPs that activation checkpointing repeats.

    Selective mode saves the outputs of matmuls and attention. The rest is about a tenth.
    """
    return {"none": 0.0, "selective": 0.1, "block": 1.0}[engine.activation_checkpointing]


def engine_name(engine: AnyEngineConfig) -> str:
    """The usual name: ZeRO-2, ZeRO-3 + offload, FSDP2, HSDP."""
    if isinstance(engine, DeepSpeedConfig):
        return f"ZeRO-{engine.zero_stage}{' + offload' if engine.offload_optimizer else ''}"
    return {"full": "FSDP2", "hybrid": "HSDP", "replicate": "FSDP2 replicate"}[engine.sharding]
