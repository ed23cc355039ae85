"""Memory, time and cost of a recipe on N GPUs, before anything is started. Pure arithmetic on a model's footprint.

Bytes and seconds throughout. What each engine holds and sends is in engines/costs.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sfd_scale.planning.costs import (
    AnyEngineConfig,
    Memory,
    bytes_sent_per_step,
    engine_name,
    memory_per_rank,
    recompute_fraction,
)
from sfd_scale.planning.footprint import Footprint
from sfd_scale.runtime.batch_split import BatchSplit, divisors, split_batch

# Share of a GPU's memory that tensors can have: the rest is CUDA's context, NCCL's buffers and fragmentation.
USABLE = 0.92
# Steps a run takes at best, in use of the FLOPs that a maker states; give a measured one for anything that costs money.
ASSUMED_MFU = 0.40


@dataclass(frozen=True)
class Device:
    """A GPU: its name in accelerators.py, which knows its FLOPs, and its memory by the maker's data sheet."""

    name: str
    memory: float


DEVICES = {
    "a100-40g": Device("A100", 40e9), "a100": Device("A100", 80e9), "h100": Device("H100", 80e9),
    "h200": Device("H200", 141e9), "h20": Device("H20", 96e9), "b200": Device("B200", 180e9),
    "l40s": Device("L40S", 48e9), "a6000": Device("A6000", 48e9), "4090": Device("4090", 24e9),
}  # fmt: skip


@dataclass(frozen=True)
class PlannedRun:
    """What is planned: a model's footprint with the recipe's numbers."""

    footprint: Footprint
    flops_per_sample: float  # forward and backward; recomputation is not counted
    engine: AnyEngineConfig
    global_batch: int
    micro_batch: int | None
    steps: int
    ranks: int
    ranks_per_node: int
    sample_bytes: int  # of the shards, both flips
    samples: int
    kept_checkpoints: int


@dataclass(frozen=True)
class Plan:
    """The answer; `largest_micro_batch` is 0 where not even one sample fits."""

    split: BatchSplit
    memory: Memory
    largest_micro_batch: int
    checkpoint: int
    checkpoints: int
    data: int
    flops_per_step: float
    peak_flops: float  # of a rank
    mfu: float
    step_seconds: float
    bytes_sent_per_step: float  # bytes that a rank sends
    total_seconds: float

    @property
    def days(self) -> float:
        return self.total_seconds / 86400

    @property
    def gpu_hours(self) -> float:
        return self.total_seconds / 3600 * self.split.world_size


def check_ranks(ranks: int, ranks_per_node: int) -> None:
    """Raises ValueError for a number of GPUs that no set of equal nodes has."""
    if ranks < 1:
        raise ValueError(f"--gpus: {ranks}; allowed: 1 and up")
    if ranks > ranks_per_node and ranks % ranks_per_node:
        below = ranks // ranks_per_node * ranks_per_node
        raise ValueError(
            f"--gpus: {ranks} with {ranks_per_node} a node; allowed: whole nodes, nearest {below} or "
            f"{below + ranks_per_node}"
        )


def memory_of(job: PlannedRun, micro_batch: int, grad_accum_steps: int) -> Memory:
    return memory_per_rank(
        job.footprint, job.engine, ranks=job.ranks, ranks_per_node=job.ranks_per_node, micro_batch=micro_batch,
        grad_accum_steps=grad_accum_steps,
    )  # fmt: skip


def seconds(job: PlannedRun, peak_flops: float, mfu: float) -> float:
    """Of one step: the model's FLOPs at the stated use of the peak; checkpointing does the forward pass of its blocks
    again, which the use of the peak (MFU) does not count."""
    work = job.flops_per_sample * (1 + recompute_fraction(job.engine) * job.footprint.block_share / 3)
    return job.global_batch * work / (job.ranks * peak_flops * mfu)


