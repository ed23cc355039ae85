"""The time of one training step, part by part."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from sfd_scale.engines.deepspeed import DeepSpeedConfig
from sfd_scale.engines.flat_parameters import is_flat
from sfd_scale.planning import collectives as links
from sfd_scale.planning.collectives import Collective
from sfd_scale.planning.costs import AnyEngineConfig, collectives, shard_group, unit_elements
from sfd_scale.planning.efficiency import Efficiency
from sfd_scale.planning.footprint import BYTES, Footprint
from sfd_scale.planning.hardware import Hardware
from sfd_scale.planning.kernels import attention_seconds, elementwise_seconds, matmul_seconds
from sfd_scale.planning.muon_cost import MESSAGE_BYTES, orthogonalization_seconds
from sfd_scale.planning.work import Operation, Work
from sfd_scale.runtime.batch_split import BatchSplit

# AdamW reads weight, gradient and both moments and writes three of them; the norm reads the gradient again; EMA reads
# two numbers and writes one.
_UPDATE_BYTES = 4 * (4 + 3 + 1 + 3)
# Muon reads gradient and momentum for the momentum, and again for Nesterov's step, and writes both; a message is
# written, and its result is read and converted; the update reads the weight and the result and writes the weight.
_MUON_UPDATE_BYTES = 4 * (3 + 3 + 3 + 1 + 3) + 3 * 4 + 2 * MESSAGE_BYTES


@dataclass(frozen=True)
class Step:
    """One step of a run on equal ranks.

    num_workers: processes that read data; 0 reads on the main thread.
    """

    model: Footprint
    work: Work
    engine: AnyEngineConfig
    split: BatchSplit
    ranks_per_node: int
    num_workers: int = 0


@dataclass(frozen=True)
class StepTime:
    """Seconds of each part of a step. The parts add up to the step.

    copies: of the engine, into and out of its communication buffers. communication: what computation does not hide,
    and its slowdown beside hidden communication. host: waiting for kernels that the host has not launched yet.
    """

    matmul: float
    attention: float
    elementwise: float
    copies: float
    optimizer: float
    communication: float
    host: float
    data: float

    @property
    def total(self) -> float:
        return sum(seconds for _, seconds in self.parts)

    @property
    def parts(self) -> list[tuple[str, float]]:
        return [(field.name, getattr(self, field.name)) for field in fields(self)]

    @property
    def bound(self) -> str:
        """The part that takes longest."""
        return max(self.parts, key=lambda part: part[1])[0]


def step_time(step: Step, hardware: Hardware, efficiency: Efficiency) -> StepTime:
    """The time of a step.

    The GPU computes while the host launches kernels ahead of it; the slower of them sets the pace. Communication runs
    beside the computation of its phase, if the engine overlaps it. The update, and reading on the main thread, follow.
    Muon's matrices go to their owners while these compute.
    """
    accumulated = step.split.grad_accum_steps
    forward = _compute(step, False, hardware, efficiency)
    backward = _compute(step, True, hardware, efficiency)
    matmul, attention, elementwise = (accumulated * (a + b) for a, b in zip(forward, backward, strict=True))
    copies = _copy_bytes(step) / (hardware.bandwidth * efficiency.memory.value)
    muon = orthogonalization_seconds(step.model.muon, step.split.world_size, hardware, efficiency)
    windows = {"forward": accumulated * sum(forward), "backward": accumulated * sum(backward), "step": muon}
    sent = collectives(
        step.model, step.engine, ranks=step.split.world_size, ranks_per_node=step.ranks_per_node,
        grad_accum_steps=accumulated,
    )  # fmt: skip
    exposed = sum(_exposed(sent, phase, windows[phase], hardware, efficiency) for phase in ("forward", "backward"))
    tail = _exposed(sent, "step", windows["step"], hardware, efficiency)
    device, host = matmul + attention + elementwise + copies + exposed, _host_seconds(step, efficiency)
    waiting = max(0.0, host - device) if hardware.asynchronous else host
    optimizer = _update_seconds(step, hardware, efficiency) + muon
    before_data = device + waiting + tail + optimizer
    return StepTime(
        matmul=matmul, attention=attention, elementwise=elementwise, copies=copies, optimizer=optimizer,
        communication=exposed + tail, host=waiting, data=_data_seconds(step, before_data, efficiency),
    )  # fmt: skip


def _compute(step: Step, backward: bool, hardware: Hardware, efficiency: Efficiency) -> tuple[float, float, float]:
    """Seconds of matmuls, attention and elementwise operations of forward or backward of one micro-batch.

    Backward includes the parts of forward that activation checkpointing repeats.
    """
    work, mode = step.work, step.engine.activation_checkpointing
    inside, outside = (list(work.select(backward=backward, in_block=place)) for place in (True, False))
    again = list(work.select(backward=False, in_block=True)) if backward and mode != "none" else []
    if mode == "selective":
        again = [(operation, count) for operation, count in again if operation.kind == "elementwise"]
    matmul = attention = elementwise = 0.0
    for operations, compiled in ((inside + again, step.engine.compile), (outside, False)):
        found = _seconds(step, operations, compiled, hardware, efficiency)
        matmul, attention, elementwise = matmul + found[0], attention + found[1], elementwise + found[2]
    return matmul, attention, elementwise


def _seconds(
    step: Step, operations: Iterable[tuple[Operation, int]], compiled: bool, hardware: Hardware, efficiency: Efficiency
) -> tuple[float, float, float]:
    return kernel_seconds(operations, step.split.micro_batch, step.work.precision, compiled, hardware, efficiency)


def kernel_seconds(
    operations: Iterable[tuple[Operation, int]], samples: int, precision: str, compiled: bool, hardware: Hardware,
    efficiency: Efficiency,
) -> tuple[float, float, float]:  # fmt: skip
    """Seconds of matmuls, of attention and of elementwise operations, which torch.compile fuses."""
    matmul = attention = moved = launched = 0.0
    for operation, count in operations:
        shape = operation.shape(samples)
        if operation.kind == "matmul":
            matmul += count * matmul_seconds(shape, precision, hardware, efficiency)
        elif operation.kind == "attention":
            attention += count * attention_seconds(shape, operation.backward, precision, hardware, efficiency)
        else:
            moved, launched = moved + count * shape[0], launched + count
    if compiled:
        moved, launched = moved * efficiency.fused_bytes.value, launched * efficiency.fused_launches.value
    return matmul, attention, elementwise_seconds(moved, launched, hardware, efficiency)


def forward_seconds(work: Work, samples: int, compiled: bool, hardware: Hardware, efficiency: Efficiency) -> float:
    """The time of one forward pass without gradients: the kernels, or the host that launches them if it is slower."""
    total, launched = 0.0, 0.0
    for in_block in (True, False):
        operations = list(work.select(backward=False, in_block=in_block))
        fused = compiled and in_block
        total += sum(kernel_seconds(operations, samples, work.precision, fused, hardware, efficiency))
        for operation, count in operations:
            left = efficiency.fused_launches.value if fused and operation.kind == "elementwise" else 1.0
            launched += left * count
    host = launched * efficiency.launch.value
    return max(total, host) if hardware.asynchronous else total + host


def _exposed(sent: list[Collective], phase: str, window: float, hardware: Hardware, efficiency: Efficiency) -> float:
    """Seconds by which the collectives of a phase lengthen its computation of `window` seconds."""
    hidden = first = serial = 0.0
    for collective in sent:
        if collective.phase == phase:
            seconds = links.seconds(collective, hardware, efficiency)
            if collective.overlapped:
                # The first gather has nothing to hide behind, and neither has the last reduction.
                hidden, first = hidden + seconds, max(first, seconds / collective.calls)
            else:
                serial += seconds
    return serial + max(first, hidden - window) + efficiency.contention.value * min(hidden, window)


def launches(step: Step, efficiency: Efficiency) -> float:
    """Kernels that the host launches for one micro-batch."""
    work, mode = step.work, step.engine.activation_checkpointing
    again = list(work.select(backward=False, in_block=True)) if mode != "none" else []
    inside = [*work.select(in_block=True), *again]
    elementwise = sum(count for operation, count in inside if operation.kind == "elementwise")
    others = sum(count for _, count in inside) - elementwise
    left = efficiency.fused_launches.value if step.engine.compile else 1.0
    return others + left * elementwise + work.launches(in_block=False) + efficiency.step_launches.value


def _host_seconds(step: Step, efficiency: Efficiency) -> float:
    """Host time of forward and backward of all micro-batches: launches, and the hooks of the engine."""
    engine, hooked = step.engine, step.work.blocks + 1.0
    if isinstance(engine, DeepSpeedConfig):
        by_stage = (0.0, efficiency.hook_zero1.value, efficiency.hook_zero2.value, efficiency.hook_zero3.value)
        hook = by_stage[engine.zero_stage]
    else:
        hook = efficiency.hook_fsdp.value
        if engine.reshard_after_forward and engine.sharding != "replicate":
            hook += efficiency.hook_reshard.value
        by_unit = efficiency.hook_unit.value
        hooked = (1 - by_unit) * hooked + by_unit * len(unit_elements(step.model, engine))
    if _flattens(step):
        hook *= efficiency.hook_flat.value
    each = launches(step, efficiency) * efficiency.launch.value + hooked * hook
    return step.split.grad_accum_steps * each


def _flattens(step: Step) -> bool:
    """Whether the blocks have flat parameters."""
    return is_flat(step.engine, step.model.block_elements, muon=step.model.muon.elements > 0)


def _copy_bytes(step: Step) -> float:
    """Bytes that an engine copies on the GPU in a step: weights out of gathered buffers, gradients into them."""
    engine, whole, steps = step.engine, step.model.parameters, step.split.grad_accum_steps
    weight = BYTES[engine.precision]
    into_flat = steps * 2 * weight * sum(step.model.block_elements) if _flattens(step) else 0
    if isinstance(engine, DeepSpeedConfig):
        into_buckets = (weight + 4) * whole * (1 if engine.zero_stage < 2 else steps)
        gathers = 2 * steps if engine.zero_stage == 3 else 1
        return into_flat + into_buckets + gathers * 2 * weight * whole
    if engine.precision == "fp32" and step.split.world_size == 1:
        return 0.0
    gathers = steps * (2 if engine.reshard_after_forward else 1)
    return into_flat + gathers * 2 * weight * whole + (weight + 4) * whole


def _update_seconds(step: Step, hardware: Hardware, efficiency: Efficiency) -> float:
    """AdamW and EMA on the part of one rank; with offload, by the CPU and over PCIe. Muon without its iterations."""
    engine = step.engine
    group = shard_group(engine, step.split.world_size, step.ranks_per_node)
    part = step.model.parameters / group
    on_host = engine.offload_optimizer if isinstance(engine, DeepSpeedConfig) else engine.cpu_offload
    if not on_host:
        matrices = step.model.muon.elements / group
        moved = (part - matrices) * _UPDATE_BYTES + matrices * _MUON_UPDATE_BYTES
        return moved / (hardware.bandwidth * efficiency.memory.value)
    copied = part * (4 + BYTES[engine.precision]) / hardware.pcie  # gradients out, weights back
    return copied + part * _UPDATE_BYTES / efficiency.host_memory.value


def _data_seconds(step: Step, rest: float, efficiency: Efficiency) -> float:
    """Time that a step waits for its data and random numbers; worker processes read while the GPU computes."""
    samples = step.split.micro_batch * step.split.grad_accum_steps
    reading = samples * efficiency.read.value
    waiting = reading if step.num_workers == 0 else max(0.0, reading / step.num_workers - rest)
    return waiting + samples * efficiency.draw.value
