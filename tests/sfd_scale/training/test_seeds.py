"""The three parts of a seed: each moves its own draws alone; one number is what it was before there were parts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sfd_scale import build, config, train
from sfd_scale.recipe import TrainRecipe
from sfd_scale.runs import RunFolder
from sfd_scale.runtime.batch_split import split_batch
from sfd_scale.runtime.seeds import SEED_PARTS
from sfd_scale.training.semantic_first import SemanticFirstObjective
from tests.helpers import small_run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.encode(tmp_path_factory.mktemp("seeds") / "data")


def draws(recipe: TrainRecipe) -> dict[str, dict[str, Tensor]]:
    """What each part of the seed decides, of the first two batches, as the trainer gets it.

    The draws of noise are shown by the sample that they belong to, so that they do not depend on the order.
    """
    loader = recipe.task.make_loader(split_batch(recipe.train.global_batch, None, 1))
    objective = recipe.task.make_objective(loader, torch.device("cpu"))
    assert isinstance(objective, SemanticFirstObjective)
    found: dict[str, dict[str, Tensor]] = {"init": dict(build.make_model(recipe).named_parameters())}
    batches = loader.batches(0)
    first = [next(batches) for _ in range(2)]
    drawn = [objective.prepare(batch).draws for batch in (dataclasses.replace(b, keys=KEYS) for b in first)]  # type: ignore[type-var]
    found["data"] = {"keys": torch.cat([b.keys for b in first]), "latents": torch.cat([b.latents for b in first])}  # type: ignore[union-attr]
    names = ("noise", "g", "dropped")
    found["noise"] = {name: torch.cat([getattr(d, name) for d in drawn]) for name in names}
    return found


KEYS = torch.tensor([[epoch, sample] for epoch in (0, 1) for sample in range(4)])


def test_a_part_of_the_seed_moves_its_own_draws_and_no_other_bit(data: Path) -> None:
    base = draws(small_run.recipe(data))
    for part in SEED_PARTS:
        other = draws(small_run.recipe(data, seed={part: 1}))
        for name in SEED_PARTS:
            assert small_run.same(base[name], other[name]) == (name != part), (part, name)
    both = draws(small_run.recipe(data, seed={"init": 1, "noise": 1}))
    one = draws(small_run.recipe(data, seed=1))
    assert small_run.same(both["init"], one["init"]) and small_run.same(both["noise"], one["noise"])
    assert small_run.same(both["data"], base["data"]) and not small_run.same(both["data"], one["data"])


def test_flips_and_order_belong_to_data_and_label_dropout_to_noise(data: Path) -> None:
    """Each kind of draw by itself, with enough of them that two seeds cannot agree by chance."""
    base, shuffled = draws(small_run.recipe(data)), draws(small_run.recipe(data, seed={"data": 1}))
    assert not torch.equal(base["data"]["keys"], shuffled["data"]["keys"])
    still = {"path": str(data), "order": "blocks", "shuffle": False}
    a, b = (draws(small_run.recipe(data, data=still, seed={"data": seed}))["data"] for seed in (0, 1))
    assert torch.equal(a["keys"], b["keys"]) and not torch.equal(a["latents"], b["latents"])  # other flips
    half = {"kind": "semantic_first", "alignment_weight": 0.0, "label_dropout": 0.5}
    kept = [draws(small_run.recipe(data, objective=half, seed={"noise": s}))["noise"]["dropped"] for s in range(8)]
    assert len({tuple(row.tolist()) for row in kept}) > 4


def test_one_number_is_the_recipe_that_it_was(data: Path) -> None:
    """`seed: 3` keeps its form, so its digest; three equal parts are that recipe."""
    recipe = small_run.recipe(data, seed=3)
    assert config.to_dict(recipe)["seed"] == 3
    equal = small_run.recipe(data, seed={"init": 3, "data": 3, "noise": 3})
    assert equal == recipe and config.digest(equal) == config.digest(recipe)
    apart = small_run.recipe(data, seed={"init": 3})
    assert config.to_dict(apart)["seed"] == {"init": 3, "data": 0, "noise": 0}
    assert config.from_dict(TrainRecipe, config.to_dict(apart)) == apart


def seed_of(path: Path, *words: str) -> Any:
    return config.to_dict(config.load(str(path), TrainRecipe, list(words)))["seed"]


def test_one_part_on_the_command_line_leaves_the_others_at_the_recipes_number(data: Path, tmp_path: Path) -> None:
    path = small_run.write_recipe(tmp_path / "r.yaml", data, seed=7)
    assert seed_of(path, "seed.init=1") == {"init": 1, "data": 7, "noise": 7}
    assert seed_of(path, "seed=3", "seed.data=2") == {"init": 3, "data": 2, "noise": 3}
    assert seed_of(path, "seed.data=2", "seed=3") == 3
    without = small_run.write_recipe(tmp_path / "n.yaml", data)
    assert seed_of(without, "seed.noise=5") == {"init": 0, "data": 0, "noise": 5}
    for words, message in (
        (["seed.order=1"], r"seed\.order: unknown key; allowed: init, data, noise"),
        (["seed=x"], r"seed: 'x'; allowed: a whole number or the keys of Seeds"),
        (["seed.init=1.5"], r"seed\.init: 1\.5; allowed: a whole number"),
    ):
        with pytest.raises(config.ConfigError, match=message):
            seed_of(path, *words)


def test_a_run_resumes_under_its_seeds_and_refuses_others(data: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    mixed: dict[str, Any] = {"seed": {"init": 1, "data": 2, "noise": 3}}
    assert train.train(small_run.recipe(data, steps=6, every=3, **mixed), whole)
    assert train.train(small_run.recipe(data, steps=3, every=3, **mixed), parts)
    assert train.train(small_run.recipe(data, steps=6, every=3, **mixed), parts)
    assert small_run.same(small_run.weights(whole, 6), small_run.weights(parts, 6))
    assert RunFolder(parts).recipe.seeds.noise == 3
    with pytest.raises(ValueError, match=r"recipe\.seed\.noise: 4, in the checkpoint 3"):
        train.train(small_run.recipe(data, steps=9, every=3, seed={"init": 1, "data": 2, "noise": 4}), parts)
