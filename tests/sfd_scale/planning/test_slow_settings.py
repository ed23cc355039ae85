"""Recipes are fast by default, and `sfd doctor RECIPE` names what is slow in one, with the key that changes it."""

import dataclasses

import pytest
import torch
from typer.testing import CliRunner

from eval import speed as sampling_speed
from eval.recipe import EvalRecipe
from sfd_scale import build, config
from sfd_scale.__main__ import app
from sfd_scale.diffusion.multistep import MultistepConfig
from sfd_scale.engines.deepspeed import DeepSpeedConfig, deepspeed_json
from sfd_scale.engines.fsdp import FSDPConfig
from sfd_scale.planning.costs import memory_per_rank, with_resharding
from sfd_scale.planning.slow_settings import slow_settings
from sfd_scale.recipe import TrainRecipe
from sfd_scale.runtime.batch_split import BatchSplit, split_batch

GPU = torch.device("cuda")
EIGHT = BatchSplit(32, 1, 8)
NAMES = [name for name in config.recipe_names() if config.kind_of(name) in ("train", "eval")]
REAL = [name for name in NAMES if name.startswith(("train/", "eval/"))]


@pytest.mark.parametrize("name", [name for name in REAL if name.startswith("train/")])
def test_a_training_recipe_of_a_real_size_is_fast_on_a_gpu(name: str) -> None:
    recipe = config.load(name, TrainRecipe)
    slow = slow_settings(recipe, GPU, split_batch(recipe.train.global_batch, recipe.train.micro_batch, 8))
    keys = {text.partition(":")[0] for text in slow}
    # What a recipe is named for, or what costs memory: the message says when to change it.
    allowed = {
        "train/semvae_ch16": {"engine.zero_stage"}, "train/sfd_xxl_zero1": {"engine.zero_stage"},
        "train/sfd_xxl_zero3": {"engine.zero_stage"},
        "train/sfd_xxl_zero3_offload": {"engine.zero_stage", "engine.offload_optimizer"},
    }  # fmt: skip
    assert keys == allowed.get(name, set())
    assert recipe.engine.compile == ("zero3" not in name)


@pytest.mark.parametrize("name", [name for name in REAL if name.startswith("eval/")])
def test_an_evaluation_is_compiled_and_has_a_fast_recipe_beside_it(name: str) -> None:
    recipe = config.load(name, EvalRecipe)
    keys = {text.partition(":")[0] for text in sampling_speed.slow_settings(recipe, GPU)}
    assert recipe.compile
    if not name.endswith("_fast"):
        assert keys <= {"precision", "sampler.kind"}
        assert f"{name}_fast" in NAMES or name in ("eval/h200_euler100", "eval/sfd_xl_fdr6")
        return
    assert keys == set() and recipe.sampler == MultistepConfig(kind="ab3", num_steps=20)
    official = config.load(name.removesuffix("_fast"), EvalRecipe)
    changed = config.differences(config.to_dict(official), config.to_dict(recipe))
    assert {key.split(".")[0] for key in changed} == {"name", "published", "precision", "batch", "sampler"}


def test_the_quickstart_and_the_study_do_not_compile_on_the_cpu() -> None:
    for name in NAMES:
        if name.startswith(("quickstart/", "study/")) and config.kind_of(name) == "train":
            assert not config.load(name, TrainRecipe).engine.compile, name


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (["engine.compile=false"], "engine.compile=true"),
        (["engine.precision=fp32"], "engine.precision=bf16"),
        (["engine.reshard_after_forward=true"], "engine.reshard_after_forward=auto"),
        (["engine.cpu_offload=true"], "engine.cpu_offload=false"),
        (["engine.activation_checkpointing=block"], "none is faster"),
        (["attention=math"], "attention=auto"),
        (["engine.kind=deepspeed", "engine.zero_stage=3"], "engine.kind=fsdp"),
        (["engine.kind=deepspeed", "engine.zero_stage=2"], "engine.compile=true"),
        (["engine.kind=deepspeed", "engine.zero_stage=2", "engine.compile=true", "engine.overlap_comm=false"],
         "engine.overlap_comm=true"),
    ],
)  # fmt: skip
def test_a_slow_setting_comes_with_the_key_that_changes_it(changes: list[str], key: str) -> None:
    (text,) = slow_settings(config.load("train/sfd_xxl", TrainRecipe, changes), GPU, EIGHT)
    assert key in text


def test_small_micro_batches_are_slow_only_where_they_could_be_larger() -> None:
    recipe = config.load("train/sfd_xxl", TrainRecipe)
    (text,) = slow_settings(recipe, GPU, BatchSplit(4, 8, 8))
    assert text.startswith("train.micro_batch: 4")
    assert slow_settings(recipe, GPU, BatchSplit(4, 1, 64)) == []


def test_doctor_names_the_slow_settings_of_a_recipe() -> None:
    printed = CliRunner().invoke(app, ["doctor", "train/sfd_xl", "engine.activation_checkpointing=block"]).output
    assert "speed of train/sfd_xl: engine.activation_checkpointing: block" in printed
    refused = CliRunner().invoke(app, ["doctor", "data/encode_imagenet256"])
    assert isinstance(refused.exception, ValueError) and "kind encode; allowed" in str(refused.exception)


def test_zero_overlaps_its_traffic_where_it_can() -> None:
    for stage, overlaps in ((1, False), (2, True), (3, True)):
        given = deepspeed_json(DeepSpeedConfig(zero_stage=stage))  # type: ignore[arg-type]
        assert given["zero_optimization"]["overlap_comm"] is overlaps


def test_weights_stay_whole_after_forward_where_the_memory_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = config.load("train/sfd_b", TrainRecipe)
    model, options = build.footprint(recipe), {"ranks": 8, "ranks_per_node": 8, "micro_batch": 32}
    freed = FSDPConfig(reshard_after_forward=True)
    kept = dataclasses.replace(freed, reshard_after_forward=False)
    auto = dataclasses.replace(freed, reshard_after_forward="auto")
    needed = memory_per_rank(model, kept, grad_accum_steps=1, **options).total
    assert needed > memory_per_rank(model, freed, grad_accum_steps=1, **options).total
    assert with_resharding(model, auto, needed, grad_accum_steps=1, **options) == kept
    assert with_resharding(model, auto, needed - 1, grad_accum_steps=1, **options) == freed
    for given in (freed, kept):  # asked for by name
        assert with_resharding(model, given, 0, grad_accum_steps=1, **options) == given
    # On a GPU the recipe takes the device's memory; on the CPU weights are freed.
    assert build.engine_settings(recipe, EIGHT, torch.device("cpu")).reshard_after_forward is True  # type: ignore[union-attr]
    for memory, wanted in ((needed / 0.8 + 1, False), (needed / 0.9, True)):
        card = type("Card", (), {"total_memory": memory})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, card=card: card)
        settings = build.engine_settings(recipe, EIGHT, GPU)
        assert isinstance(settings, FSDPConfig) and settings.reshard_after_forward is wanted
