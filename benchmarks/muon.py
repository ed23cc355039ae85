"""Muon's update: sharded by owner vs. on every rank, and batched Newton-Schulz vs. one matrix at a time.

The model has two of the twelve blocks of LightningDiT-S/1. Ranks share the cores of this machine, one thread each.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks import harness
from benchmarks.harness import Figure, Options
from benchmarks.train_step import our_model
from sfd_scale.engines.fsdp import FSDPConfig, make_fsdp
from sfd_scale.engines.muon import Muon, MuonConfig, orthogonalize, update_scale
from sfd_scale.runtime import distributed, environment

MUON = MuonConfig(momentum=0.95)
MUON_DEPTH = 2


def run(options: Options) -> list[Figure]:
    """Muon's updates/s, vs. a Muon that computes all matrices on every rank, and vs. one matrix at a time."""
    return [*(sharded_muon(ranks, options) for ranks in (2, 4)), batched_muon(options)]


def sharded_muon(ranks: int, options: Options) -> Figure:
    """Both on the same shards of FSDP2, on gloo ranks of this machine with one thread each."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="muon-") as folder:
        arguments = (ranks, folder, options.repeats or (1 if options.quick else 3), 1 if options.quick else MUON_DEPTH)
        processes = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"a rank of {ranks} failed: exit codes {[process.exitcode for process in processes]}")
        seconds = torch.load(Path(folder, "seconds.pt"), weights_only=True)
    return harness.compare(
        f"S/1 depth {arguments[-1]}, Muon on {ranks} ranks", seconds, against="every rank computes every matrix",
        work=1, unit="updates/s",
    )  # fmt: skip


def _rank(rank: int, ranks: int, folder: str, repeats: int, depth: int) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
    environment.set_variables({name: str(number) for name, number in place.items()})
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    model = our_model("S", depth)
    model.init_weights(0)
    engine = make_fsdp(model, MUON, FSDPConfig(precision="fp32"))
    assert isinstance(engine.optimizer, Muon)
    for parameter in engine.model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    replicated = _replicated(engine.optimizer, dict(engine.model.named_parameters()))
    seconds = harness.race(
        {"ours": engine.optimizer.step, "peer": replicated}, repeats, synchronize=distributed.barrier
    )
    if rank == 0:
        torch.save(seconds, Path(folder, "seconds.pt"))
    dist.barrier()
    dist.destroy_process_group()


def _replicated(optimizer: Muon, parameters: dict[str, torch.nn.Parameter]) -> Callable[[], None]:
    """The usual Muon on sharded weights: gather every momentum, compute every matrix, keep the own rows."""
    cuts: dict[str, int] = {}
    for matrix in optimizer.matrices:
        cuts[matrix.name] = cuts.get(matrix.name, 0) + 1
    groups = optimizer.param_groups

    @torch.no_grad()
    def step() -> None:
        for name, count in cuts.items():
            parameter, momentum = parameters[name], optimizer.state[parameters[name]]["exp_avg"]
            assert parameter.grad is not None
            momentum.lerp_(parameter.grad, 1 - MUON.momentum)
            update = torch.lerp(parameter.grad, momentum, MUON.momentum)
            assert isinstance(update, DTensor) and isinstance(parameter, DTensor)
            whole = update.full_tensor().unflatten(0, (count, -1))
            result = orthogonalize(whole, MUON) * update_scale(MUON, *whole.shape[1:])
            own = update.to_local()
            first = -(-len(update) // dist.get_world_size()) * dist.get_rank()
            parameter.to_local().sub_(result.flatten(0, 1)[first : first + len(own)], alpha=MUON.lr)
        optimizer.param_groups = [group for group in groups if not group.get("orthogonalized")]
        torch.optim.AdamW.step(optimizer)
        optimizer.param_groups = groups

    return step


def batched_muon(options: Options) -> Figure:
    """The matrices of a block of S/1, those of one shape in one batch."""
    heights = {384: 2 if options.quick else 12, 1024: 1 if options.quick else 3}
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(count, height, 384, generator=generator) for height, count in heights.items()]

    def one_by_one() -> list[Tensor]:
        return [orthogonalize(matrix[None], MUON) for batch in batches for matrix in batch]

    def batched() -> list[Tensor]:
        return [orthogonalize(batch, MUON) for batch in batches]

    seconds = harness.race({"ours": batched, "peer": one_by_one}, options.repeats or (1 if options.quick else 15))
    return harness.compare(
        "Newton-Schulz of a block of S/1", seconds, against="one matrix at a time", work=1, unit="blocks/s"
    )


if __name__ == "__main__":
    harness.main("muon", run)
