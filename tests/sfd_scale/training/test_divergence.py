"""Divergence: loss spikes, NaN, skipped steps and rollbacks, with a poisoned sample on two ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfd_scale import train
from sfd_scale.data.dataloader import LatentLoader, block_order, data_step
from sfd_scale.engines.engine import StepResult
from sfd_scale.runtime import distributed
from sfd_scale.runtime.run_paths import RunPaths
from sfd_scale.tasks import diffusion
from sfd_scale.training.divergence import DivergenceConfig, DivergenceError, DivergenceWatch, merge_ranges, spike_limit
from sfd_scale.training.objective import LossTerms
from tests.helpers import small_run
from tests.helpers.ranks import run_ranks

STEPS, EVERY, BAD_STEP = 12, 3, 5  # the first sample of data step 5 is poisoned, in epoch 1 only


# ------------------------------------------------------------------------------------------- pure parts


def test_the_limit_is_robust_standard_deviations_above_the_median() -> None:
    losses = torch.randn(4001, generator=torch.Generator().manual_seed(0)).add(10).tolist()
    assert spike_limit(losses, 5.0) == pytest.approx(15.0, abs=0.2)
    # 5 % outliers change it little; with mean and standard deviation it would be above 60.
    assert spike_limit([*losses, *[100.0] * 200], 5.0) == pytest.approx(15.5, abs=0.4)
    assert spike_limit([2.0] * 5, 3.0) == pytest.approx(2.0 + 3.0 * 0.002)


ranges = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 8)).map(lambda r: (r[0], r[0] + r[1])), max_size=5)


@given(ranges)
def test_passed_data_is_left_out_and_nothing_else(passed: list[tuple[int, int]]) -> None:
    left_out = {step for start, stop in passed for step in range(start, stop)}
    kept = [step for step in range(100) if step not in left_out]
    assert [data_step(step, merge_ranges(passed)) for step in range(len(kept))] == kept


def _watch(tmp_path: Path, **settings: Any) -> DivergenceWatch:
    return DivergenceWatch(DivergenceConfig(**settings), RunPaths(tmp_path))


def _step(watch: DivergenceWatch, step: int, *losses: float) -> tuple[float, str]:
    """The loss of the last micro-batch after `guarded`, and the result of `judge`."""
    for micro, loss in enumerate(losses):
        value = torch.tensor(loss)
        out = watch.guarded(LossTerms(value, {"loss": value}), torch.tensor([[0, micro]]), micro == len(losses) - 1)
    return out.item(), watch.judge(step, StepResult(1.0, math.isfinite(out.item())))


def test_the_mean_over_micro_batches_decides_and_the_last_one_becomes_nan(tmp_path: Path) -> None:
    watch = _watch(tmp_path, spike="skip", spike_z=10.0, window=4)
    for step, loss in enumerate([1.0, 1.1, 0.9, 1.0]):
        assert _step(watch, step, loss, loss) == (pytest.approx(loss), "go on")
    # Limit: 1 + 10 · 1.4826 · 0.05 = 1.7413.
    assert _step(watch, 4, 2.4, 1.08) == (pytest.approx(1.08), "go on")
    # The window is now 1.1, 0.9, 1.0, 1.74: 1.05 + 10 · 1.4826 · 0.1 = 2.5326.
    assert _step(watch, 5, 1.0, 4.06) == (pytest.approx(4.06), "go on")
    watch = _watch(tmp_path, spike="skip", spike_z=10.0, window=4)
    for step, loss in enumerate([1.0, 1.1, 0.9, 1.0]):
        _step(watch, step, loss)
    vetoed, _ = _step(watch, 4, 2.5, 1.0)
    assert math.isnan(vetoed) and watch.counts() == {"skipped_steps": 1, "loss_spikes": 1, "rollbacks": 0}


def test_a_spike_is_only_logged_by_default_and_never_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    watch = _watch(tmp_path, window=2)
    for step, loss in enumerate([1.0, 1.0, 9.0]):
        assert _step(watch, step, loss)[0] == loss
    assert watch.counts() == {"skipped_steps": 0, "loss_spikes": 1, "rollbacks": 0}
    assert "step 3: loss spike, loss 9 of samples 0 (epoch 0): log" in caplog.text


def test_too_many_skipped_steps_in_a_row_stop_the_run(tmp_path: Path) -> None:
    watch = _watch(tmp_path, max_in_row=3)
    for step in range(2):
        _step(watch, step, math.nan)
    with pytest.raises(DivergenceError, match=r"3 steps in a row were skipped .*max_in_row.*step 3: loss not finite"):
        _step(watch, 2, math.inf)
    # A good step in between begins the count anew.
    watch = _watch(tmp_path, max_in_row=2)
    for step, loss in enumerate([math.nan, 1.0, math.nan, 1.0]):
        assert _step(watch, step, loss)[1] == "go on"
    assert watch.counts()["skipped_steps"] == 2


def test_a_vetoed_loss_does_not_move_the_limit(tmp_path: Path) -> None:
    """Otherwise a run of spikes would soon be normal."""
    watch = _watch(tmp_path, spike="skip", spike_z=10.0, window=4)
    for step, loss in enumerate([1.0, 1.1, 0.9, 1.0, 1.8, 1.8, 1.8, 1.8]):
        _step(watch, step, loss)
    assert watch.counts()["loss_spikes"] == watch.counts()["skipped_steps"] == 4


def test_rollbacks_leave_out_the_data_up_to_the_bad_step_and_are_counted(tmp_path: Path) -> None:
    watch = _watch(tmp_path, not_finite="rollback", window=5, rollback_data=100, max_rollbacks=2)
    assert watch.targets(7) == [8]
    watch.rolled_back(7, 4, {"losses": [1.0, 2.0]})  # not data that the checkpoint of step 4 has seen
    assert watch.passed == ((4, 8),) and watch.state()["losses"] == [1.0, 2.0]
    # The run is back at step 4. Bad less than a window after step 7: the checkpoint before that of step 4.
    assert watch.targets(12) == [4, 13] and watch.targets(13) == [14]
    watch.rolled_back(5, 4, {})  # step 5 used data step 9
    assert watch.passed == ((4, 10),)
    with pytest.raises(DivergenceError, match="still diverges after 2 rollbacks"):
        watch.rolled_back(9, 4, {})
    # A limited part of the data: of the last 3 data steps.
    watch = _watch(tmp_path, not_finite="rollback", rollback_data=3)
    watch.rolled_back(20, 10, {})
    assert watch.passed == ((18, 21),)


@pytest.mark.parametrize("setting", [{"window": 0}, {"spike_z": 0.0}, {"rollback_data": 0}])
def test_impossible_settings_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(setting))}: "):
        DivergenceConfig(**setting)


# ----------------------------------------------------------------------------------------------- drills


class Poisoned(LatentLoader):
    """One sample of one epoch has latents that are NaN, or far too large."""

    key, factor = (0, 0), math.nan

    def batch(self, keys: list[Any]) -> Any:
        batch = super().batch(keys)
        batch.latents[(batch.keys == torch.tensor(self.key)).all(1)] *= self.factor
        return batch


class Passing(LatentLoader):
    """All data, without the steps `left_out`."""

    left_out: tuple[int, ...] = ()

    def batches(self, first_step: int, passed: Any = ()) -> Iterator[Any]:
        steps = [step for step in range(first_step, 100) if step not in self.left_out]
        for step in steps:
            yield from map(self.batch, self.keys(step))


def drills(root: str, data: str, key: tuple[int, int], deepspeed: bool = False) -> dict[str, Any]:
    """Runs with every policy and one bad sample; returns their errors."""
    out: dict[str, Any] = {}

    def run(
        name: str, reader: type, engine: dict[str, Any] = small_run.FSDP, steps: int = STEPS, **policy: Any
    ) -> None:
        diffusion.LatentLoader = reader  # type: ignore[misc]
        divergence = {"window": 3, "spike_z": 300.0, "rollback_data": 1, **policy}
        settings = small_run.recipe(Path(data), steps=steps, every=EVERY, engine=engine, divergence=divergence)
        try:
            train.train(settings, Path(root, name))
        except DivergenceError as error:
            out[name] = str(error)
        distributed.barrier()

    def poison(factor: float) -> type:
        return type("Poison", (Poisoned,), {"key": key, "factor": factor})

    run("passed by hand", type("Left", (Passing,), {"left_out": (BAD_STEP,)}))
    run("undisturbed", LatentLoader)
    run("stop", poison(math.nan), not_finite="stop")
    run("skip nan", poison(math.nan))
    run("skip spike", poison(1e3), spike="skip")
    run("log spike", poison(1e3))
    run("rollback nan", poison(math.nan), not_finite="rollback")
    run("rollback spike", poison(1e3), spike="rollback")
    run("resumed", poison(math.nan), steps=STEPS - 4, not_finite="rollback")
    run("resumed", poison(math.nan), not_finite="rollback")
    if deepspeed:
        run("zero1 passed", type("Left", (Passing,), {"left_out": (BAD_STEP,)}), small_run.ZERO1)
        run("zero1 skip", poison(math.nan), small_run.ZERO1)
        run("zero1 rollback", poison(math.nan), small_run.ZERO1, not_finite="rollback")
    return out


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drills")


@pytest.fixture(scope="module")
def bad(root: Path) -> tuple[int, int]:
    small_run.encode(root / "data")
    return 1, int(block_order(0, 1, (20, 20), 262_144)[0])


@pytest.fixture(scope="module")
def raised(root: Path, bad: tuple[int, int]) -> dict[str, Any]:
    return run_ranks(drills, 2, str(root), str(root / "data"), bad, timeout=400)[0]


def test_stop_names_the_sample_and_keeps_the_checkpoint_before(
    root: Path, bad: tuple[int, int], raised: dict[str, str]
) -> None:
    assert set(raised) == {"stop"}
    assert f"step 6: loss not finite, loss nan of samples worst first {bad[1]} (epoch 1)" in raised["stop"]
    assert sorted(p.name for p in (root / "stop/checkpoints").iterdir()) == ["step-00000003"]


@pytest.mark.parametrize("name", ["skip nan", "skip spike", "log spike", "rollback nan", "rollback spike", "resumed"])
def test_every_bad_step_is_on_record_with_its_whole_batch(
    root: Path, bad: tuple[int, int], name: str, raised: dict[str, str]
) -> None:
    rows = small_run.lines(root / name / "divergence.jsonl")
    assert [row["step"] for row in rows] == [BAD_STEP + 1] and rows[0]["data_step"] == BAD_STEP
    samples = [(s["epoch"], s["id"]) for s in rows[0]["samples"]]
    assert samples[0] == bad and len(set(samples)) == small_run.BATCH
    assert rows[0]["reason"] == ("loss spike" if "spike" in name else "loss not finite")


def test_a_skipped_step_has_no_effect_on_later_steps(root: Path, raised: dict[str, str]) -> None:
    skipped = small_run.weights(root / "skip nan", STEPS)
    assert small_run.same(skipped, small_run.weights(root / "skip spike", STEPS))
    assert not small_run.same(skipped, small_run.weights(root / "log spike", STEPS))
    assert not small_run.same(skipped, small_run.weights(root / "undisturbed", STEPS))
    assert all(bool(tensor.isfinite().all()) for tensor in skipped.values())
    assert [row["skipped_steps"] for row in small_run.lines(root / "skip nan/metrics.jsonl")] == [0] * 5 + [1] * 7


@pytest.mark.parametrize("name", ["rollback nan", "rollback spike", "resumed"])
def test_a_rollback_ends_where_a_run_without_the_bad_data_ends(root: Path, name: str, raised: dict[str, str]) -> None:
    expected = small_run.weights(root / "passed by hand", STEPS)
    assert small_run.same(small_run.weights(root / name, STEPS), expected)
    assert not small_run.same(expected, small_run.weights(root / "undisturbed", STEPS))
    rows = small_run.lines(root / name / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)) and rows[-1]["rollbacks"] == 1


@pytest.mark.full
def test_deepspeed_follows_the_same_policies(root: Path, bad: tuple[int, int]) -> None:
    assert set(run_ranks(drills, 2, str(root / "zero"), str(root / "data"), bad, True, timeout=600)[0]) == {"stop"}
    skipped, back = (small_run.weights(root / f"zero/zero1 {name}", STEPS) for name in ("skip", "rollback"))
    assert all(bool(tensor.isfinite().all()) for tensor in (*skipped.values(), *back.values()))
    counts = [small_run.lines(root / f"zero/zero1 {n}/metrics.jsonl")[-1] for n in ("skip", "rollback")]
    assert [(c["skipped_steps"], c["rollbacks"]) for c in counts] == [(1, 0), (1, 1)]
    assert small_run.same(back, small_run.weights(root / "zero/zero1 passed", STEPS))
    assert not small_run.same(skipped, back)
