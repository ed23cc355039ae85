"""The GPU benchmark: what it needs, what its comparisons catch, its files, and a tiny run of all of it on the CPU."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from benchmarks import harness
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import attention, equality, ranks, report, step_profile, training, workload
from benchmarks.gpu.report import Part
from benchmarks.train_step import our_step
from sfd_scale import plan
from sfd_scale.engines import block_transforms
from sfd_scale.engines.block_transforms import use_float8
from sfd_scale.engines.fsdp import FSDPConfig
from sfd_scale.planning.measured import SUSTAINED_COPY, SUSTAINED_MATMUL, BenchResults, read_throughput

CPU = torch.device("cpu")
QUICK = workload.workload(CPU, quick=True)
# Packages that a machine with only torch and numpy lacks.
MISSING = (
    "deepspeed", "streaming", "omegaconf", "rich", "typer", "wandb", "safetensors", "timm", "diffusers", "torchvision",
    "scipy", "PIL", "psutil", "torch_fidelity",
)  # fmt: skip


def test_it_needs_torch_and_numpy_alone() -> None:
    program = f"import sys; sys.modules.update(dict.fromkeys({MISSING})); import benchmarks.gpu.__main__"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("head_dim", [64, 72])
def test_attention_in_bf16_is_within_its_tolerance(head_dim: int) -> None:
    assert attention.attention_error(CPU, head_dim) < attention.TOLERANCE


def test_attention_of_another_scale_is_beyond_it(monkeypatch: pytest.MonkeyPatch) -> None:
    right = functional.scaled_dot_product_attention
    # A kernel that pads heads of 72 to 80 and scales by the padded width.
    monkeypatch.setattr(
        functional, "scaled_dot_product_attention", lambda q, k, v: right(q, k, v, scale=1 / math.sqrt(80))
    )
    assert attention.attention_error(CPU, 72) > attention.TOLERANCE


def test_float8_is_refused_where_it_cannot_run() -> None:
    with pytest.raises(ValueError, match="engine.float8: true, but it needs"):
        use_float8(torch.nn.Module(), CPU)
    with pytest.raises(ValueError, match="float8: true; allowed with precision bf16 and compile true"):
        FSDPConfig(float8=True)


@pytest.mark.parametrize(("installed", "refused"), [("0.17.9", True), ("0.18.0", False), ("0.19.1", False)])
def test_a_torchao_that_can_give_nan_is_refused(installed: str, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_transforms.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(block_transforms.importlib.metadata, "version", lambda name: installed)
    reason = block_transforms.float8_missing(CPU)
    assert reason == (f"it needs torchao 0.18 or newer, and {installed} is installed" if refused else
                      "it needs a CUDA device")  # fmt: skip


@pytest.mark.gpu
def test_float8_follows_the_loss_of_bf16() -> None:
    losses = {}
    for float8 in (False, True):
        settings = FSDPConfig(sharding="replicate", compile=True, float8=float8)
        step = our_step("S", 8, settings, depth=2)
        losses[float8] = [float(step()) for _ in range(30)]  # type: ignore[arg-type]
    assert losses[False][-1] < losses[False][0]
    assert losses[True] == pytest.approx(losses[False], rel=2e-2)


def test_every_attention_kernel_is_timed_and_one_that_fails_ends_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[object] = []
    monkeypatch.setattr(attention.attention_speed, "record", lambda *given: recorded.append(given))
    right = attention.attention_error

    def broken(device: torch.device, head_dim: int, dtype: torch.dtype) -> float:
        if head_dim == 64:
            raise RuntimeError("Triton Error")
        return right(device, head_dim, dtype)

    monkeypatch.setattr(attention, "attention_error", broken)
    part = Part("attention", 100)
    attention.run(part, QUICK)
    assert [name for name in part.failed if "64" in name] == part.failed and len(part.failed) == 2
    assert [check["what"] for check in part.checks] == [f"attention {b}, (1, 256, 16, 72)" for b in ("sdpa", "math")]
    assert not recorded  # times of a CPU order nothing
    assert all("ms" in name and value > 0 for name, value in part.facts.items())
    wrong = [attention.Timed("sdpa", 64, "", 0.1, 1.0), attention.Timed("flash3", 64, "", 1e-3, 2.0)]
    attention.record("NVIDIA H200", wrong)
    assert recorded == [("NVIDIA H200", {"64": {"flash3": 2.0}})]


def test_what_fails_ends_nothing_else_and_every_result_is_in_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "gpu-x.json"
    part = Part("training", 100, path, {"date": "2026-01-01"})

    def broken() -> None:
        raise RuntimeError("Triton Error")

    def too_large() -> None:
        raise torch.OutOfMemoryError

    part.run("first", broken)
    part.run("second", too_large)
    part.run("late", functools.partial(ranks.finish, [sys.executable, "-c", "import time; time.sleep(60)"], 0.1))
    part.figure(harness.measured("third", ours=2.0, peer=math.nan, against="it", unit="1/s", better="higher"))
    part.figure(harness.measured("third", ours=2.0, peer=1.0, against="it", unit="1/s", better="higher"))
    part.figure(harness.measured("rate", ours=2.0, peer=math.nan, against="it", unit="1/s", better="higher"))
    part.check("fourth", math.nan, 1.0)
    content = json.loads(path.read_text(), parse_constant=pytest.fail)
    written = content["parts"]["training"]
    assert written["ended"] is None and written["failed"] == [
        "fourth",
        "first",
    ]  # no memory and no time are no failures
    assert [entry["reason"] for entry in written["left_out"]] == [
        "failed: RuntimeError: Triton Error",
        "out of memory",
        "ended after 0 s",
    ]
    # A figure whose peer is measured later stands there once.
    assert [(row["what"], row["peer"]) for row in content["figures"]] == [("third", 1.0), ("rate", None)]
    assert math.isnan(harness.figures_of(content)[1].peer)
    # Another part, and the same one again: each replaces itself alone.
    Part("sampling", 1, path).finish()
    again = Part("training", 1, path)
    again.finish()
    assert list(report.read(path)["parts"]) == ["training", "sampling"] and report.read(path)["figures"] == []


def test_nothing_starts_without_the_time_of_the_longest_step_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    part, done = Part("training", 100), list[str]()

    def step(name: str, seconds: float) -> None:
        now[0] += seconds
        done.append(name)

    for name, seconds in (("a", 40), ("b", 10), ("c", 20), ("d", 1)):
        part.run(name, functools.partial(step, name, seconds))
    assert done == ["a", "b", "c"]  # d may take as long as a did, and 30 s are left for it
    assert [entry["what"] for entry in part.left_out] == ["d"]


def test_every_part_ends_within_100_seconds() -> None:
    assert len(gpu.PARTS) == 9
    assert all(entry.seconds <= 100 for entry in gpu.PARTS.values())


def test_a_part_that_dies_is_recorded_and_ends_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that ends the process, say: its results so far stay."""
    options, _ = gpu.parse(["machine", "--device", "cpu", "--out", str(tmp_path)])
    assert options.path is not None

    def die(command: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
        part = Part(command[5], 100, options.path)
        part.fact("before", 1)
        return subprocess.CompletedProcess(command, -11)

    monkeypatch.setattr(gpu.subprocess, "run", die)
    found = gpu._apart(options, "machine")
    assert found["facts"] == {"before": 1} and found["failed"] == ["machine: the process ended with -11"]
    assert report.read(options.path)["parts"]["machine"]["ended"] == "the process ended with -11"


def test_gradients_of_another_arithmetic_are_beyond_the_limit() -> None:
    right = equality.train(QUICK, QUICK.engine())
    again = equality.train(QUICK, QUICK.engine())
    assert right.differs(again) == (0.0, 0.0)
    # Under FSDP2, whose gradients are shards, as on a GPU.
    wrapped = dataclasses.replace(QUICK, precision="bf16")
    assert 0 < equality.train(wrapped, wrapped.engine()).differs(right)[0] < 0.05
    other = equality.train(dataclasses.replace(QUICK, check_batch=2), QUICK.engine())
    gradient, loss = other.differs(right)
    assert gradient > 10 * equality.GRADIENT_FLOOR and loss > equality.LOSS_FLOOR


def test_the_draws_that_a_thread_makes_ahead_give_the_same_steps() -> None:
    losses = []
    for read_ahead in (False, True):
        step: Callable[[], Any] = our_step("S", 1, QUICK.engine(), 1, read_ahead=read_ahead)
        losses.append([float(step()) for _ in range(2)])
    assert losses[0] == losses[1]


def kernel(name: str, start: float, length: float, number: int) -> dict[str, Any]:
    return {"cat": "kernel", "name": name, "ts": start, "dur": length, "args": {"correlation": number}}


def launch(start: float, number: int) -> dict[str, Any]:
    return {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": start, "dur": 5, "args": {"correlation": number}}


def test_the_profile_has_groups_gaps_and_the_lead_of_the_host() -> None:
    events = [
        launch(0, 1), launch(10, 2), launch(900, 3), {"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 1},
        kernel("nvjet_tst_128x256_64x4", 100, 300, 1),
        kernel("triton_per_fused__scaled_dot_product_attention_3", 200, 300, 2),  # overlaps, until 500
        kernel("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", 1000, 100, 3),
    ]  # fmt: skip
    found = step_profile.summary(events)
    assert found.span == pytest.approx(1e-3) and found.busy == pytest.approx(5e-4) and found.idle == pytest.approx(0.5)
    assert found.groups == pytest.approx({"matmul": 3e-4, "compiled elementwise": 3e-4, "attention": 1e-4})
    assert (found.ahead_median, found.ahead_least) == pytest.approx((1e-4, 1e-4)) and found.kernels == 3
    with pytest.raises(ValueError, match="recorded no kernels"):
        step_profile.summary([launch(0, 1)])


def test_a_launcher_that_fails_or_takes_too_long_is_an_error_with_its_last_words() -> None:
    with pytest.raises(RuntimeError, match="exit code 3: no such thing"):
        ranks.finish([sys.executable, "-c", "import sys; print('no such thing'); sys.exit(3)"], 30)
    with pytest.raises(TimeoutError, match="ended after 0 s"):
        ranks.finish([sys.executable, "-c", "import time; time.sleep(60)"], 0.2)


def test_losses_that_differ_between_engines_fail() -> None:
    part = Part("ranks", 100)
    entries: list[dict[str, Any]] = [
        {"name": "all_reduce", "bytes_per_s": 4e11}, {"name": "fsdp full", "losses": [2.0, 1.5], "step_s": 0.1},
        {"name": "zero1", "losses": [2.0, 1.501], "step_s": 0.1}, {"name": "zero2", "reason": "needs deepspeed"},
        {"name": "fsdp replicate", "losses": [2.0, 1.6], "step_s": 0.1},
    ]  # fmt: skip
    ranks.report(part, entries, 8)
    assert part.failed == ["fsdp replicate: losses of 2 steps beside fsdp full"]
    assert part.left_out == [{"what": "zero2", "reason": "needs deepspeed"}]
    assert part.facts["all_reduce, 8 ranks, bus bandwidth, bytes/s"] == 4e11


def test_the_planner_reads_the_file(tmp_path: Path) -> None:
    path = tmp_path / "gpu-nvidia-h200.json"
    chosen = dataclasses.replace(QUICK, size="XXL", precision="bf16")
    part = Part("training", 100, path)
    part.figure(training.target(chosen, 0.42))
    rate = workload.Rate(300.0, 60.0)
    what = f"{chosen.name} {chosen.precision} training, micro-batch 64, activation checkpointing none"
    part.figure(workload.figure(what, rate, None, "samples/s", ", MFU 42.0%"))
    device = Part("machine", 100, path)
    device.fact(SUSTAINED_MATMUL, 7.9e14)
    device.fact(SUSTAINED_COPY, 4.3e12)
    found = read_throughput(path)
    assert isinstance(found, BenchResults) and (found.matmul_flops, found.copy_bytes) == (7.9e14, 4.3e12)
    assert [(f.size, f.micro_batch, f.samples_per_s) for f in found.figures] == [("XXL", 64, 300.0)]
    usual = plan.make_machine("h200", None, 8, None)
    known = plan._with_sustained_rates(usual, found, path)
    assert known.hardware.tensor_share == pytest.approx(7.9e14 / usual.hardware.peak_bf16)
    assert known.efficiency.memory.value == pytest.approx(4.3e12 / usual.hardware.bandwidth)
    assert known.efficiency.memory.source == "measured here"
    assert part.figures[0].met is False and training.target(chosen, 0.51).met


@pytest.mark.full
def test_all_of_it_runs_on_the_cpu(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--quick", "--seconds", "400", "--out", str(tmp_path)]
    assert gpu.main(words) == 0
    content = json.loads((tmp_path / "gpu-cpu.json").read_text())
    assert list(content["parts"]) == list(gpu.PARTS)
    assert all(part["ended"] == "complete" and not part["failed"] for part in content["parts"].values())
    assert all(figure["ours"] > 0 for figure in content["figures"])
    names = " ".join(figure["what"] for figure in content["figures"])
    assert all(words in names for words in ("training", "activation checkpointing block", "AutoGuidance", "eager"))
