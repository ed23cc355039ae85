"""Checkpoints of one process: what is stored, what is refused, what is kept. Ranks and engines: test_resume.py."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import RankError, run_alone
from safetensors import safe_open
from tiny import OPTIMIZER, TinyModel, batch
from torch import Tensor, nn

from sfd_scale.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    CheckpointManager,
    export,
    folder,
    load_weights,
    start_weights,
)
from sfd_scale.checkpoint.boxes import boxes, stage, state_parts
from sfd_scale.checkpoint.manager import files
from sfd_scale.ema import EMA, EMAConfig
from sfd_scale.engines.engine import Fragment, StepResult
from sfd_scale.engines.replicas import Replicas
from sfd_scale.optim import create_state, param_groups, set_lr, set_step

# -------------------------------------------------------------------------------------------------- boxes


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    start = draw(st.integers(0, math.prod(shape) - 1))
    return shape, start, draw(st.integers(start + 1, math.prod(shape)))


@given(ranges())
def test_boxes_are_the_range_in_order(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = case
    numbers = torch.arange(math.prod(shape)).view(shape)
    parts = boxes(shape, start, stop)
    found = [
        numbers[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))].reshape(-1) for offset, size in parts
    ]
    assert torch.cat(found).tolist() == list(range(start, stop))
    assert len(parts) <= max(2 * len(shape) - 1, 1)


@given(ranges())
def test_staged_rows_hold_the_boxes_where_they_say(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = case
    data = torch.arange(start, stop, dtype=torch.float32)
    fragment = Fragment("w", shape, start, data, data, data, True)
    staged = stage([fragment], state_parts([fragment], {"ema": [data]}), pinned=False, own=True)
    assert sorted(staged) == ["ema.w", "model.w", "optim.exp_avg.w", "optim.exp_avg_sq.w"]
    part: Any = staged["model.w"]
    part.flat.copy_(part.source)
    full = torch.full(shape, -1.0)
    for to, at, size in zip(part.rows.global_offsets, part.rows.local_offsets, part.rows.local_sizes, strict=True):
        full[tuple(map(slice, to, (o + s for o, s in zip(to, size, strict=True))))] = part.rows[
            tuple(map(slice, at, (o + s for o, s in zip(at, size, strict=True))))
        ]
    expected = torch.full((math.prod(shape),), -1.0)
    expected[start:stop] = data
    assert torch.equal(full.view(-1), expected)
    assert part.rows.shape[0] * math.prod(shape[1:]) - (stop - start) < 2 * math.prod(shape[1:]) if shape else True


# ------------------------------------------------------------------------------------- a run without ranks


class WholeEngine:
    """torch alone behind the engine protocol: no sharding, no process group."""

    def __init__(self, model: nn.Module | None = None) -> None:
        self.model = TinyModel() if model is None else model
        self.device, self.optimizer_steps = torch.device("cpu"), 0
        self.optimizer = torch.optim.AdamW(param_groups(self.model, OPTIMIZER), lr=OPTIMIZER.lr)
        create_state(self.optimizer, list(self.model.parameters()))

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def step(self, lr: float) -> StepResult:
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.optimizer_steps += 1
        return StepResult(0.0, True)

    def fragments(self) -> list[Fragment]:
        return [
            Fragment(
                name, tuple(p.shape), 0, p.detach().view(-1), s["exp_avg"].view(-1), s["exp_avg_sq"].view(-1), True
            )
            for name, p in self.model.named_parameters()
            for s in [self.optimizer.state[p]]
        ]

    def replicas(self) -> Replicas:
        return Replicas({})

    def set_optimizer_steps(self, steps: int) -> None:
        self.optimizer_steps = steps
        set_step(self.optimizer, steps)

    def after_load(self) -> None:
        pass

    def describe(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


def started(model: nn.Module | None = None) -> tuple[WholeEngine, EMA]:
    engine = WholeEngine(model)
    return engine, EMA(engine.fragments(), EMAConfig(decay=0.5))


def advance(engine: WholeEngine, ema: EMA, step: int) -> None:
    x, y = batch(step)
    engine.backward((engine.model(x) - y).square().mean(), True)
    engine.step(1e-2)
    ema.update(step)


def state_of(engine: WholeEngine, ema: EMA) -> list[Tensor]:
    parts = [t for f in engine.fragments() for t in (f.param, f.exp_avg, f.exp_avg_sq)]
    return [t.clone() for t in (*parts, *ema.tensors)]


def manager(root: Path, **options: Any) -> CheckpointManager:
    return CheckpointManager(root, CheckpointConfig(**{"every": 1, "background": False, **options}))


def saved(root: Path, steps: int = 1, **options: Any) -> tuple[CheckpointManager, WholeEngine, EMA]:
    checkpoints = manager(root, **options)
    engine, ema = started()
    for step in range(steps):
        advance(engine, ema, step)
        checkpoints.save(step + 1, engine, ema, {"recipe_digest": "abc", "position": {"epoch": 1}})
    checkpoints.wait()
    return checkpoints, engine, ema


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@pytest.mark.parametrize("background", [False, True])
def test_everything_comes_back(tmp_path: Path, background: bool) -> None:
    checkpoints, engine, ema = saved(tmp_path, 2, background=background)
    expected = state_of(engine, ema)
    other, other_ema = started(TinyModel(seed=5))
    latest = checkpoints.latest()
    assert latest is not None and latest.name == "step-00000002"
    state = manager(tmp_path).load(latest, other, other_ema)
    assert all(torch.equal(a, b) for a, b in zip(state_of(other, other_ema), expected, strict=True))
    assert state == {
        "step": 2, "format": 1, "optimizer_steps": 2, "recipe_digest": "abc", "position": {"epoch": 1},
        "parts": ["model", "optim.exp_avg", "optim.exp_avg_sq", "ema"],
    }  # fmt: skip
    assert {s["step"].item() for s in other.optimizer.state.values()} == {2.0}
    assert names(latest) == [".metadata", "COMMIT", "__0_0.distcp", "checksums.json", "state.json"]


def test_a_background_save_holds_the_state_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    go = threading.Event()
    prepare = CheckpointManager._write

    def slow(self: CheckpointManager, *args: Any) -> None:
        go.wait(20)
        prepare(self, *args)

    monkeypatch.setattr(CheckpointManager, "_write", slow)
    checkpoints = manager(tmp_path, background=True)
    engine, ema = started()
    advance(engine, ema, 0)
    expected = state_of(engine, ema)
    checkpoints.save(1, engine, ema, {})
    advance(engine, ema, 1)  # training goes on before anything is written
    go.set()
    checkpoints.wait()
    other, other_ema = started(TinyModel(seed=5))
    checkpoints.load(tmp_path / "step-00000001", other, other_ema)
    assert all(torch.equal(a, b) for a, b in zip(state_of(other, other_ema), expected, strict=True))


def test_a_failed_background_save_is_raised_by_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = manager(tmp_path, background=True)
    engine, ema = started()
    monkeypatch.setattr(files, "check_complete", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    checkpoints.save(1, engine, ema, {})
    with pytest.raises(CheckpointError, match="rank 0: OSError: disk full"):
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
    write = CheckpointManager._write

    def slow(self: CheckpointManager, *args: Any) -> None:
        time.sleep(0.5)
        write(self, *args)

    monkeypatch.setattr(CheckpointManager, "_write", slow)
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
    with pytest.raises(CheckpointError, match="step-00000002: writing tensors failed on rank 0: .*No space left"):
        checkpoints.save(2, engine, ema, {})
    assert names(tmp_path) == ["step-00000001"] and checkpoints.latest() == tmp_path / "step-00000001"


# ------------------------------------------------------------------------------- a start from other weights


@pytest.mark.parametrize("weights", ["ema", "params"])
@pytest.mark.parametrize("source", ["run", "checkpoint", "file"])
def test_a_start_takes_the_weights_that_are_named_and_nothing_else(tmp_path: Path, weights: Any, source: str) -> None:
    _, engine, ema = saved(tmp_path / "checkpoints", 3)
    path = {
        "run": tmp_path,
        "checkpoint": tmp_path / "checkpoints" / "step-00000003",
        "file": tmp_path / "w.safetensors",
    }
    if source == "file":
        export(path["checkpoint"], path["file"], weights)
    model = TinyModel(seed=5)
    model.load_state_dict(start_weights(path[source], weights, model), strict=False)
    expected = ema.tensors if weights == "ema" else [f.param for f in engine.fragments()]
    assert all(torch.equal(p.view(-1), e) for p, e in zip(model.parameters(), expected, strict=True))
    other, other_ema = started(model)
    assert other.optimizer_steps == 0 and not any(f.exp_avg.any() for f in other.fragments())
    assert all(torch.equal(a, e) for a, e in zip(other_ema.tensors, expected, strict=True)), "the average starts there"


def test_a_start_from_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "checkpoints")
    export(tmp_path / "checkpoints" / "step-00000001", tmp_path / "ema.safetensors", "ema")
    with pytest.raises(ValueError, match="holds the weights 'ema', not 'params'; set init_from.weights=ema"):
        start_weights(tmp_path / "ema.safetensors", "params", TinyModel())
    with pytest.raises(ValueError, match=r"another model: blocks\.0\.down\.bias: \(37,\) in the checkpoint, \(38,\)"):
        start_weights(tmp_path, "ema", TinyModel(width=38))
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="no whole checkpoint"):
        start_weights(tmp_path / "empty", "ema", TinyModel())


# -------------------------------------------------------------------------------------- damaged and foreign


def _killed_while_saving(root: str) -> None:
    checkpoints, engine, ema = saved(Path(root))

    def die(*args: Any) -> None:
        os.kill(os.getpid(), 9)

    files.check_complete = die  # all tensors are written, nothing is committed
    checkpoints.save(2, engine, ema, {})


def test_a_save_cut_off_by_a_kill_is_not_seen(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="-9"):
        run_alone(_killed_while_saving, str(tmp_path))
    assert names(tmp_path) == ["step-00000001", "step-00000002.tmp"]
    checkpoints = manager(tmp_path)
    assert checkpoints.latest() == tmp_path / "step-00000001"
    engine, ema = started()
    checkpoints.load(tmp_path / "step-00000001", engine, ema)
    checkpoints.save(2, engine, ema, {})
    assert checkpoints.latest() == tmp_path / "step-00000002"


def test_without_commit_a_folder_is_no_checkpoint_and_stays(tmp_path: Path) -> None:
    checkpoints, engine, ema = saved(tmp_path, 2)
    (tmp_path / "step-00000002" / "COMMIT").unlink()
    assert checkpoints.latest() == tmp_path / "step-00000001"
    with pytest.raises(ValueError, match="neither a committed checkpoint"):
        load_weights(tmp_path / "step-00000002")
    checkpoints.save(2, engine, ema, {})
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000002.aside-1"]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "state.json", "checksums.json"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_damage_is_reported_skipped_and_kept(
    tmp_path: Path, name: str, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints, engine, ema = saved(tmp_path, 2, keep_last=2)
    file = tmp_path / "step-00000002" / name
    if harm == "flip":
        _flip(file)
    elif harm == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    assert checkpoints.latest() == tmp_path / "step-00000001"
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
        checkpoints.load(tmp_path / "step-00000001", wider, ema)
    deeper = TinyModel()
    deeper.blocks.append(deeper.blocks[0].__class__(37))
    more, ema = started(deeper)
    before = state_of(more, ema)
    with pytest.raises(ValueError, match=r"ema\.blocks\.3\.down\.bias: not in the checkpoint"):
        checkpoints.load(tmp_path / "step-00000001", more, ema)
    assert all(torch.equal(a, b) for a, b in zip(state_of(more, ema), before, strict=True))


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    checkpoints, engine, ema = saved(tmp_path)
    file = tmp_path / "step-00000001" / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 2}))
    with pytest.raises(ValueError, match="checkpoint format 2; this release of sfd-scale reads up to 1"):
        checkpoints.load(tmp_path / "step-00000001", engine, ema)


class _Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("trapped",))


def test_metadata_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Trap()))
    with pytest.raises(CheckpointError, match="posix.mkdir"):
        folder.read_metadata(tmp_path)
    assert not (tmp_path / "trapped").exists()


# -------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("weights", ["ema", "params"])
def test_export_has_the_names_the_weights_and_the_notes(tmp_path: Path, weights: Any) -> None:
    _, engine, ema = saved(tmp_path / "run", 2)
    checkpoint = tmp_path / "run" / "step-00000002"
    out = export(checkpoint, tmp_path / "out" / "model.safetensors", weights, {"stats": "def"})
    tensors = load_weights(out)
    source = ema.tensors if weights == "ema" else [f.param for f in engine.fragments()]
    assert list(tensors) == sorted(f.name for f in engine.fragments())
    for fragment, value in zip(engine.fragments(), source, strict=True):
        assert tensors[fragment.name].shape == fragment.shape
        assert torch.equal(tensors[fragment.name].view(-1), value)
    assert all(torch.equal(tensors[n], t) for n, t in load_weights(checkpoint, weights).items())
    with safe_open(out, "pt") as file:
        notes = file.metadata()
    assert notes == {
        "step": "2", "format": "1", "optimizer_steps": "2", "recipe_digest": "abc", "stats": "def",
        "weights": weights, "checkpoint_sha256": folder.checkpoint_hash(checkpoint),
    }  # fmt: skip
    assert names(tmp_path / "out") == ["model.safetensors"]


def test_export_refuses_damage_and_other_names(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(ValueError, match="ends in .safetensors"):
        export(tmp_path / "step-00000001", tmp_path / "model.pt")
    _flip(tmp_path / "step-00000001" / "__0_0.distcp")
    with pytest.raises(ValueError, match="__0_0.distcp has changed"):
        export(tmp_path / "step-00000001", tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "options,field", [({"every": 0}, "every"), ({"keep_every": 0}, "keep_every"), ({"every_s": 0}, "every_s")]
)
def test_impossible_settings_are_refused(options: dict[str, int], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        CheckpointConfig(**options)
