"""`sfd plan --best`: the search, the batch that pays, the nearest that fits, and the cost of an evaluation."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from sfd_scale import plan as plans
from sfd_scale.config import load
from sfd_scale.engines.deepspeed import DeepSpeedConfig
from sfd_scale.planning import evaluation_cost, search
from sfd_scale.planning.convergence import FLUX, FLUX_SAMPLES
from sfd_scale.planning.planner import PlannedRun, plan
from sfd_scale.recipe import TrainRecipe

H200 = plans.make_machine("h200", None, gpus_per_node=8, network=None)
SMALL = plans.make_machine("4090", None, gpus_per_node=8, network=None)
XXL = load("train/sfd_xxl", TrainRecipe)
MODEL = plans.count_model(XXL)


def job(ranks: int) -> PlannedRun:
    return plans.make_job(XXL, MODEL, ranks, 8, samples=1)


@pytest.fixture(scope="module")
def advised() -> plans.Advised:
    # Without a decoder: tracing one takes longer than the whole search.
    return plans.best("train/sfd_xxl", ["tokenizer.texture=null"], [8, 12, 64], H200, price=2.0)


def test_the_best_settings_are_no_slower_than_any_other() -> None:
    found = search.choices(job(8), H200.hardware, H200.efficiency)
    assert [c.plan.step_seconds for c in found] == sorted(c.plan.step_seconds for c in found)
    assert all(choice.plan.fits for choice in found)
    engines = {(type(c.job.engine).__name__, c.job.engine.activation_checkpointing) for c in found}
    assert len(engines) == 6
    assert {c.job.engine.overlaps for c in found if isinstance(c.job.engine, DeepSpeedConfig)} == {True, False}
    usual = plan(replace(job(8), engine=DeepSpeedConfig(zero_stage=2)), H200.hardware, H200.efficiency)
    assert found[0].plan.step_seconds < usual.step_seconds


def test_the_command_line_gives_the_advised_plan(advised: plans.Advised) -> None:
    for advice in advised.found:
        words = shlex.split(plans.command_line(advised, advice, 8))
        assert words[0] == ("RANKS=8" if advice.ranks == 8 else "HOSTFILE=hosts")
        assert words[1:4] == ["launchers/deepspeed.sh", "train", "train/sfd_xxl"]
        recipe = load(words[3], TrainRecipe, words[4:])
        again = plan(plans.make_job(recipe, MODEL, advice.ranks, 8, samples=1), H200.hardware, H200.efficiency)
        assert again.step_seconds == pytest.approx(advice.choice.plan.step_seconds)
        assert again.days_with_failures == pytest.approx(advice.days)


def test_the_fastest_the_cheapest_and_the_refused_are_named(advised: plans.Advised) -> None:
    assert advised.fastest.ranks == 64 and advised.fastest.batch > 256
    assert advised.cheapest.ranks == 8
    assert advised.knee == 8
    assert len(advised.refused) == 1 and advised.refused[0].startswith("12 GPUs: --gpus: 12 with 8 per node")
    parts = [part for part in plans.advice_text(advised, 8, as_markdown=True) if isinstance(part, str)]
    text = "\n".join(parts)
    assert "fastest: " in text and "left out: 12 GPUs" in text
    assert "FLUX.1 of MLPerf, another model" in text
    table = [line.split("|") for line in parts[0].splitlines()]
    assert table[0][-2].strip() == "cost"
    assert float(table[2][-2].replace(",", "")) == pytest.approx(2 * advised.found[0].gpu_hours, rel=0.01)


def test_the_knee_is_where_added_gpus_give_less_than_half_of_their_share() -> None:
    choice = search.choices(job(8), H200.hardware, H200.efficiency)[0]

    def at(days: dict[int, float]) -> int | None:
        return search.knee([search.Advice(choice, ranks, 256, value) for ranks, value in days.items()])

    assert at({8: 4.0, 16: 2.0, 32: 1.0}) == 32
    assert at({8: 4.0, 16: 2.5, 32: 2.4}) == 16
    assert at({8: 4.0, 16: 3.0}) == 8  # a third more for twice the GPUs
    assert at({8: 4.0}) is None


def test_samples_to_a_quality_rise_with_the_batch_as_measured() -> None:
    for batch, samples in FLUX_SAMPLES.items():
        expected = samples / FLUX_SAMPLES[512]
        assert FLUX.samples_factor(batch, 512) == pytest.approx(expected, rel=0.06), batch
    assert FLUX.samples_factor(FLUX.critical, 1e-9) == pytest.approx(2.0)


def test_where_nothing_fits_the_nearest_that_fits_is_named() -> None:
    tiny = replace(SMALL.hardware, memory=1e9)
    with pytest.raises(ValueError, match=r"^8 GPUs: nothing fits; the least memory is [\d.]+ GiB, by engine\."):
        plans.best("quickstart/sfd", ["latents.size=64"], [8], replace(SMALL, hardware=replace(tiny, memory=1e6)))
    found, refused = search.advise(job(8), [8], tiny, SMALL.efficiency, FLUX, 8)
    assert found == [] and "that fits a100-40g, a100, h100" in refused[0]
    least = search.nearest(job(8))
    tried = dict(text.split("=") for text in least.overrides)
    assert tried["train.micro_batch"] == "1" and tried["engine.activation_checkpointing"] == "block"
    assert "h200" in least.gpus
    # The plan of one recipe says it too.
    crowded = replace(job(8), micro_batch=32)
    made = plans.Planned(XXL, crowded, plan(crowded, SMALL.hardware, SMALL.efficiency), plans.Calibrated(SMALL))
    assert not made.plan.fits
    table = plans.table([made], SMALL, as_markdown=False)
    assert not isinstance(table, str)
    assert "does not fit" in list(table.columns[0].cells)


def test_failures_make_a_run_longer() -> None:
    often = replace(job(64), gpu_mtbf_hours=100.0)
    usual, worse = (plan(run, H200.hardware, H200.efficiency) for run in (job(64), often))
    assert worse.days == usual.days and worse.days_with_failures > 1.05 * usual.days_with_failures


@pytest.mark.full
def test_an_evaluation_costs_its_evaluations_and_its_decoder() -> None:
    found = plans.best("train/sfd_xxl", [], [8], H200)
    costs = {cost.solver: cost for cost in found.evaluation}
    short, long = costs["Euler, 100 steps"], costs["Euler, 250 steps"]
    each = (long.unguided - short.unguided) / 150
    decoding = short.unguided - 100 * each
    assert 0 < decoding < 20 * each
    assert short.cfg - decoding == pytest.approx(2 * (short.unguided - decoding))
    assert short.autoguidance is not None and short.unguided < short.autoguidance < short.cfg
    none = evaluation_cost.evaluation_costs(MODEL.work, None, None, H200.hardware, H200.efficiency)
    assert none[0].autoguidance is None and none[0].unguided < costs[none[0].solver].unguided


def test_plans_are_drawn_and_written_as_a_page(tmp_path: Path) -> None:
    made = [
        plans.Planned(XXL, job(n), plan(job(n), H200.hardware, H200.efficiency), plans.Calibrated(H200))
        for n in (8, 64)
    ]
    picture, page = tmp_path / "plots" / "plan.png", tmp_path / "pages" / "plan.html"
    plans.write_pictures(made, H200, picture, page)
    with Image.open(picture) as image:
        assert image.size[0] > 1000
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 20
    text = page.read_text(encoding="utf-8")
    assert text.count("<tr>") == 3 and "<td>64</td>" in text
    with pytest.raises(ValueError, match=r"--plot: .*plan\.jpg; allowed: a name that ends with \.png"):
        plans.write_pictures(made, H200, tmp_path / "plan.jpg", None)