def plan(job: PlannedRun, device: Device, peak_flops: float, mfu: float = ASSUMED_MFU) -> Plan:
    """The plan of a job.

    Raises:
        ValueError: for a number of ranks that cannot be, naming the nearest that can.
    """
    check_ranks(job.ranks, job.ranks_per_node)
    if not 0 < mfu <= 1:
        raise ValueError(f"--mfu: {mfu}; allowed: above 0, up to 1")
    split = split_batch(job.global_batch, job.micro_batch, job.ranks)
    usable = USABLE * device.memory
    share = job.global_batch // job.ranks
    fits = [m for m in divisors(share) if memory_of(job, m, share // m).total <= usable]
    largest = max(fits, default=0)
    if job.micro_batch is None and 0 < largest < split.micro_batch:
        split = BatchSplit(largest, share // largest, job.ranks)
    step = seconds(job, peak_flops, mfu)
    checkpoint = 16 * job.footprint.parameters
    return Plan(
        split=split,
        memory=memory_of(job, split.micro_batch, split.grad_accum_steps),
        largest_micro_batch=largest,
        checkpoint=checkpoint,
        checkpoints=checkpoint * job.kept_checkpoints,
        data=job.sample_bytes * job.samples,
        flops_per_step=job.global_batch * job.flops_per_sample,
        peak_flops=peak_flops,
        mfu=mfu,
        step_seconds=step,
        bytes_sent_per_step=bytes_sent_per_step(
            job.footprint,
            job.engine,
            ranks=job.ranks,
            ranks_per_node=job.ranks_per_node,
            grad_accum_steps=split.grad_accum_steps,
        ),
        total_seconds=step * job.steps,
    )


def quantities(made: Plan, device: Device) -> list[tuple[str, str]]:
    """The plan as rows of (what, how much), for people."""
    memory, gib = made.memory, 2**30
    rows = [(name, f"{getattr(memory, name) / gib:.2f} GiB") for name in ("params", "gradients", "optimizer", "ema")]
    rows += [("buffers", f"{memory.buffers / gib:.2f} GiB"), ("activations", f"{memory.activations / gib:.2f} GiB")]
    share = memory.total / device.memory
    rows += [
        ("memory of the fullest rank", f"{memory.total / gib:.2f} GiB, {share:.0%} of {device.memory / 1e9:.0f} GB")
    ]
    if memory.host:
        rows += [("host memory a rank", f"{memory.host / gib:.2f} GiB")]
    batch = f"{made.split.micro_batch} × {made.split.grad_accum_steps} × {made.split.world_size} ranks"
    fits = str(made.largest_micro_batch) if made.largest_micro_batch else "none: not one sample fits"
    rows += [("micro-batch × accumulation", batch), ("largest micro-batch that fits", fits)]
    rows += [("checkpoint", f"{made.checkpoint / 1e9:.1f} GB, kept {made.checkpoints / 1e9:.1f} GB")]
    rows += [("data", f"{made.data / 1e9:.1f} GB"), ("FLOPs a step", f"{made.flops_per_step:.3g}")]
    rows += [("sent a step by each rank", f"{made.bytes_sent_per_step / 1e9:.2f} GB")]
    rows += [
        ("step", f"{made.step_seconds:.3f} s at {made.mfu:.0%} of {made.peak_flops / 1e12:,.0f} TFLOP/s"),
        ("whole run", f"{made.days:.1f} days, {made.gpu_hours:,.0f} GPU-hours"),
    ]
    return rows


def table_row(recipe: str, job: PlannedRun, made: Plan) -> list[str]:
    """One line of the table that compares engines and numbers of GPUs; see `TABLE_HEAD`."""
    memory, gib = made.memory, 2**30
    parts = [memory.params, memory.gradients, memory.optimizer, memory.ema, memory.buffers, memory.activations]
    return [
        recipe, engine_name(job.engine), str(job.ranks), f"{made.split.micro_batch} × {made.split.grad_accum_steps}",
        *[f"{part / gib:.2f}" for part in parts], f"{memory.total / gib:.1f}", str(made.largest_micro_batch),
        f"{made.bytes_sent_per_step / 1e9:.2f}", f"{made.step_seconds:.3f}", f"{made.days:.1f}",
        f"{made.gpu_hours:,.0f}",
    ]  # fmt: skip


TABLE_HEAD = (
    "recipe", "engine", "GPUs", "micro-batch × accumulation", "params", "gradients", "optimizer", "EMA", "buffers",
    "activations", "GiB a rank", "largest micro-batch", "GB sent a step", "s a step", "days", "GPU-hours",
)  # fmt: skip


def markdown(rows: Sequence[Sequence[str]], head: Sequence[str] = TABLE_HEAD) -> str:
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
