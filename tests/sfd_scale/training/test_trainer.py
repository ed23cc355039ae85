"""Portions of the global batch, stop requests, and metrics that survive a kill."""

import json
import os
import signal
from pathlib import Path

import pytest

from sfd_scale.runtime.batch_split import BatchSplit, split_batch
from sfd_scale.runtime.run_paths import RunPaths
from sfd_scale.runtime.signals import StopRequest
from sfd_scale.training.metrics_writer import MetricsWriter, WandbConfig
from sfd_scale.training.trainer import TrainerConfig


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((256, None, 8), BatchSplit(32, 1, 8)),
        ((256, 16, 8), BatchSplit(16, 2, 8)),
        ((256, 64, 8), BatchSplit(32, 1, 8)),
        ((256, 32, 1), BatchSplit(32, 8, 1)),
    ],
)
def test_the_global_batch_is_divided_exactly(arguments: tuple[int, int | None, int], expected: BatchSplit) -> None:
    assert split_batch(*arguments) == expected
    assert expected.micro_batch * expected.grad_accum_steps * expected.world_size == arguments[0]


def test_what_does_not_divide_is_refused_with_what_does() -> None:
    with pytest.raises(
        ValueError, match=r"24 does not divide over 5 ranks; allowed: \[1, 2, 3, 4, 6, 8, 12, 24\] ranks"
    ):
        split_batch(24, None, 5)
    with pytest.raises(ValueError, match=r"micro_batch: 5 does not divide the 12 samples of a rank; allowed here"):
        split_batch(24, 5, 2)


@pytest.mark.parametrize("name", ["steps", "global_batch", "log_every", "micro_batch", "replica_check_every"])
def test_counts_start_at_one(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: 0; allowed: 1 and up"):
        TrainerConfig(**{"steps": 1, "global_batch": 1, name: 0})


def test_a_signal_is_remembered_until_the_step_boundary() -> None:
    with pytest.raises(KeyError), StopRequest() as stop:
        assert not stop.requested()
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)  # pdsh sends twice within a tenth of a second: not a second request
        assert stop.requested()
        raise KeyError
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "after an error too"
    with StopRequest(max_duration_s=0.0) as late:
        assert late.requested()


def test_metrics_after_the_checkpoint_are_written_anew(tmp_path: Path) -> None:
    writer = MetricsWriter(RunPaths(tmp_path), WandbConfig(mode="disabled"), {})
    for step in (1, 2, 3):
        writer.write(step, {"loss": 1.0 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line
    writer.truncate(2)
    writer.write(3, {"loss": 0.5})
    writer.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 0.5), (3, 0.5)]
