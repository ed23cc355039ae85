"""Every recipe loads; the named models have the published sizes; mistakes are named."""

from pathlib import Path

import pytest
import torch

from sfd_scale import build, config
from sfd_scale.models.lightningdit import LightningDiTConfig
from sfd_scale.recipe import TrainRecipe, load_any

COMPLETE = [name for name in config.recipe_names() if config.kind_of(name) is not None]


@pytest.mark.parametrize("name", COMPLETE)
def test_every_recipe_loads_and_its_model_is_built_on_meta(name: str) -> None:
    recipe = load_any(name)
    assert config.from_dict(type(recipe), config.to_dict(recipe)) == recipe
    header = config.find(name).read_text().splitlines()[0]
    assert header.startswith("# run: ")
    if isinstance(recipe, TrainRecipe):
        with torch.device("meta"):
            assert sum(p.numel() for p in build.bare_model(recipe.model, recipe.latents, recipe.schedule).parameters())


def test_the_authors_runs_have_their_settings() -> None:
    xl, short, xxl = (config.load(f"train/{name}", TrainRecipe) for name in ("sfd_xl", "sfd_xl_80ep", "sfd_xxl"))
    assert isinstance(xl.model, LightningDiTConfig)
    assert (xl.model.size, short.train.steps, xl.train.steps) == ("XL", 400_000, 4_000_000)
    assert (short.optimizer.lr, short.optimizer.betas, xl.optimizer.lr, xl.optimizer.betas) == (
        2e-4, (0.9, 0.95), 1e-4, (0.9, 0.999),
    )  # fmt: skip
    assert (short.objective.alignment_weight, short.objective.alignment_mode) == (0.5, "cos_mse")  # type: ignore[union-attr]
    assert xl.ema.decay == 0.9999
    assert xl.engine.grad_clip is None
    assert xxl.model.size == "XXL"  # type: ignore[union-attr]
    assert {r.train.global_batch for r in (xl, short, xxl)} == {256}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("objective.alignment_weight=0", "model.alignment: an alignment head that nothing trains"),
        ("model.alignment=null", "objective.alignment_weight: 1.0 with a model without alignment head"),
        ("objective.kind=semantic_vae", "objective.semantic_weight: unknown key|model.kind"),
        ("engine.kind=ddp", "engine.kind: 'ddp'; allowed: deepspeed, fsdp"),
        ("schedule.delta_t=1.5", "schedule.delta_t: 1.5; allowed"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(override: str, words: str) -> None:
    with pytest.raises(config.ConfigError, match=words):
        config.load("train/sfd_xl", TrainRecipe, [override])


def test_an_unknown_recipe_proposes_the_nearest() -> None:
    with pytest.raises(config.ConfigError, match="did you mean train/sfd_xxl"):
        config.find(Path("train/sfd_xxxl"))
