"""The time model beside public measurements: the errors that docs/scale.md states, from the constants in the source."""

from dataclasses import replace

import pytest

from benchmarks import plan_check
from benchmarks.plan_cases import CASES, GPT2, LANGUAGE_MODELS, LIGHTNINGDIT, Case

QUICK = [case for case in CASES if case.model in (GPT2, LIGHTNINGDIT)]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[] if case in QUICK else pytest.mark.full, id=f"{number}: {case.model.name}")
        for number, case in enumerate(CASES)
    ],
)
def test_the_page_has_what_the_time_model_predicts(case: Case) -> None:
    assert plan_check.row(plan_check.predict(case)) in plan_check.PAGE.read_text(encoding="utf-8").splitlines()


def test_half_of_the_measurements_are_held_out() -> None:
    assert len(CASES) >= 16
    assert 8 <= sum(case.fits for case in CASES) <= len(CASES) / 2


@pytest.mark.full
def test_held_out_measurements_are_met_within_the_targets() -> None:
    held_out = [plan_check.predict(case) for case in CASES if not case.fits]
    median, _ = plan_check.errors(held_out)
    assert median <= plan_check.TARGET_MEDIAN
    # The page explains the one that misses: DiT's first code, in TF32 with the VAE in its step.
    missed = [result.case for result in held_out if abs(result.error) > plan_check.TARGET_WORST]
    assert [case.precision for case in missed] == ["tf32"]


@pytest.mark.full
def test_the_constants_are_the_best_fit() -> None:
    newer, a100, memory = plan_check.fit([case for case in CASES if case.fits])
    assert (newer, memory) == (plan_check.PUBLIC.matmul.value, plan_check.PUBLIC.memory.value)
    assert a100 == next(case.hardware.tensor_share for case in CASES if "A100" in case.gpu)


def test_a_measured_step_stays_on_the_page_until_another_is_measured() -> None:
    step = f"{plan_check.REAL_STEP} 340 ms."
    page = f"before\n{plan_check.START}\nold tables\n\n{step}\n{plan_check.END}\nafter\n"
    again = plan_check.insert(page, "new tables")
    assert again == page.replace("old", "new")
    assert plan_check.insert(again, f"tables\n\n{plan_check.REAL_STEP} 2 ms.").count(plan_check.REAL_STEP) == 1


def test_a_slower_gpu_is_predicted_slower() -> None:
    case = QUICK[0]
    slow = replace(case, hardware=replace(case.hardware, peak_bf16=case.hardware.peak_bf16 / 2))
    assert plan_check.predict(slow).predicted < plan_check.predict(case).predicted


def test_language_models_have_the_published_number_of_parameters() -> None:
    for model, parameters in LANGUAGE_MODELS.items():
        footprint, _ = plan_check.counts(model, "bf16")
        assert footprint.parameters == pytest.approx(parameters, rel=0.01), model.name
