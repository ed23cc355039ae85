"""N steps straight equal k steps, a save, and N - k more: under the same engine, another one, another world size."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from sfd_scale.checkpoint import CheckpointConfig, CheckpointError, CheckpointManager, load_weights, manager
from sfd_scale.runtime import distributed
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import (
    DECAY,
    Spec,
    TinyModel,
    distance,
    make_ema,
    make_engine,
    params,
    plain,
    relative,
    train,
    whole,
)

STEPS, SAVED = 9, 5
NAN_STEP = 2  # a dropped step before the save: Adam's count is then not the trainer's

ENGINES = {
    "zero0": Spec("deepspeed", {"zero_stage": 0}),
    "zero1": Spec("deepspeed", {"zero_stage": 1}),
    "zero2": Spec("deepspeed", {"zero_stage": 2}, 2),
    "zero3": Spec("deepspeed", {"zero_stage": 3, "persistent_elements": 100}),
    "zero3 offloaded": Spec("deepspeed", {"zero_stage": 3, "offload_optimizer": True}),
    "fsdp": Spec("fsdp", {}, 2),
    "fsdp replicate": Spec("fsdp", {"sharding": "replicate"}),
    "zero1 bf16": Spec("deepspeed", {"zero_stage": 1, "precision": "bf16"}),
    "zero3 bf16": Spec("deepspeed", {"zero_stage": 3, "precision": "bf16", "persistent_elements": 100}),
    "fsdp bf16": Spec("fsdp", {"precision": "bf16"}),
}
# (saved by, resumed by); at 2 ranks, then those of the first run at 1 rank.
SAME = ("zero1", "zero3", "fsdp", "zero1 bf16", "zero3 bf16", "fsdp bf16")
CROSS = (
    ("zero1", "zero3"), ("fsdp", "zero3"), ("zero3", "fsdp"), ("zero2", "zero1"), ("zero3 offloaded", "zero1"),
    ("fsdp replicate", "zero2"),
)  # fmt: skip
SHRINK = (("zero1", "fsdp"), ("zero3", "zero1"), ("fsdp", "zero0"), ("zero0", "zero2"))
BF16_CROSS = (("zero1 bf16", "fsdp bf16"), ("fsdp bf16", "zero3 bf16"))


def _folder(root: str, name: str) -> Path:
    return Path(root, name.replace(" ", "-"))


def straight(root: str, name: str, save: bool = True) -> dict[str, Any]:
    """All steps; saves in the background on the way and trains on at once."""
    spec = ENGINES[name]
    engine = make_engine(spec)
    ema = make_ema(engine)
    checkpoints = CheckpointManager(_folder(root, name), CheckpointConfig(every=SAVED))
    out = train(engine, ema, range(SAVED), spec.grad_accum_steps, NAN_STEP)
    checkpoints.save(SAVED, engine, ema, {"note": name})
    rest = train(engine, ema, range(SAVED, STEPS), spec.grad_accum_steps)
    checkpoints.wait()
    return _result(engine, ema, {key: out[key] + rest[key] for key in out})


def resumed(root: str, saved_by: str, name: str, forget: str = "") -> dict[str, Any]:
    """The rest of the steps, from a checkpoint, in a new engine that starts from other weights."""
    spec = ENGINES[name]
    engine = make_engine(spec, TinyModel(seed=9))
    ema = make_ema(engine)
    checkpoints = CheckpointManager(_folder(root, saved_by), CheckpointConfig(every=SAVED))
    latest = checkpoints.latest()
    assert latest is not None
    state = checkpoints.load(latest, engine, ema)
    assert state["note"] == saved_by and engine.optimizer_steps == SAVED - 1
    # What a resume must not lose, lost on purpose.
    for fragment in engine.fragments():
        if forget in ("exp_avg", "exp_avg_sq"):
            getattr(fragment, forget).zero_()
    if forget == "step":
        engine.set_optimizer_steps(0)
    if forget == "ema":
        ema = make_ema(engine)  # begun anew from the weights
    return _result(engine, ema, train(engine, ema, range(SAVED, STEPS), spec.grad_accum_steps))


def _result(engine: Any, ema: Any, out: dict[str, Any]) -> dict[str, Any]:
    out |= {"params": params(engine), "ema": whole(engine.fragments(), ema.tensors)}
    engine.close()
    return out


def save_and_resume(root: str, names: list[str], pairs: list[tuple[str, str]]) -> dict[str, Any]:
    logging.disable(logging.INFO)
    out: dict[str, Any] = {"straight": {name: straight(root, name) for name in names}}
    out["resumed"] = {pair: resumed(root, *pair) for pair in pairs}
    return out


def resume_only(root: str, pairs: list[tuple[str, str]], forgetful: list[str]) -> dict[str, Any]:
    logging.disable(logging.INFO)
    out: dict[str, Any] = {"resumed": {pair: resumed(root, *pair) for pair in pairs}}
    out["forgotten"] = {what: resumed(root, "fsdp", "fsdp", what) for what in forgetful}
    return out


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return plain(STEPS, NAN_STEP)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def two(root: str) -> dict[str, Any]:
    names = [name for name in ENGINES if name != "zero0"]
    pairs = [*((name, name) for name in SAME), *CROSS, *BF16_CROSS]
    return run_ranks(save_and_resume, 2, root, ["zero0", *names], pairs, timeout=240)[0]


@pytest.fixture(scope="module")
def one(root: str, two: dict[str, Any]) -> dict[str, Any]:
    return run_ranks(resume_only, 1, root, list(SHRINK), ["exp_avg", "exp_avg_sq", "step", "ema"])[0]


def check(result: dict[str, Any], reference: dict[str, Any]) -> None:
    assert relative(result["loss"], reference["loss"][-len(result["loss"]) :]) < 1e-6
    assert distance(result["params"], reference["params"]) < 2e-5
    assert distance(result["ema"], reference["ema"]) < 2e-5


@pytest.mark.parametrize("name", SAME)
def test_the_same_engine_resumes_bit_for_bit(name: str, two: dict[str, Any]) -> None:
    before, after = two["straight"][name], two["resumed"][name, name]
    assert after["loss"] == before["loss"][SAVED:] and after["norm"] == before["norm"][SAVED:]
    assert distance(after["params"], before["params"]) == 0.0
    assert distance(after["ema"], before["ema"]) == 0.0


@pytest.mark.parametrize("pair", CROSS, ids="-".join)
def test_another_engine_goes_on(pair: tuple[str, str], two: dict[str, Any], reference: dict[str, Any]) -> None:
    check(two["resumed"][pair], reference)


@pytest.mark.parametrize("pair", SHRINK, ids="-".join)
def test_another_world_size_goes_on(pair: tuple[str, str], one: dict[str, Any], reference: dict[str, Any]) -> None:
    check(one["resumed"][pair], reference)


@pytest.mark.parametrize("pair", BF16_CROSS, ids="-".join)
def test_bf16_goes_on_under_another_engine(pair: tuple[str, str], two: dict[str, Any]) -> None:
    assert relative(two["resumed"][pair]["loss"], two["straight"][pair[0]]["loss"][SAVED:]) < 2e-3


@pytest.mark.parametrize("what", ["exp_avg", "exp_avg_sq", "step"])
def test_a_resume_that_loses_optimizer_state_would_be_noticed(
    what: str, one: dict[str, Any], reference: dict[str, Any]
) -> None:
    assert relative(one["forgotten"][what]["loss"], reference["loss"][SAVED:]) > 1e-4


def test_a_stale_average_would_be_noticed(one: dict[str, Any], reference: dict[str, Any]) -> None:
    assert relative(one["forgotten"]["ema"]["loss"], reference["loss"][SAVED:]) < 1e-6, "the losses do not show it"
    assert distance(one["forgotten"]["ema"]["ema"], reference["ema"]) > 1e-3


def test_every_engine_writes_the_same_checkpoint(root: str, two: dict[str, Any]) -> None:
    stored = {}
    for name in ("zero0", "zero1", "zero2", "zero3", "zero3 offloaded", "fsdp", "fsdp replicate"):
        folder = _folder(root, name) / f"step-{SAVED:08d}"
        stored[name] = {w: load_weights(folder, w) for w in ("ema", "params")}  # type: ignore[arg-type]
    first = plain(SAVED, NAN_STEP)
    for name, weights in stored.items():
        assert weights["params"].keys() == first["params"].keys(), name
        assert distance(weights["params"], first["params"]) < 2e-6, name
        assert distance(weights["ema"], first["ema"]) < 2e-6, name
    assert DECAY < 1 and all(t.dtype == torch.float32 for t in stored["zero3"]["ema"].values())


def _no_disk(*args: Any) -> None:
    raise OSError("its disk is gone")


def _torn(root: str) -> str:
    logging.disable(logging.CRITICAL)
    engine = make_engine(ENGINES["fsdp"])
    ema = make_ema(engine)
    checkpoints = CheckpointManager(Path(root), CheckpointConfig(background=False))
    checkpoints.save(1, engine, ema, {})
    if distributed.rank() == 1:
        manager.FileSystemWriter.write_data = _no_disk
    try:
        checkpoints.save(2, engine, ema, {})
    except CheckpointError as error:
        latest = checkpoints.latest()
        assert latest is not None
        return f"{latest.path.name}: {error}"
    raise AssertionError("a torn save went through")


@pytest.mark.full
def test_a_save_that_one_rank_tears_fails_on_all_and_is_not_seen(tmp_path: Path) -> None:
    for said in run_ranks(_torn, 2, str(tmp_path), timeout=400):
        assert said.startswith("step-00000001: step-00000002: writing tensors failed on rank")
        assert "rank 1: its disk is gone" in said
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
