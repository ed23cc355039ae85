"""Part 9: several GPUs: engines with equal losses, bandwidth of collectives, and a run that is stopped and resumed.

`torchrun -m benchmarks.gpu.ranks ARGUMENTS` is a rank of it. On a CPU two processes try the code.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu import shards
from benchmarks.gpu.report import Part
from benchmarks.gpu.workload import Workload, missing, support_older_torch, workload
from benchmarks.peer import DELTA_T, NULL_LABEL
from benchmarks.train_step import LAYOUT, batch_of, our_model, randomize
from sfd_scale.diffusion.conditioning import ClassLabels
from sfd_scale.diffusion.schedule import SemanticFirstSchedule
from sfd_scale.engines.engine import Engine
from sfd_scale.engines.fsdp import FSDPConfig, make_fsdp
from sfd_scale.engines.optim import AdamWConfig
from sfd_scale.models import attention
from sfd_scale.runtime import distributed, environment
from sfd_scale.runtime.device import synchronize
from sfd_scale.runtime.matmul import bf16_matmul_on_cpu
from sfd_scale.runtime.signals import REQUEUE_EXIT_CODE
from sfd_scale.training.semantic_first import SemanticFirstConfig, SemanticFirstObjective

STEPS, LOSS_LIMIT = 10, 5e-3
ENGINES = ("fsdp full", "fsdp full, whole weights", "fsdp replicate", "zero1", "zero2")
COLLECTIVES: dict[str, Callable[[int], float]] = {
    # Bytes that cross a link of a ring, for each byte of the result.
    "all_reduce": lambda ranks: 2 * (ranks - 1) / ranks,
    "reduce_scatter": lambda ranks: (ranks - 1) / ranks,
    "all_gather": lambda ranks: (ranks - 1) / ranks,
}


def run(part: Part, chosen: Workload) -> None:
    cuda = chosen.device.type == "cuda"
    ranks = torch.cuda.device_count() if cuda else 2
    if ranks < 2:
        part.leave_out("several GPUs", "this machine has one")
        return
    part.run(f"engines on {ranks} ranks", functools.partial(_engines, part, chosen, ranks))
    reason = missing(shards.PACKAGES)
    if reason is None:
        part.run(f"stop and resume on {ranks} ranks", functools.partial(_resume, part, chosen, ranks))
    else:
        part.leave_out("stop and resume", reason)


# -------------------------------------------------------------------------------------------------- processes


def finish(command: list[str], limit_s: float) -> None:
    """Run a launcher to its end.

    Raises:
        RuntimeError: if it fails; with the end of what it printed.
        TimeoutError: if it takes longer.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)
        log.seek(0)
        printed = log.read().decode(errors="replace")[-1500:]
    if code is None:
        raise TimeoutError(f"ended after {limit_s:.0f} s")
    if code:
        raise RuntimeError(f"exit code {code}: {printed}")


