"""What a run says of itself: means over ranks, the clock's bins, utilisation, the distance of the average."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sfd_scale.engines.ema import EMA, EMAConfig
from sfd_scale.engines.engine import Fragment
from sfd_scale.runtime import distributed
from sfd_scale.runtime.matmul import measured_flops
from sfd_scale.runtime.run_paths import RunPaths
from sfd_scale.training.metrics import TrainingMetrics
from sfd_scale.training.metrics_writer import MetricsWriter, WandbConfig, WandbScores, log_scores
from sfd_scale.training.objective import LossTerms
from tests.helpers.ranks import run_ranks


def losses(value: float, clock: list[float], each: list[float]) -> LossTerms:
    return LossTerms(torch.tensor(value), {"loss": torch.tensor(value)}, torch.tensor(clock), torch.tensor(each))


WEIGHTS, AVERAGE = torch.arange(1.0, 8.0), torch.linspace(0.0, 5.0, 7)


def measure() -> dict[str, Any]:
    """Two micro-batches on each rank, of other values on each; and the average of a weight in two uneven parts."""
    rank = distributed.rank()
    part = slice(0, 5) if rank == 0 else slice(5, 7)
    weight = WEIGHTS[part].clone()
    ema = EMA([Fragment("w", (7,), part.start, weight, weight, weight, primary=True)], EMAConfig())
    ema.tensors[0].copy_(AVERAGE[part])
    meter = TrainingMetrics(flops_per_sample=10.0, peak_flops=1e6)
    for value in (1.0, 3.0):
        meter.add(losses(value + rank, [0.05, 0.95, 1.0], [value + rank, 10.0, 20.0]), samples=3, wait_s=0.0)
    meter.step(5.0)
    meter.step(2.0)
    meter.started -= 100.0
    values = meter.reduce(ema.squares())
    assert not meter.names and not meter.step_s
    return values


def test_means_over_batches_and_ranks_bins_of_the_clock_and_the_distance_of_the_average() -> None:
    first, second = run_ranks(measure, 2)
    assert first["loss"] == second["loss"] == 2.5
    assert first["loss_by_clock/0"] == 2.5 and first["loss_by_clock/9"] == 15.0
    assert "loss_by_clock/5" not in first
    assert (first["grad_norm"], first["grad_norm_max"]) == (2.0, 5.0)
    # In 100 seconds, the samples of both ranks.
    assert first["samples_per_s"] == pytest.approx(2 * 6 / 100, rel=0.1)
    assert first["samples_per_s"] == pytest.approx(2 * first["samples_per_s_per_rank"])
    assert first["mfu"] == pytest.approx(first["samples_per_s_per_rank"] * 10 / 1e6)
    # The slowest rank's times, and the fullest rank's memory, are the same on all.
    for name in ("step_s/p50", "step_s/p99", "memory_host_bytes", "data_wait_share_max"):
        assert first[name] == second[name]
    assert first["step_s/p50"] <= first["step_s/p99"] and first["memory_host_bytes"] > 50e6
    assert first["memory_allocated_bytes"] is None
    assert first["ema_distance"] == pytest.approx(((AVERAGE - WEIGHTS).norm() / WEIGHTS.norm()).item())


def test_what_is_not_finite_is_left_out_of_the_means() -> None:
    """Of a step that is dropped for it, say, whose norm is not finite either."""
    meter = TrainingMetrics()
    for value in (1.0, math.nan, 3.0, math.inf):
        meter.add(losses(value, [0.05, 0.95], [value, 7.0]), samples=2, wait_s=0.0)
        meter.step(value)
    values = meter.reduce()
    assert values["loss"] == 2.0 and values["loss_by_clock/0"] == 2.0 and values["loss_by_clock/9"] == 7.0
    assert values["grad_norm_max"] == 3.0 and values["grad_norm"] == math.inf
    assert meter.clock_losses is not None and meter.clock_losses[0] == (2.0, 2) and meter.clock_losses[9] == (7.0, 4)
    meter.add(losses(math.nan, [0.05], [math.nan]), samples=1, wait_s=0.0)
    assert meter.reduce()["loss"] is None


def test_terms_of_the_loss_are_below_loss_and_other_measures_are_not() -> None:
    meter = TrainingMetrics()
    for velocity, accuracy in ((2.0, 0.5), (4.0, 1.0)):
        terms = {"loss": torch.tensor(velocity + 1), "velocity": torch.tensor(velocity)}
        measured = LossTerms(torch.tensor(0.0), terms, measures={"accuracy": torch.tensor(accuracy)})
        meter.add(measured, samples=1, wait_s=0.0)
    values = meter.reduce()
    assert (values["loss"], values["loss/velocity"], values["accuracy"]) == (4.0, 3.0, 0.75)
    assert not {"velocity", "loss/accuracy", "loss/loss"} & values.keys()


def test_what_is_not_finite_is_null_in_the_metrics(tmp_path: Path) -> None:
    writer = MetricsWriter(RunPaths(tmp_path), WandbConfig(mode="disabled"), {})
    writer.write(1, {"loss": math.nan, "grad_norm": math.inf, "lr": 0.5, "mfu": None})
    writer.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail) == {
        "step": 1, "loss": None, "grad_norm": None, "lr": 0.5, "mfu": None,
    }  # fmt: skip


def test_an_imported_run_has_scores_before_it_has_metrics(tmp_path: Path) -> None:
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "evaluations" / "results.jsonl").write_text('{"step": 4, "id": "a", "fid": 4.5}\n')
    log_scores(RunPaths(tmp_path), WandbConfig(mode="offline"))
    assert not WandbScores(RunPaths(tmp_path)).pending()


def test_replicas_count_once() -> None:
    flat = torch.ones(3)
    fragments = [Fragment("w", (3,), 0, flat, flat, flat, primary) for primary in (True, False)]
    ema = EMA(fragments, EMAConfig())
    flat += 1
    assert ema.squares().tolist() == pytest.approx([3.0, 12.0])
    assert EMA(fragments[1:], EMAConfig()).squares().tolist() == [0.0, 0.0]


def test_without_a_known_peak_there_is_no_utilisation() -> None:
    assert TrainingMetrics(flops_per_sample=1.0).mfu(1.0) is None
    assert TrainingMetrics(peak_flops=1.0).mfu(1.0) is None
    assert TrainingMetrics(flops_per_sample=6.0, peak_flops=12.0).mfu(1.0) == 0.5
    assert 1e8 < measured_flops(torch.device("cpu"), torch.float32) < 1e13


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(RunPaths(tmp_path), WandbConfig(mode="disabled"), {}, tensorboard=True)
    for step in (1, 2):
        writer.write(step, {"loss": 1.0 / step, "mfu": None})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 0.5)]
    assert events.Tags()["scalars"] == ["loss"]


def test_tensorboard_has_each_step_once_after_a_resume_and_after_a_rollback(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for started, (first, last) in enumerate([(0, 6), (4, 9), (9, 10)]):
        writer = MetricsWriter(RunPaths(tmp_path), WandbConfig(mode="disabled"), {}, tensorboard=True)
        writer.truncate(first)
        for step in range(first + 1, last + 1):
            writer.write(step, {"loss": float(started)})
        if started == 2:
            writer.truncate(8)
            writer.write(9, {"loss": 3.0})
        writer.close()
        time.sleep(1.1)  # the names of event files have whole seconds
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [
        *((step, 0.0) for step in range(1, 5)), *((step, 1.0) for step in range(5, 9)), (9, 3.0),
    ]  # fmt: skip


def read_by_wandb(file: Path) -> list[dict[str, Any]]:
    """The records of an offline run, by W&B's own reader of its transaction log."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    return [json.loads(line) for line in lines]


