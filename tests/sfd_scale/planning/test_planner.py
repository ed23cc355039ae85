"""Plans of a run: time, micro-batch, tables, and their calibration by measurements."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from sfd_scale import plan as plans
from sfd_scale import train
from sfd_scale.config import load, to_yaml
from sfd_scale.engines.deepspeed import DeepSpeedConfig
from sfd_scale.engines.fsdp import FSDPConfig
from sfd_scale.planning import planner, tables
from sfd_scale.planning.costs import AnyEngineConfig, shard_group
from sfd_scale.planning.efficiency import Efficiency
from sfd_scale.planning.footprint import Activations
from sfd_scale.planning.hardware import GPUS, Hardware
from sfd_scale.planning.work import Operation, Work
from sfd_scale.recipe import TrainRecipe
from tests.helpers.two_blocks import MODEL, P

# One matmul of 6e12 FLOPs a sample, in forward.
WORK = Work(((Operation("matmul", False, True, (1, 0, 10**4, 3 * 10**4), (0, 10**4, 0, 0)), 1),), 1, "bf16")


def job(engine: AnyEngineConfig, ranks: int = 8, micro_batch: int | None = None) -> planner.PlannedRun:
    return planner.PlannedRun(
        footprint=MODEL, work=WORK, flops_per_sample=6e12, engine=engine, global_batch=256, micro_batch=micro_batch,
        steps=1000, ranks=ranks, ranks_per_node=8, sample_bytes=1000, samples=5000, kept_checkpoints=3, save_every=1000,
    )  # fmt: skip


H100, H200, SMALL = GPUS["h100"], GPUS["h200"], GPUS["4090"]


def plan(work: planner.PlannedRun, hardware: Hardware = H100, mfu: float | None = None) -> planner.Plan:
    return planner.plan(work, hardware, Efficiency(), mfu)


def test_a_stated_mfu_gives_the_time() -> None:
    made = plan(job(DeepSpeedConfig(zero_stage=1)), mfu=0.5)
    assert made.step_seconds == pytest.approx(256 * 6e12 / (8 * H100.peak_bf16 * 0.5))
    assert made.mfu == pytest.approx(0.5) and made.time is None
    assert made.gpu_hours == pytest.approx(1000 * made.step_seconds * 8 / 3600, rel=0.01)
    again = DeepSpeedConfig(zero_stage=1, activation_checkpointing="block")
    assert planner.seconds_at_mfu(job(again), H100.peak_bf16, 0.5) == pytest.approx(made.step_seconds * 4 / 3)
    assert (made.checkpoint, made.checkpoints, made.data) == (16 * P, 48 * P, 5_000_000)


def test_muon_takes_less_memory_and_more_time_than_adamw() -> None:
    adamw, muon = plans.make(["train/sfd_xl", "train/sfd_xl_muon"], [], [8], machine("h200"), samples=1)
    model = muon.job.footprint
    assert adamw.job.footprint.muon.matrices == ()
    assert adamw.plan.memory.optimizer - muon.plan.memory.optimizer == pytest.approx(model.muon.elements * 4 / 8, 0.01)
    assert adamw.plan.checkpoint - muon.plan.checkpoint == 4 * model.muon.elements
    # 28 blocks of 11 cut matrices and the alignment head: 11.5% of the model's FLOPs at batch 256, on 8 owners.
    assert muon.plan.optimizer_flops / muon.plan.flops_per_step == pytest.approx(0.115, rel=0.02)
    assert adamw.plan.time is not None and muon.plan.time is not None
    iterations = muon.plan.time.optimizer - adamw.plan.time.optimizer
    assert iterations > muon.plan.optimizer_flops / 8 / H200.peak_bf16
    assert iterations < 8 * muon.plan.optimizer_flops / 8 / H200.peak_bf16
    # MFU has the model's FLOPs alone, so the optimizer's time lowers it.
    assert muon.plan.mfu / adamw.plan.mfu == pytest.approx(adamw.plan.step_seconds / muon.plan.step_seconds)
    rows = dict(row[:2] for row in tables.quantities(muon.plan, H200))
    assert "not in the MFU" in rows["FLOPs of Muon per step"] and "update by Muon" in rows


def test_the_time_of_a_plan_is_that_of_its_parts_and_saves() -> None:
    made = plan(job(FSDPConfig()))
    assert made.time is not None
    assert made.step_seconds == pytest.approx(sum(seconds for _, seconds in made.time.parts))
    assert made.mfu == pytest.approx(256 * 6e12 / (8 * H100.peak_bf16 * made.step_seconds))
    save = planner.save_seconds(job(FSDPConfig()), H100, Efficiency())
    assert save == pytest.approx(16 * P / 8 / H100.pcie)
    assert made.total_seconds == pytest.approx(1000 * made.step_seconds + save)
    # A run saves at every thousandth step, so once in 1,900. Failures lose a share of the wall-clock time.
    longer = plan(replace(job(FSDPConfig()), steps=1900, gpu_mtbf_hours=1.0))
    assert longer.total_seconds == pytest.approx(1900 * made.step_seconds + save)
    assert longer.goodput.lost > 0.1
    assert longer.days_with_failures * (1 - longer.goodput.lost) == pytest.approx(longer.total_seconds / 86400)
    slow = planner.save_seconds(replace(job(FSDPConfig()), background=False), H100, Efficiency())
    assert slow == pytest.approx(save + 16 * P / 8 / Efficiency().disk.value)


def test_the_largest_micro_batch_fits_and_the_next_one_does_not() -> None:
    # With 10^9 bytes a sample, 32 samples fit in 80 GB, and 16 in 24 GB.
    assert plan(job(FSDPConfig())).largest_micro_batch == 32
    made = plan(job(FSDPConfig()), SMALL)
    assert (made.largest_micro_batch, made.split.micro_batch, made.split.grad_accum_steps) == (16, 16, 2)
    assert made.memory.total <= planner.USABLE * SMALL.memory < planner.memory_of(job(FSDPConfig()), 32, 1).total
    # A recipe that sets its micro-batch is planned with it.
    assert plan(job(FSDPConfig(), micro_batch=4), SMALL).split.micro_batch == 4
    huge = replace(job(FSDPConfig()), footprint=replace(MODEL, activations=Activations(10**12, 0, 0)))
    assert plan(huge).largest_micro_batch == 0 and not plan(huge).fits


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (0, "--gpus: 0; allowed: 1 and up"),
        (12, "--gpus: 12 with 8 per node; allowed: whole nodes, nearest 8 or 16"),
        (24, r"global_batch: 256 does not divide over 24 ranks.*nearest: 16 or 32"),
        (512, "nearest: 256"),
    ],
)
def test_a_world_that_cannot_be_is_refused_with_the_nearest_that_can(ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(job(FSDPConfig(), ranks))


def test_groups_that_do_not_divide_the_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"engine.shard_size: 3 does not divide 8 ranks; allowed here: \[1, 2, 4, 8\]"):
        shard_group(FSDPConfig(sharding="hybrid", shard_size=3), 8, 8)
    with pytest.raises(ValueError, match=r"engine.hpz_partition_size: 3 does not divide 8"):
        shard_group(DeepSpeedConfig(zero_stage=3, hpz_partition_size=3), 8, 8)
    assert shard_group(FSDPConfig(sharding="hybrid"), 64, 8) == 8


def machine(gpu: str) -> plans.Machine:
    return plans.make_machine(gpu, None, gpus_per_node=8, network=None)


def test_a_measured_mfu_is_taken_from_a_file(tmp_path: Path) -> None:
    def mfu(name: str, text: str) -> float | None:
        (tmp_path / name).write_text(text)
        return plans.calibrated(tmp_path / name, machine("h100"), 1e12).mfu

    rows = [{"step": n, "mfu": value} for n, value in enumerate((None, 0.1, 0.3, 0.32))]
    assert mfu("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows)) == 0.3
    # Of a device without a known peak: the throughput of a rank, over the peak of the planned GPU.
    assert mfu("cpu.jsonl", '{"mfu": null, "samples_per_s_per_rank": 98.9}\n') == pytest.approx(0.1)
    assert mfu("results.json", '{"samples_per_s": 791.2, "world_size": 4}') == pytest.approx(0.2)
    with pytest.raises(ValueError, match=r"--measured: .*none\.jsonl: no such file"):
        plans.calibrated(tmp_path / "none.jsonl", machine("h100"), 1e12)
    with pytest.raises(ValueError, match="no `mfu`, nor `samples_per_s` with `world_size`"):
        mfu("results.json", "{}")
    facts = '{"figures": [], "parts": {"machine": {"facts": {"sustained bf16 matmul, FLOP/s": "fast"}}}}'
    with pytest.raises(ValueError, match="its values are not those of a run"):
        mfu("results.json", facts)
    with pytest.raises(ValueError, match="results.json is truncated or damaged"):
        mfu("results.json", "[")


def test_results_of_gpu_bench_calibrate_the_plan(tmp_path: Path) -> None:
    def bench(rates: dict[str, float | None]) -> plans.Calibrated:
        figures = [
            {"what": f"XL/1 bf16 training, {what}, MFU 40%, 50 GiB", "ours": rate} for what, rate in rates.items()
        ]
        (tmp_path / "gpu.json").write_text(json.dumps({"benchmark": "gpu", "figures": figures}))
        return plans.calibrated(tmp_path / "gpu.json", machine("h200"), 1e12)

    modes = {
        "micro-batch 32, activation checkpointing none": 450.0,
        "micro-batch 128, activation checkpointing none": 500.0,
    }
    found = bench(
        {**modes, "micro-batch 128, eager": 250.0, "micro-batch 128, float8": 900.0, "micro-batch 16, eager": None}
    )
    assert found.mfu is None and found.note is not None and found.note.startswith("3 measured steps: error ")
    ((slow,), (fast,)) = (
        plans.make(["train/sfd_xl"], ["engine.compile=true"], [8], used, measured=None)
        for used in (found.machine, bench({what: 1.3 * rate for what, rate in modes.items()}).machine)
    )
    assert fast.plan.step_seconds < slow.plan.step_seconds
    with pytest.raises(ValueError, match="no figure of training in it"):
        bench({"micro-batch 1, float8": 1.0})


def test_the_metrics_of_a_run_calibrate_the_plan_to_its_own_time(tmp_path: Path) -> None:
    recipe = load("train/sfd_xl", TrainRecipe, [f"run={tmp_path}", "data.path=/none"])
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    (tmp_path / "environment.json").write_text('{"world_size": 8}')
    rows = [{"step": 100 * n, "samples_per_s_per_rank": rate} for n, rate in enumerate((50.0, 200.0, 210.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"samples": 1000}
    (usual,) = plans.make([str(tmp_path / "recipe.yaml")], [], [8], machine("h200"), **options)
    (fitted,) = plans.make(
        [str(tmp_path / "recipe.yaml")], [], [8], machine("h200"), measured=tmp_path / "metrics.jsonl", **options
    )
    measured = recipe.train.global_batch / 8 / 200
    assert abs(usual.plan.step_seconds / measured - 1) > 0.2
    assert fitted.plan.step_seconds == pytest.approx(measured, rel=0.1)
    assert fitted.calibrated.note is not None and "after the calibration" in fitted.calibrated.note


def test_the_table_of_a_recipe_has_a_line_for_every_number_of_gpus() -> None:
    overrides = ["model.size=S", "model.alignment=null", "objective.alignment_weight=0"]
    made = plans.make(["train/sfd_xxl_zero2"], overrides, [8, 64], machine("h200"))
    text = plans.table(made, machine("h200"), as_markdown=True)
    assert isinstance(text, str)
    lines = text.splitlines()
    assert [line.split("|")[3].strip() for line in lines[2:]] == ["8", "64"]
    assert len({line.count("|") for line in lines}) == 1
    # Shards of the ImageNet recipe: 48 × 16 × 16 values of 16 bits, both flips.
    recipe, work, found = made[0].recipe, made[0].job, made[0].plan
    assert work.sample_bytes == 48 * 16 * 16 * 2 * 2
    assert work.samples == plans.IMAGENET
    assert math.isclose(found.flops_per_step, 256 * work.flops_per_sample)
    # The summary of a run says the same.
    total, state = (size / 2**30 for size in (found.memory.total, found.memory.state))
    assert train.planned_memory(recipe, found.split, activations=True).startswith(f"{total:.2f} GiB per rank")
    assert train.planned_memory(recipe, found.split, False) == f"{state:.2f} GiB per rank, without activations"
    assert total > state + 1
    with pytest.raises(ValueError, match="--gpu: 'h999'; allowed: a100-40g.*or a file by --gpu-spec"):
        machine("h999")
    with pytest.raises(ValueError, match="--gpus: 8,x; allowed: numbers separated by commas"):
        plans.parse_counts(["8,x"])
    assert plans.parse_counts(["8,16", "32"]) == [8, 16, 32]


@pytest.mark.parametrize(
    ("recipe", "sample_bytes"),
    [
        ("quickstart/sfd", (16 + 16) * 4 * 4 * 2 + 96 * 4 * 4 * 2),  # latents and alignment features, one flip
        ("quickstart/semvae", 3 * 64 * 64),  # images
        ("quickstart/vision", 3 * 64 * 64),
        ("train/semvae_ch16", 3 * 256 * 256),
    ],
)
def test_every_kind_of_run_has_a_plan(recipe: str, sample_bytes: int, tmp_path: Path) -> None:
    overrides = [f"data.path={tmp_path / 'none'}"]
    (made,) = plans.make([recipe], overrides, [2], machine("h100"), samples=1000)
    assert made.job.sample_bytes == sample_bytes and made.plan.data == 1000 * sample_bytes
    assert made.plan.memory.activations > 0
    assert made.plan.flops_per_step == made.recipe.train.global_batch * made.job.flops_per_sample > 0


def test_images_of_512_pixels_take_four_times_the_space(tmp_path: Path) -> None:
    online = [f"data.path={tmp_path / 'none'}", "data.features=online"]
    small = load("train/sfd_xl", TrainRecipe, online)
    large = load("train/sfd_xl", TrainRecipe, [*online, "latents.size=32", "tokenizer.vision.image_size=512"])
    assert plans.data_size(small, 1)[0] == 48 * 16 * 16 * 2 * 2 + 3 * 256 * 256
    assert plans.data_size(large, 1)[0] == 4 * plans.data_size(small, 1)[0]
