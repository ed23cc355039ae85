"""Checkpoints of one process: what is stored, kept and timed. Ranks and engines: test_resume.py."""

from __future__ import annotations

import errno
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from sfd_scale.checkpoint import Checkpoint, CheckpointConfig, CheckpointError, metadata
from sfd_scale.runtime import distributed
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import TinyModel
from tests.helpers.whole_engine import advance, manager, names, saved, started, state_of


@pytest.mark.parametrize("background", [False, True])
def test_everything_comes_back(tmp_path: Path, background: bool) -> None:
    checkpoints, engine, ema = saved(tmp_path, 2, background=background)
    expected = state_of(engine, ema)
    other, other_ema = started(TinyModel(seed=5))
    latest = checkpoints.latest()
    assert latest == Checkpoint(tmp_path / "step-00000002")
    state = manager(tmp_path).load(latest, other, other_ema)
    assert all(torch.equal(a, b) for a, b in zip(state_of(other, other_ema), expected, strict=True))
    assert state == {
        "step": 2, "format": 1, "optimizer_steps": 2, "recipe_digest": "abc", "position": {"epoch": 1},
        "parts": ["model", "optim.exp_avg", "optim.exp_avg_sq", "ema"],
    }  # fmt: skip
    assert {s["step"].item() for s in other.optimizer.state.values()} == {2.0}
    assert names(latest.path) == [".metadata", "COMMIT", "__0_0.distcp", "checksums.json", "state.json"]


def test_a_background_save_holds_the_state_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    go = threading.Event()
    write = FileSystemWriter.write_data

    def slow(self: FileSystemWriter, *args: Any) -> Any:
        go.wait(20)
        return write(self, *args)

    monkeypatch.setattr(FileSystemWriter, "write_data", slow)
    checkpoints = manager(tmp_path, background=True)
    engine, ema = started()
    advance(engine, ema, 0)
    expected = state_of(engine, ema)
    checkpoints.save(1, engine, ema, {})
    advance(engine, ema, 1)  # training goes on before anything is written
    go.set()
    checkpoints.wait()
    other, other_ema = started(TinyModel(seed=5))
    checkpoints.load(Checkpoint(tmp_path / "step-00000001"), other, other_ema)
    assert all(torch.equal(a, b) for a, b in zip(state_of(other, other_ema), expected, strict=True))


def test_a_failed_background_save_is_raised_by_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = manager(tmp_path, background=True)
    engine, ema = started()
    monkeypatch.setattr(metadata, "check_complete", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    checkpoints.save(1, engine, ema, {})
    with pytest.raises(CheckpointError, match="rank 0: disk full"):
        checkpoints.save(2, engine, ema, {})
    assert checkpoints.latest() is None


def test_retention_keeps_the_last_and_every_nth(tmp_path: Path) -> None:
    saved(tmp_path, 7, keep_last=2, keep_every=3)
    assert names(tmp_path) == [f"step-0000000{i}" for i in (3, 6, 7)]


def test_wall_clock_saves_beside_those_that_are_kept_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("sfd_scale.checkpoint.manager.time", SimpleNamespace(monotonic=lambda: now[0]))
    checkpoints = manager(tmp_path, every=None, every_s=1800, keep_last=1, keep_every=4)
    engine, ema = started()
    assert [step for step in range(1, 9) if checkpoints.due(step)] == [4, 8]
    assert not checkpoints.overdue()
    for step in (3, 4, 5, 6):
        now[0] += 1801
        assert checkpoints.overdue()
        checkpoints.save(step, engine, ema, {})
        assert not checkpoints.overdue(), "counted from the last save"
    assert names(tmp_path) == ["step-00000004", "step-00000006"]


def test_saving_and_standing_still_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = FileSystemWriter.write_data

    def slow(self: FileSystemWriter, *args: Any) -> Any:
        time.sleep(0.5)
        return write(self, *args)

    monkeypatch.setattr(FileSystemWriter, "write_data", slow)
    engine, ema = started()
    behind, before = manager(tmp_path / "a", background=True), manager(tmp_path / "b", background=False)
    for checkpoints in (behind, before):
        assert checkpoints.timings() == {}
        checkpoints.save(1, engine, ema, {})
        checkpoints.wait()
    one, other = behind.timings(), before.timings()
    assert one["checkpoint_save_s"] > one["checkpoint_stall_s"] + 0.4 > 0.4, "training went on while it was written"
    assert other["checkpoint_save_s"] == other["checkpoint_stall_s"] > 0.4
    assert behind.timings() == {}, "said once"
    # A save that has to wait for the one before stands still for it.
    behind.save(2, engine, ema, {})
    behind.save(3, engine, ema, {})
    behind.wait()
    assert behind.timings()["checkpoint_stall_s"] > 0.2


def test_a_disk_that_is_too_small_is_told_before_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = manager(tmp_path / "run")
    engine, ema = started()
    elements = sum(param.numel() for param in engine.model.parameters())
    needed = 4 * 4 * elements  # weights, two moments, one average, in fp32
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    checkpoints.check_space(engine, ema)
    assert "has" not in caplog.text
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    checkpoints.check_space(engine, ema)
    assert f"the next checkpoint needs {needed / 1e6:.2f} MB and {tmp_path} has" in caplog.text
    assert not (tmp_path / "run").exists(), "warned before anything is written"


def test_a_full_disk_leaves_no_rest_and_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, engine, ema = saved(tmp_path)

    def full(*args: Any, **options: Any) -> None:
        (tmp_path / "step-00000002.tmp" / "__0_0.distcp").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sfd_scale.checkpoint.manager.save", full)
    with pytest.raises(
        CheckpointError, match="step-00000002: writing tensors failed on rank 0: the disk is full; free"
    ):
        checkpoints.save(2, engine, ema, {})
    assert names(tmp_path) == ["step-00000001"] and checkpoints.latest() == Checkpoint(tmp_path / "step-00000001")


def fail_on_one_rank(folder: Path) -> str:
    def full(self: FileSystemWriter, plan: Any, planner: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    if distributed.rank() == 1:
        FileSystemWriter.write_data = full  # type: ignore[method-assign]
    engine, ema = started()
    with pytest.raises(CheckpointError) as told:
        manager(folder).save(2, engine, ema, {})
    return str(told.value)


def make_under_an_older_torch(folder: Path) -> None:
    del torch.distributed.checkpoint.CheckpointableTensor
    with pytest.raises(ValueError, match=r"checkpoints of several ranks need a newer one; `sfd doctor` says which"):
        manager(folder)


def test_a_torch_that_cannot_store_shares_is_told_before_training(tmp_path: Path) -> None:
    """It would take each rank's box for a whole tensor."""
    run_ranks(make_under_an_older_torch, 2, tmp_path)


def test_a_rank_that_fails_is_named_and_no_other(tmp_path: Path) -> None:
    for text in run_ranks(fail_on_one_rank, 2, tmp_path):
        disk = "the disk is full; free some space and give the same command again"
        assert text == f"step-00000002: writing tensors failed on rank 1: {disk}"
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "options,field", [({"every": 0}, "every"), ({"keep_every": 0}, "keep_every"), ({"every_s": 0}, "every_s")]
)
def test_impossible_settings_are_refused(options: dict[str, int], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        CheckpointConfig(**options)