def test_a_wandb_run_is_read_back_by_its_own_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    table = tmp_path / "evaluations" / "results.jsonl"
    table.parent.mkdir()
    for first in (1, 3):  # a resumed run continues the same run
        writer = MetricsWriter(RunPaths(tmp_path), WandbConfig(mode="offline"), {"seed": 7, "model": {"depth": 2}})
        for step in (first, first + 1, first + 1):  # the last after going back by one
            writer.write(step, {"loss": 1.0 / step, "loss_by_clock/3": float(step), "mfu": None})
        writer.close()
        # What was scored meanwhile goes with the next rows, one at a time.
        table.write_text("".join(f'{{"step": {n}, "id": "{n}", "fid": {n}.5, "sfid": null}}\n' for n in (1, 2)))
    identity = (tmp_path / "wandb_run_id").read_text().strip()
    records = [row for file in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")) for row in read_by_wandb(file)]
    runs = [record["run"] for record in records if record["type"] == "run"]
    assert [run["run_id"] for run in runs] == [identity, identity]
    assert runs[0]["config"]["update"].items() >= {"seed": 7, "model": {"depth": 2}}.items()
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert [(row["step"], row["loss"]) for row in rows] == [(n, 1.0 / n) for n in (1, 2, 2, 3, 4, 4)]
    # W&B drops a row whose number is not above that of the one before.
    assert [row["_step"] for row in rows] == [1, 2, 3, 3, 4, 5]
    assert [row["loss_by_clock/3"] for row in rows] == [1, 2, 2, 3, 4, 4] and "mfu" not in rows[0]
    assert [(r["_step"], r["eval/step"], r["eval/fid"]) for r in rows if "eval/fid" in r] == [(3, 1, 1.5), (4, 2, 2.5)]
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or b"0123456789abcdef0123456789abcdef" not in file.read_bytes()
