"""Recipes of every kind, of training and of evaluation: loaded by their `kind`, listed and compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Column, Table

from eval import recipe as harness
from eval import speed
from eval.recipe import EvalRecipe
from eval.study.recipe import StudyRecipe
from sfd_scale import config
from sfd_scale.engines.deepspeed import DeepSpeedConfig
from sfd_scale.planning.slow_settings import slow_settings as slow_training_settings
from sfd_scale.recipe import TrainRecipe
from sfd_scale.runtime import distributed
from sfd_scale.runtime.batch_split import split_batch

KINDS: dict[str, type] = {**harness.KINDS, "study": StudyRecipe}


def load_any(name: str, overrides: Sequence[str] = ()) -> Any:
    """A recipe as the class that its `kind` key names; see `config.load_by_kind`."""
    return config.load_by_kind(name, KINDS, overrides)


def slow_settings(name: str, overrides: Sequence[str] = ()) -> list[str]:
    """What is slow in a recipe of training or evaluation on this machine, with the keys that change it.

    Raises:
        ValueError: for a recipe of another kind.
    """
    recipe, device = load_any(name, overrides), distributed.device()
    if isinstance(recipe, EvalRecipe):
        return speed.slow_settings(recipe, device)
    if not isinstance(recipe, TrainRecipe):
        raise ValueError(f"{name}: kind {recipe.kind}; allowed: a recipe of kind train or eval")
    ranks = max(torch.cuda.device_count(), 1)
    split = split_batch(recipe.train.global_batch, recipe.train.micro_batch, ranks)
    return slow_training_settings(recipe, device, split)


def summary_table(words: Sequence[str] = ()) -> Table:
    """The recipes that a command can run: kind, model, engine, global batch and published number.

    Args:
        words: only recipes whose line contains all of these, in any case.

    Raises:
        ValueError: if no recipe does.
    """
    names = ("recipe", "kind", "model", "engine", "global batch", "published")
    table = Table(*(Column(name, no_wrap=True) for name in names), box=None, pad_edge=False)
    for name in config.recipe_names():
        recipe = config.load_unless_part(name, KINDS)
        if recipe is None:
            continue
        row = _row(name, recipe)
        if all(word.lower() in " ".join(row).lower() for word in words):
            table.add_row(*row)
    if not table.rows:
        raise ValueError(f"{' '.join(words)}: no recipe has these words; `sfd recipes` lists all recipes")
    return table


def compare(name: str, others: Sequence[str]) -> Table | None:
    """The settings in which two resolved recipes differ, by dotted keys; None if there are none.

    Args:
        others: the other recipe, by default the same one, and overrides of it.

    Raises:
        ValueError: for more than one other recipe.
    """
    names, overrides = config.split_words(others)
    if len(names) > 1:
        raise ValueError(f"{', '.join([name, *names])}: {len(names) + 1} recipes; allowed: two, and KEY=VALUE settings")
    other = names[0] if names else name
    changed = config.differences(config.to_dict(load_any(name)), config.to_dict(load_any(other, overrides)))
    if not changed:
        return None
    table = Table("key", name, " ".join([other, *overrides]), box=None, pad_edge=False)
    for key, values in changed.items():
        table.add_row(key, *map(str, values))
    return table


def _row(name: str, recipe: Any) -> list[str]:
    training = isinstance(recipe, TrainRecipe)
    facts = [_model(recipe), _engine(recipe), str(recipe.train.global_batch)] if training else ["", "", ""]
    published = recipe.published if isinstance(recipe, TrainRecipe | EvalRecipe) else None
    return [name, recipe.kind, *facts, published or ""]


def _model(recipe: TrainRecipe) -> str:
    """The kind of model, with its named size."""
    return recipe.task.summary()["model"].partition(",")[0]


def _engine(recipe: TrainRecipe) -> str:
    engine = recipe.engine
    detail = engine.zero_stage if isinstance(engine, DeepSpeedConfig) else engine.sharding
    return f"{engine.kind} {detail}"
