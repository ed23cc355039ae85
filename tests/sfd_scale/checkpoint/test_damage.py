"""Checkpoints that are cut off, damaged, foreign or hostile: skipped or refused, and kept."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from sfd_scale.checkpoint import Checkpoint, CheckpointError, load_weights, metadata
from sfd_scale.checkpoint.boxes import stage
from tests.helpers.ranks import RankError, run_alone
from tests.helpers.tiny import TinyModel
from tests.helpers.whole_engine import flip, manager, names, saved, started, state_of


def _killed_while_saving(root: str) -> None:
    checkpoints, engine, ema = saved(Path(root))

    def die(*args: Any) -> None:
        os.kill(os.getpid(), 9)

    metadata.check_complete = die  # all tensors are written, nothing is committed
    checkpoints.save(2, engine, ema, {})


def test_a_save_cut_off_by_a_kill_is_not_seen(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="-9"):
        run_alone(_killed_while_saving, str(tmp_path))
    assert names(tmp_path) == ["step-00000001", "step-00000002.tmp"]
    checkpoints = manager(tmp_path)
    assert checkpoints.latest() == Checkpoint(tmp_path / "step-00000001")
    engine, ema = started()
    checkpoints.load(Checkpoint(tmp_path / "step-00000001"), engine, ema)
    checkpoints.save(2, engine, ema, {})
    assert checkpoints.latest() == Checkpoint(tmp_path / "step-00000002")


def test_without_commit_a_folder_is_no_checkpoint_and_stays(tmp_path: Path) -> None:
    checkpoints, engine, ema = saved(tmp_path, 2)
    (tmp_path / "step-00000002" / "COMMIT").unlink()
    assert checkpoints.latest() == Checkpoint(tmp_path / "step-00000001")
    with pytest.raises(ValueError, match="neither the folder of a whole checkpoint"):
        load_weights(tmp_path / "step-00000002")
    checkpoints.save(2, engine, ema, {})
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000002.aside-1"]


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "state.json", "checksums.json"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_damage_is_reported_skipped_and_kept(
    tmp_path: Path, name: str, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints, engine, ema = saved(tmp_path, 2, keep_last=2)
    file = tmp_path / "step-00000002" / name
    if harm == "flip":
        flip(file)
    elif harm == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    assert checkpoints.latest() == Checkpoint(tmp_path / "step-00000001")
    assert "step-00000002 is damaged" in caplog.text and name in caplog.text
    for step in (3, 4, 5):
        checkpoints.save(step, engine, ema, {})
    # Retention neither counts the damaged one nor removes it.
    assert names(tmp_path) == [f"step-0000000{i}" for i in (2, 4, 5)]


def test_a_save_that_lost_a_tensor_is_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = manager(tmp_path)
    engine, ema = started()
    real = stage

    def lossy(*args: Any, **options: Any) -> dict[str, Any]:
        staged = real(*args, **options)
        del staged["optim.exp_avg.tail.weight"]
        return staged

    monkeypatch.setattr("sfd_scale.checkpoint.manager.stage", lossy)
    with pytest.raises(CheckpointError, match=r"not whole: optim\.exp_avg\.tail\.weight"):
        checkpoints.save(1, engine, ema, {})
    assert checkpoints.latest() is None


def test_another_architecture_is_refused_by_tensor_name(tmp_path: Path) -> None:
    checkpoints, *_ = saved(tmp_path)
    wider, ema = started(TinyModel(width=38))
    with pytest.raises(ValueError, match=r"another model: .*blocks\.0\.down\.bias: \(37,\) in the checkpoint, \(38,\)"):
        checkpoints.load(Checkpoint(tmp_path / "step-00000001"), wider, ema)
    deeper = TinyModel()
    deeper.blocks.append(deeper.blocks[0].__class__(37))
    more, ema = started(deeper)
    before = state_of(more, ema)
    with pytest.raises(ValueError, match=r"ema\.blocks\.3\.down\.bias: not in the checkpoint"):
        checkpoints.load(Checkpoint(tmp_path / "step-00000001"), more, ema)
    assert all(torch.equal(a, b) for a, b in zip(state_of(more, ema), before, strict=True))


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    checkpoints, engine, ema = saved(tmp_path)
    file = tmp_path / "step-00000001" / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 2}))
    with pytest.raises(ValueError, match="checkpoint format 2; this release of sfd-scale reads up to 1"):
        checkpoints.load(Checkpoint(tmp_path / "step-00000001"), engine, ema)


class _Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("trapped",))


def test_metadata_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Trap()))
    with pytest.raises(CheckpointError, match="posix.mkdir"):
        metadata.read_metadata(tmp_path)
    assert not (tmp_path / "trapped").exists()


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_anew(tmp_path: Path) -> None:
    """As by a copy without hidden files, or by a network file system that fails for a while."""
    checkpoints, engine, ema = saved(tmp_path, 2, keep_last=2)
    for step in (1, 2):
        (tmp_path / f"step-0000000{step}" / ".metadata").rename(tmp_path / f"metadata-{step}")
    with pytest.raises(ValueError, match=r"none of its checkpoints is intact \(step-00000002: \.metadata is missing; "):
        manager(tmp_path).latest()
    (tmp_path / "metadata-1").rename(tmp_path / "step-00000001" / ".metadata")
    assert manager(tmp_path).latest() == Checkpoint(tmp_path / "step-00000001")
    # A rollback asks for an earlier one, and has its own answer.
    assert manager(tmp_path).latest(before=1) is None


def test_a_folder_of_checkpoints_that_cannot_be_listed_is_not_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "unmounted")
    for name, message in (("file", "a part of this path is a file"), ("link", "a link to .*/unmounted, which is not")):
        with pytest.raises(ValueError, match=message):
            manager(tmp_path / name).latest()
    assert manager(tmp_path / "missing").latest() is None


def test_a_save_that_the_storage_refuses_is_one_sentence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = manager(tmp_path / "folder")
    (tmp_path / "folder").symlink_to(tmp_path / "unmounted")
    engine, ema = started()
    with pytest.raises(CheckpointError) as refused:
        checkpoints.save(1, engine, ema, {})
    assert "failed on rank 0: " in str(refused.value) and "a link to " in str(refused.value)
    assert "Errno" not in str(refused.value) and "Traceback" not in caplog.text
