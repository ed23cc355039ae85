"""Memory, time and cost of a recipe on N GPUs, before the start: arithmetic on the model's footprint and kernels.

Bytes and seconds throughout. costs.py has the memory and the collectives of each engine, step_time.py the time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sfd_scale.planning.costs import (
    MEMORY_FOR_WHOLE_WEIGHTS,
    AnyEngineConfig,
    Memory,
    bytes_sent_per_step,
    memory_per_rank,
    recompute_fraction,
    with_resharding,
)
from sfd_scale.planning.efficiency import Efficiency
from sfd_scale.planning.footprint import Footprint
from sfd_scale.planning.goodput import GPU_MTBF_HOURS, Goodput, goodput
from sfd_scale.planning.hardware import Hardware
from sfd_scale.planning.step_time import Step, StepTime, step_time
from sfd_scale.planning.work import Work
from sfd_scale.runtime.batch_split import BatchSplit, divisors, split_batch

# Usable share of a GPU's memory. CUDA's context, NCCL's buffers and fragmentation take the rest.
USABLE = 0.92
_CHECKPOINT_BYTES = 16  # per parameter: weight, both moments and EMA in fp32; 4 less for a matrix of Muon


@dataclass(frozen=True)
class PlannedRun:
    """The input of a plan: the model's footprint and kernels, and the recipe's numbers.

    flops_per_sample: forward and backward, without recomputation.
    sample_bytes: of the shards, both flips.
    save_every: steps between checkpoints. background: checkpoints are written while training continues.
    gpu_mtbf_hours: mean time between failures of one GPU.
    """

    footprint: Footprint
    work: Work
    flops_per_sample: float
    engine: AnyEngineConfig
    global_batch: int
    micro_batch: int | None
    steps: int
    ranks: int
    ranks_per_node: int
    sample_bytes: int
    samples: int
    kept_checkpoints: int
    save_every: int
    background: bool = True
    num_workers: int = 0
    gpu_mtbf_hours: float = GPU_MTBF_HOURS.value


@dataclass(frozen=True)
class Plan:
    """The answer.

    engine: the recipe's, with `reshard_after_forward: auto` decided.
    largest_micro_batch: 0 if not even one sample fits.
    time: parts of a step; None if the user states the MFU.
    total_seconds: of all steps, with the stalls of checkpoints and without failures.
    """

    engine: AnyEngineConfig
    split: BatchSplit
    memory: Memory
    largest_micro_batch: int
    checkpoint: int
    checkpoints: int
    data: int
    flops_per_step: float  # of the model
    optimizer_flops: float  # of Muon's orthogonalisation, on all ranks together
    peak_flops: float  # of a rank, in bf16 as in a run's metrics
    time: StepTime | None
    step_seconds: float
    bytes_sent_per_step: float  # by each rank
    total_seconds: float
    goodput: Goodput

    @property
    def mfu(self) -> float:
        """Of the FLOPs of the model. Those of the optimizer and of recomputation do not count; their time does."""
        return self.flops_per_step / (self.split.world_size * self.peak_flops * self.step_seconds)

    @property
    def days(self) -> float:
        """Without failures."""
        return self.total_seconds / 86400

    @property
    def gpu_hours(self) -> float:
        return self.total_seconds / 3600 * self.split.world_size

    @property
    def days_with_failures(self) -> float:
        return self.days / (1 - self.goodput.lost)

    @property
    def gpu_hours_with_failures(self) -> float:
        return self.gpu_hours / (1 - self.goodput.lost)

    @property
    def fits(self) -> bool:
        return self.split.micro_batch <= self.largest_micro_batch


def check_ranks(ranks: int, ranks_per_node: int) -> None:
    """Raises ValueError for a number of GPUs that no set of equal nodes has."""
    if ranks < 1:
        raise ValueError(f"--gpus: {ranks}; allowed: 1 and up")
    if ranks > ranks_per_node and ranks % ranks_per_node:
        below = ranks // ranks_per_node * ranks_per_node
        raise ValueError(
            f"--gpus: {ranks} with {ranks_per_node} per node; allowed: whole nodes, nearest {below} or "
            f"{below + ranks_per_node}"
        )


def memory_of(job: PlannedRun, micro_batch: int, grad_accum_steps: int) -> Memory:
    return memory_per_rank(
        job.footprint, job.engine, ranks=job.ranks, ranks_per_node=job.ranks_per_node, micro_batch=micro_batch,
        grad_accum_steps=grad_accum_steps,
    )  # fmt: skip


def largest_micro_batch(job: PlannedRun, hardware: Hardware) -> int:
    """The largest micro-batch that divides a rank's share of the batch and fits; 0 if none does."""
    share = job.global_batch // job.ranks
    usable = USABLE * hardware.memory
    return max((m for m in divisors(share) if memory_of(job, m, share // m).total <= usable), default=0)


def seconds_at_mfu(job: PlannedRun, peak_flops: float, mfu: float) -> float:
    """The time of one step at a stated MFU. Activation checkpointing repeats the blocks' forward pass, which MFU does
    not count."""
    work = job.flops_per_sample * (1 + recompute_fraction(job.engine) * job.footprint.block_share / 3)
    return job.global_batch * work / (job.ranks * peak_flops * mfu)


def split_of(job: PlannedRun, largest: int) -> BatchSplit:
    """The recipe's split of the batch; without a `micro_batch` in the recipe, the largest that fits.

    Raises:
        ValueError: if the ranks or the micro-batch do not divide the batch; the message names the nearest that do.
    """
    split = split_batch(job.global_batch, job.micro_batch, job.ranks)
    if job.micro_batch is None and 0 < largest < split.micro_batch:
        return BatchSplit(largest, job.global_batch // job.ranks // largest, job.ranks)
    return split


def decided_engine(job: PlannedRun, split: BatchSplit, hardware: Hardware) -> AnyEngineConfig:
    """The engine with `reshard_after_forward: auto` decided, as a run decides it."""
    return with_resharding(
        job.footprint, job.engine, MEMORY_FOR_WHOLE_WEIGHTS * hardware.memory, ranks=job.ranks,
        ranks_per_node=job.ranks_per_node, micro_batch=split.micro_batch, grad_accum_steps=split.grad_accum_steps,
    )  # fmt: skip


def step_of(job: PlannedRun, split: BatchSplit) -> Step:
    return Step(job.footprint, job.work, job.engine, split, job.ranks_per_node, job.num_workers)


def checkpoint_bytes(job: PlannedRun) -> int:
    """Of one checkpoint."""
    return _CHECKPOINT_BYTES * job.footprint.parameters - 4 * job.footprint.muon.elements


def save_seconds(job: PlannedRun, hardware: Hardware, efficiency: Efficiency) -> float:
    """Time that training waits for one checkpoint: the copy to the host, and the write if not in the background."""
    part = checkpoint_bytes(job) / job.ranks
    return part / hardware.pcie + (0.0 if job.background else part / efficiency.disk.value)


def plan(job: PlannedRun, hardware: Hardware, efficiency: Efficiency, mfu: float | None = None) -> Plan:
    """The plan of a run.

    Args:
        mfu: stated by the user, in place of the time model.

    Raises:
        ValueError: for an impossible number of ranks; the message names the nearest possible one.
    """
    check_ranks(job.ranks, job.ranks_per_node)
    if mfu is not None and not 0 < mfu <= 1:
        raise ValueError(f"--mfu: {mfu}; allowed: above 0, up to 1")
    split_batch(job.global_batch, job.micro_batch, job.ranks)
    largest = largest_micro_batch(job, hardware)
    split, peak = split_of(job, largest), hardware.peak_bf16
    engine = decided_engine(job, split, hardware)
    job = replace(job, engine=engine)
    time = step_time(step_of(job, split), hardware, efficiency) if mfu is None else None
    step = time.total if time is not None else seconds_at_mfu(job, peak, mfu or 1.0)
    checkpoint, save = checkpoint_bytes(job), save_seconds(job, hardware, efficiency)
    return Plan(
        engine=engine,
        split=split,
        memory=memory_of(job, split.micro_batch, split.grad_accum_steps),
        largest_micro_batch=largest,
        checkpoint=checkpoint,
        checkpoints=checkpoint * job.kept_checkpoints,
        data=job.sample_bytes * job.samples,
        flops_per_step=job.global_batch * job.flops_per_sample,
        optimizer_flops=job.footprint.muon.flops,
        peak_flops=peak,
        time=time,
        step_seconds=step,
        bytes_sent_per_step=bytes_sent_per_step(
            job.footprint, job.engine, ranks=job.ranks, ranks_per_node=job.ranks_per_node,
            grad_accum_steps=split.grad_accum_steps,
        ),
        total_seconds=job.steps * step + job.steps // job.save_every * save,
        goodput=goodput(
            ranks=job.ranks, save_every_s=job.save_every * step, save_s=save, restart_s=efficiency.restart.value,
            gpu_mtbf_hours=job.gpu_mtbf_hours,
        ),
    )  # fmt: skip