def end(process: subprocess.Popen[bytes]) -> None:
    """End a launcher that still runs: by SIGTERM, so that it ends its ranks, which have sessions of their own."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# ------------------------------------------------------------------------------------------------------ engines


def _engines(part: Part, chosen: Workload, ranks: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.jsonl")
        words = json.dumps({"depth": chosen.depth, "results": str(results)})
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        try:
            finish([*launcher, "-m", "benchmarks.gpu.ranks", words], part.budget_s - part.seconds)
        finally:
            lines = results.read_text(encoding="utf-8").splitlines() if results.is_file() else []
            report(part, [json.loads(line) for line in lines], ranks)


def report(part: Part, found: list[Mapping[str, Any]], ranks: int) -> None:
    """Facts and comparisons of what the ranks have measured."""
    reference: list[float] | None = None
    for entry in found:
        name = entry["name"]
        if "reason" in entry:
            part.leave_out(name, entry["reason"])
        elif "bytes_per_s" in entry:
            rate = entry["bytes_per_s"]
            part.fact(f"{name}, {ranks} ranks, bus bandwidth, bytes/s", rate, f"{rate / 1e9:.4g} GB/s")
        else:
            part.fact(f"{name}, {ranks} ranks, median step, s", entry["step_s"])
            reference = entry["losses"] if reference is None else reference
            apart = max(abs(a - b) / abs(b) for a, b in zip(entry["losses"], reference, strict=True))
            part.check(f"{name}: losses of {len(reference)} steps beside {ENGINES[0]}", apart, LOSS_LIMIT)


def rank(words: str) -> None:
    """One rank: measures, and on rank 0 writes a line for each result as it is made."""
    given = json.loads(words)
    support_older_torch()
    distributed.init()
    chosen = dataclasses.replace(workload(distributed.device()), depth=given["depth"])
    attention.activate("auto", chosen.device)
    for entry in _measured(chosen):
        if distributed.is_main():
            with Path(given["results"]).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        distributed.barrier()
    distributed.shutdown()


def _measured(chosen: Workload) -> Iterator[dict[str, Any]]:
    for name, share in COLLECTIVES.items():
        yield {"name": name, "bytes_per_s": _bus_bandwidth(name, chosen.device, share(distributed.world_size()))}
    for name in ENGINES:
        absent = missing(["deepspeed"]) if name.startswith("zero") else None
        if absent is not None:
            yield {"name": name, "reason": absent}
            continue
        losses, seconds = _steps(chosen, name)
        yield {"name": name, "losses": losses, "step_s": seconds}


def _bus_bandwidth(name: str, device: torch.device, share: float) -> float:
    ranks = distributed.world_size()
    whole = torch.ones((2**29 if device.type == "cuda" else 2**18) // ranks * ranks, device=device)
    own = torch.empty(whole.numel() // ranks, device=device)
    calls: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: dist.all_reduce(whole), "all_gather": lambda: dist.all_gather_into_tensor(whole, own),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(own, whole),
    }  # fmt: skip
    times = []
    for _ in range(8):
        distributed.barrier()
        synchronize(device)
        started = time.perf_counter()
        calls[name]()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return share * whole.numel() * whole.element_size() / statistics.median(times[3:])


def _make(chosen: Workload, name: str) -> Engine:
    with chosen.device:
        model = our_model(chosen.size, chosen.depth)
    randomize(model)
    if name.startswith("fsdp"):
        settings = FSDPConfig(
            precision=chosen.precision, compile=chosen.device.type == "cuda",
            sharding="replicate" if "replicate" in name else "full", reshard_after_forward="whole" not in name,
        )  # fmt: skip
        return make_fsdp(model, AdamWConfig(), settings)
    from sfd_scale.engines.deepspeed import DeepSpeedConfig, make_deepspeed

    stage: Any = int(name.removeprefix("zero"))
    zero = DeepSpeedConfig(precision=chosen.precision, compile=chosen.device.type == "cuda", zero_stage=stage)
    return make_deepspeed(model, AdamWConfig(), zero)


def _steps(chosen: Workload, name: str) -> tuple[list[float], float]:
    """Losses, the mean over the ranks, of some steps with equal weights, samples and draws; and the time of a step."""
    engine, count = _make(chosen, name), chosen.micro_batches[0]
    batch = batch_of(count)
    schedule = SemanticFirstSchedule(delta_t=DELTA_T)
    objective = SemanticFirstObjective(SemanticFirstConfig(), LAYOUT, schedule, ClassLabels(NULL_LABEL), seed=0)
    losses, times = [], []
    for step in range(STEPS):
        shift = torch.tensor([step, distributed.rank() * count])
        started = time.perf_counter()
        with bf16_matmul_on_cpu(chosen.device):
            terms = objective(engine.model, dataclasses.replace(batch, keys=batch.keys + shift).to(chosen.device))
            engine.backward(terms.total, last=True)
            engine.step(1e-4)
        synchronize(chosen.device)
        times.append(time.perf_counter() - started)
        losses.append(distributed.all_reduce_mean(terms.total.detach().clone()).item())
    engine.close()
    torch.compiler.reset()
    return losses, statistics.median(times[3:])


# ----------------------------------------------------------------------------------------------- stop and resume


def _resume(part: Part, chosen: Workload, ranks: int) -> None:
    """A run that SIGUSR1 stops and the same command resumes, beside one that was not stopped."""
    steps = 12
    with shards.shards(chosen) as folder:
        launch = [sys.executable, "-m", "sfd_scale.launch", "torchrun", "train", "train/sfd_xxl_fsdp"]
        commands = {
            name: [
                *launch, *shards.overrides(chosen, folder, name, steps), "train.log_every=1",
                f"train.global_batch={ranks * chosen.micro_batches[0]}",
            ]
            for name in ("whole", "stopped")
        }  # fmt: skip
        environment.set_variables({"RANKS": str(ranks)})
        finish(commands["whole"], part.budget_s - part.seconds)
        code = _stop(commands["stopped"], folder / "stopped" / "metrics.jsonl", part.budget_s)
        part.check("exit code after SIGUSR1 beside the requeue code", abs(code - REQUEUE_EXIT_CODE), 0)
        finish(commands["stopped"], part.budget_s)
        rows = [
            [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
            for name in ("whole", "stopped")
        ]
    worst = max(abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in zip(*rows, strict=True))
    part.check(f"losses of {len(rows[0])} steps, stopped and resumed beside not stopped", worst, LOSS_LIMIT)


def _stop(command: list[str], metrics: Path, limit_s: float) -> int:
    """Start a run, send SIGUSR1 to its launcher after some steps, and return its exit code."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + limit_s
    try:
        while process.poll() is None and time.monotonic() < until:
            if metrics.is_file() and metrics.read_text(encoding="utf-8").count("\n") >= 3:
                process.send_signal(signal.SIGUSR1)
                break
            time.sleep(0.05)
        return process.wait(max(1.0, until - time.monotonic()))
    finally:
        end(process)


if __name__ == "__main__":
    rank(sys.argv[1])
