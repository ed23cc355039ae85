"""Part 8: the peak of the allocated memory in a training step, beside the plan of `sfd plan`."""

from __future__ import annotations

import functools
from typing import get_args

import torch

from benchmarks import harness
from benchmarks.gpu.report import Part
from benchmarks.gpu.workload import Workload, fresh, peak_gib
from benchmarks.train_step import LAYOUT, our_model, our_step
from sfd_scale.engines.block_transforms import Checkpointing
from sfd_scale.engines.fsdp import FSDPConfig
from sfd_scale.models import attention
from sfd_scale.planning.costs import memory_per_rank
from sfd_scale.planning.footprint import trace


def run(part: Part, chosen: Workload) -> None:
    attention.activate("auto", chosen.device)
    part.run("plan", lambda: _plans(part, chosen))
    if chosen.device.type != "cuda":
        part.leave_out("peak memory beside the plan", "needs a CUDA device")
        return
    count = chosen.micro_batches[0]
    for mode in get_args(Checkpointing):
        settings = chosen.engine(activation_checkpointing=mode)
        what = f"{chosen.name} micro-batch {count}, activation checkpointing {mode}, eager, peak memory"
        peak = part.run(what, functools.partial(_peak, chosen, count, settings))
        if peak is not None:
            planned = planned_gib(chosen, count, settings)
            part.figure(harness.measured(what, ours=peak, peer=planned, against="plan", unit="GiB"))


def _plans(part: Part, chosen: Workload) -> None:
    count = chosen.micro_batches[0]
    for mode in get_args(Checkpointing):
        planned = planned_gib(chosen, count, chosen.engine(activation_checkpointing=mode))
        part.fact(f"{chosen.name} micro-batch {count}, activation checkpointing {mode}: plan, GiB", round(planned, 2))


def planned_gib(chosen: Workload, count: int, settings: FSDPConfig) -> float:
    """Memory of one rank by the plan."""

    def forward(model: torch.nn.Module, samples: int) -> object:
        times = torch.zeros(samples)
        return model(torch.zeros(samples, *LAYOUT.shape), times, times, torch.zeros(samples, dtype=torch.long))

    model = trace(functools.partial(our_model, chosen.size, chosen.depth), forward, chosen.precision)
    planned = memory_per_rank(model, settings, ranks=1, ranks_per_node=1, micro_batch=count, grad_accum_steps=1)
    return planned.total / 2**30


def _peak(chosen: Workload, count: int, settings: FSDPConfig) -> float:
    fresh(chosen.device)
    step = our_step(chosen.size, count, settings, chosen.depth)
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    peak = peak_gib(chosen.device)
    assert peak is not None
    return peak
