"""Every recipe loads; the named models have the published sizes; mistakes are named."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from typer.testing import CliRunner

from eval.features.config import InceptionConfig
from eval.metrics.config import MetricsConfig
from eval.recipe import BalancedLabels
from eval.recipes import load_any, summary_table
from sfd_scale import config
from sfd_scale.__main__ import app
from sfd_scale.diffusion.adaptive import Dopri5Config
from sfd_scale.diffusion.fixed_step import FixedStepConfig
from sfd_scale.diffusion.guidance import AutoGuidance, NoGuidance
from sfd_scale.engines import fsdp
from sfd_scale.engines.deepspeed import DeepSpeedConfig, deepspeed_json
from sfd_scale.engines.optim import AdamWConfig, ScheduleConfig, learning_rate
from sfd_scale.models.alignment import AlignmentConfig
from sfd_scale.models.lightningdit import LightningDiTConfig
from sfd_scale.models.semantic_vae import SemanticVAEConfig
from sfd_scale.recipe import TrainRecipe
from sfd_scale.runtime import distributed
from sfd_scale.training.semantic_first import SemanticFirstConfig
from sfd_scale.training.semantic_vae import SemanticVAELossConfig

COMPLETE = [name for name in config.recipe_names() if config.kind_of(name) is not None]
TRAIN = [name for name in COMPLETE if config.kind_of(name) == "train"]


@pytest.mark.parametrize("name", COMPLETE)
def test_every_recipe_loads_and_says_its_command_and_its_expected_result(name: str) -> None:
    recipe = load_any(name)
    assert config.from_dict(type(recipe), config.to_dict(recipe)) == recipe
    text = config.find_recipe(name).read_text()
    run, expect = (re.search(rf"^# {key}: (.+)$", text, re.M) for key in ("run", "expect"))
    assert text.startswith("# run: ") and run is not None
    assert name in run[1]
    # The expected result stands once: as `published`, or else in the header.
    assert (expect is None) == (getattr(recipe, "published", None) is not None)
    # A name that is the file's is left out.
    assert f"\nname: {name.rpartition('/')[2]}\n" not in text
    # About ten lines: what a run shares with others is a part that it extends.
    assert len([line for line in text.splitlines() if line and not line.startswith("#")]) <= 13


@pytest.mark.parametrize("name", TRAIN)
def test_every_model_is_built_on_meta(name: str) -> None:
    recipe = config.load(name, TrainRecipe)
    with torch.device("meta"):
        assert sum(p.numel() for p in recipe.task.make_model().parameters())


@pytest.fixture
def eight_ranks() -> Iterator[None]:
    """A process group of eight ranks that talks to nobody."""
    distributed.shutdown()  # the group of one that an engine made in this process earlier
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()


def test_every_engine_is_accepted_by_its_library(eight_ranks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    engines = {config.load(name, TrainRecipe).engine for name in TRAIN}
    assert {getattr(e, "zero_stage", getattr(e, "sharding", None)) for e in engines} >= {1, 2, 3, "full", "hybrid"}
    for engine in engines:
        if isinstance(engine, DeepSpeedConfig):
            from deepspeed.runtime.config import DeepSpeedConfig as Library

            read = Library(deepspeed_json(engine))
            assert read.zero_config.stage == engine.zero_stage
            assert read.bfloat16_config.enabled == (engine.precision == "bf16")
            assert (read.zero_config.offload_optimizer is not None) == engine.offload_optimizer
        else:
            mesh = fsdp._mesh(engine, torch.device("cpu"))
            wanted = {"full": (8,), "hybrid": (2, 4), "replicate": (8, 1)}[engine.sharding]
            assert mesh.shape == wanted


def test_the_table_names_model_engine_batch_and_number() -> None:
    table = summary_table()
    columns = {str(column.header): list(column.cells) for column in table.columns}
    row = columns["recipe"].index("train/sfd_xxl_zero2")
    assert [columns[name][row] for name in ("model", "engine", "global batch")] == [
        "lightningdit XXL/1", "deepspeed 2", "256",
    ]  # fmt: skip
    assert columns["published"][row].startswith("FID 2.38")
    assert set(columns["recipe"]) == set(COMPLETE)
    printed = CliRunner().invoke(app, ["recipes"]).output.splitlines()
    assert len(printed) == len(COMPLETE) + 1 and not any("…" in line for line in printed)


def of(name: str) -> TrainRecipe:
    return config.load(f"train/{name}", TrainRecipe)


@pytest.mark.parametrize("size", ["B", "L", "XL", "XXL"])
def test_the_800_and_80_epoch_runs_of_a_size_differ_as_in_the_official_code(size: str) -> None:
    long, short = of(f"sfd_{size.lower()}"), of(f"sfd_{size.lower()}_80ep")
    for recipe in (long, short):
        assert isinstance(recipe.model, LightningDiTConfig) and recipe.model.size == size
        assert recipe.schedule.delta_t == 0.3 and recipe.latents.channels == 48 and recipe.train.global_batch == 256
    assert (long.train.steps, long.optimizer.lr, long.optimizer.betas) == (4_000_000, 1e-4, (0.9, 0.999))
    assert (short.train.steps, short.optimizer.lr, short.optimizer.betas) == (400_000, 2e-4, (0.9, 0.95))


# Alignment head, texture and semantic channels, lead of semantics.
ABLATIONS = {
    "lightningdit_xl": (False, 32, 0, 0.0), "repa_xl": (True, 32, 0, 0.0), "semvae_xl": (True, 32, 16, 0.0),
    "semantic_first_xl": (True, 32, 16, 0.3), "pca_xl": (True, 32, 8, 0.3), "redi_xl": (False, 32, 8, 0.0),
    "redi_semantic_first_xl": (False, 32, 8, 0.3), "vavae_xl": (False, 32, 0, 0.0),
    "vavae_semantic_first_xl": (False, 32, 16, 0.3), "dit_xl": (False, 4, 0, 0.0),
    "repa_b": (True, 32, 0, 0.0), "repa_l": (True, 32, 0, 0.0), "repa_xl_800ep": (True, 32, 0, 0.0),
    "delta_t": (True, 32, 16, 0.3),
}  # fmt: skip


def test_an_ablation_changes_what_it_is_named_for() -> None:
    assert {f"train/ablation/{name}" for name in ABLATIONS} == {n for n in TRAIN if n.startswith("train/ablation/")}
    for name, wanted in ABLATIONS.items():
        recipe = of(f"ablation/{name}")
        latents = recipe.latents
        assert isinstance(recipe.model, LightningDiTConfig) and isinstance(recipe.objective, SemanticFirstConfig)
        head = recipe.model.alignment is not None
        found = (head, latents.texture_channels, latents.semantic_channels, recipe.schedule.delta_t)
        assert found == wanted, name
        assert recipe.name == ("delta_t_0.3" if name == "delta_t" else name) and recipe.run == Path("runs", recipe.name)
        # The latents of its data are those of the encode recipe, by the same tokenizer.
        made_by = f"data/encode_{recipe.data.path.name}"
        encode = load_any(f"{made_by}_features" if f"{made_by}_features" in COMPLETE else made_by)
        tokenizer = dataclasses.replace(encode.tokenizer, precision=recipe.tokenizer.precision)
        assert (encode.latents, tokenizer, encode.out) == (latents, recipe.tokenizer, recipe.data.path), name
        assert (encode.store.features == "shards" and recipe.data.features == "shards") or not head


@pytest.mark.parametrize("delta_t", [n / 10 for n in range(11)])
def test_the_runs_of_the_delta_t_figure_differ_in_delta_t_alone(delta_t: float) -> None:
    recipe = config.load("train/ablation/delta_t", TrainRecipe, [f"schedule.delta_t={delta_t}"])
    name = f"delta_t_{delta_t}"
    assert (recipe.name, recipe.run, recipe.schedule.delta_t) == (name, Path("runs", name), delta_t)
    different = config.differences(config.to_dict(of("ablation/semantic_first_xl")), config.to_dict(recipe))
    assert different.keys() - {"schedule.delta_t"} == {"name", "run", "published"}
    # A launcher puts its logs where the run goes.
    assert config.tree("train/ablation/delta_t", [f"schedule.delta_t={delta_t}"])["run"] == f"runs/{name}"


@pytest.mark.parametrize("old", ["train/ablation/delta_t_0.4", "recipes/train/ablation/delta_t_0.4.yaml"])
def test_an_old_recipe_name_is_an_error_that_says_the_new_one(old: str) -> None:
    with pytest.raises(config.ConfigError, match=r"give: train/ablation/delta_t schedule\.delta_t=0\.4$"):
        load_any(old)


OFFICIAL = SemanticFirstConfig(
    semantic_weight=2.0, cosine_weight=1.0, alignment_weight=1.0, alignment_mode="cos", label_dropout=0.1
)  # fmt: skip
SHORT = dataclasses.replace(OFFICIAL, alignment_weight=0.5, alignment_mode="cos_mse")


@pytest.mark.parametrize(
    ("name", "size", "steps", "objective", "optimizer"),
    [
        ("sfd_xl", "XL", 4_000_000, OFFICIAL, AdamWConfig(lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0)),
        ("sfd_xxl", "XXL", 4_000_000, OFFICIAL, AdamWConfig(lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0)),
        ("sfd_xl_80ep", "XL", 400_000, SHORT, AdamWConfig(lr=2e-4, betas=(0.9, 0.95), weight_decay=0.0)),
        ("autoguidance_b", "B", 400_000, OFFICIAL, AdamWConfig(lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0)),
    ],
)
def test_the_official_runs_have_the_official_settings(
    name: str, size: str, steps: int, objective: SemanticFirstConfig, optimizer: AdamWConfig
) -> None:
    recipe = of(name)
    head = AlignmentConfig(depth=2, hidden=2048, dim=768)
    assert recipe.model == LightningDiTConfig(size=size, alignment=head)  # type: ignore[arg-type]
    assert (recipe.objective, recipe.optimizer, recipe.lr) == (objective, optimizer, ScheduleConfig())
    assert (recipe.seed, recipe.train.steps, recipe.train.global_batch) == (0, steps, 256)
    assert (recipe.ema.decay, recipe.ema.warmup, recipe.engine.grad_clip) == (0.9999, False, None)
    assert recipe.schedule.delta_t == 0.3 and recipe.data.flip and recipe.latents.shape == (48, 16, 16)


# The table of the official repository: training run, step, step of the guidance model (thousands), scale, and FID on
# NPUs and GPUs. GUIDED_SCORES has the paper's Table 2: sFID, IS, precision, recall.
EVALUATIONS = {
    "sfd_xl_80ep": ("sfd_xl", 400_000, None, None, ("3.43", "3.50")),
    "sfd_xl_80ep_autoguidance": ("sfd_xl", 400_000, 70, 1.6, ("1.30", "1.29")),
    "sfd_xl": ("sfd_xl", 4_000_000, None, None, ("2.54", "2.66")),
    "sfd_xl_autoguidance": ("sfd_xl", 4_000_000, 70, 1.5, ("1.06", "1.03")),
    "sfd_xxl_80ep": ("sfd_xxl", 400_000, None, None, ("2.84", "2.92")),
    "sfd_xxl_80ep_autoguidance": ("sfd_xxl", 400_000, 60, 1.5, ("1.19", "1.20")),
    "sfd_xxl": ("sfd_xxl", 4_000_000, None, None, ("2.38", "2.36")),
    "sfd_xxl_autoguidance": ("sfd_xxl", 4_000_000, 120, 1.5, ("1.04", "1.04")),
    "sfd_xl_80ep_lr2e-4": ("sfd_xl_80ep", 400_000, None, None, ("3.23",)),
    "sfd_xl_80ep_lr2e-4_autoguidance": ("sfd_xl_80ep", 400_000, 60, 1.5, ("1.38",)),
}


GUIDED_SCORES = {
    "sfd_xl_80ep_autoguidance": ("3.87", "233.4", "0.78", "0.64"),
    "sfd_xl_autoguidance": ("3.89", "267.0", "0.78", "0.67"),
    "sfd_xxl_80ep_autoguidance": ("4.00", "240.4", "0.78", "0.65"),
    "sfd_xxl_autoguidance": ("3.75", "264.2", "0.78", "0.66"),
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_a_published_evaluation_has_the_published_run_guidance_model_and_scale(name: str) -> None:
    run, step, guide, scale, scores = EVALUATIONS[name]
    recipe, training, guiding = load_any(f"eval/{name}"), of(run), of("autoguidance_b")
    last = step == training.train.steps
    assert recipe.checkpoint == Path(f"runs/{run}.safetensors" if last else f"runs/{run}_{step // 1000}k.safetensors")
    assert training.checkpoint.keep_every and step % training.checkpoint.keep_every == 0
    fids, *others = re.split(r"[;(]", recipe.published)
    assert tuple(re.findall(r"\d\.\d\d", fids)) == scores
    assert (
        tuple(re.findall(r"\d+\.\d+", others[0])) == GUIDED_SCORES[name] if name in GUIDED_SCORES else len(others) == 1
    )
    assert all(score in (training.published or "") for score in scores if last)
    if guide is None:
        assert recipe.guide is None and recipe.guidance == NoGuidance()
    else:
        assert recipe.guide == Path(f"runs/autoguidance_b_{guide}k.safetensors")
        assert guiding.checkpoint.keep_every and guide * 1000 % guiding.checkpoint.keep_every == 0
        assert recipe.guidance == AutoGuidance(scale_texture=scale, scale_semantic=scale)
    # All official evaluations: 50 images of each class, dopri5, float32 with TF32, ADM's metrics.
    assert (recipe.num_samples, recipe.labels, recipe.seed) == (50_000, BalancedLabels(), 0)
    assert recipe.sampler == Dopri5Config(rtol=1e-3, atol=1e-6) and recipe.precision == "tf32"
    assert recipe.metrics == MetricsConfig(is_split=5000, neighbours=3, reference_images=10_000, kid_size=1000)
    assert recipe.extractor == InceptionConfig() and recipe.reference.path.name == "VIRTUAL_imagenet256_labeled.npz"


def test_the_evaluation_with_euler_steps_has_the_settings_of_its_measurement() -> None:
    recipe, base = load_any("eval/h200_euler100"), load_any("eval/sfd_xxl_autoguidance")
    assert (recipe.sampler, recipe.precision) == (FixedStepConfig(kind="euler", num_steps=99), "tf32")
    assert (
        recipe.guide == Path("runs/autoguidance_b_70k.safetensors") and "FID 1.0461 by pytorch-fid" in recipe.published
    )
    different = config.differences(config.to_dict(base), config.to_dict(recipe))
    assert {key.split(".")[0] for key in different} == {"name", "published", "guide", "sampler"}


def test_data_and_tokenizers_are_those_of_the_official_code() -> None:
    for name in ("encode_imagenet256", "encode_imagenet256_features"):
        recipe = load_any(f"data/{name}")
        assert recipe.store.flip and recipe.store.dtype == "float16" and recipe.tokenizer.precision == "tf32"
        assert recipe.source.size == 256 and not recipe.source.upright  # they do not look at EXIF
    semvae, semantic = of("semvae_ch16"), load_any("data/encode_imagenet256").tokenizer.semantic
    assert isinstance(semvae.model, SemanticVAEConfig) and semvae.model.heads == semantic.heads == 6
    assert isinstance(semvae.objective, SemanticVAELossConfig) and semvae.objective.kl_weight == 1e-7
    assert (semvae.train.steps, semvae.train.global_batch, semvae.lr.warmup_steps) == (1_000_000, 64, 500)
    assert semvae.optimizer == AdamWConfig(lr=5e-5, betas=(0.9, 0.999), weight_decay=0.01) and not semvae.data.flip
    # 500 steps of warm-up, 800,000 constant, the rest down to a tenth.
    rates = [learning_rate(1.0, semvae.lr, step, 1_000_000) for step in (499, 800_499, 999_999)]
    assert rates == [1.0, 1.0, pytest.approx(0.1)]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("objective.alignment_weight=0", "model.alignment: an alignment head that nothing trains"),
        ("model.alignment=null", "objective.alignment_weight: 1.0 with a model without alignment head"),
        ("objective.kind=semantic_vae", "objective.semantic_weight: unknown key|model.kind"),
        ("engine.kind=ddp", "engine.kind: 'ddp'; allowed: deepspeed, fsdp"),
        ("engine.zero_stage=2", "engine.zero_stage: unknown key"),
        ("engine.shard_sizes=2", "engine.shard_sizes: unknown key"),
        ("schedule.delta_t=1.5", "schedule.delta_t: 1.5; allowed"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(override: str, words: str) -> None:
    with pytest.raises(config.ConfigError, match=words):
        config.load("train/sfd_xl", TrainRecipe, [override])


def test_an_unknown_recipe_proposes_the_nearest() -> None:
    with pytest.raises(config.ConfigError, match="did you mean train/sfd_xxl"):
        config.find_recipe(Path("train/sfd_xxxl"))
