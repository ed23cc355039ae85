"""Recipes of every kind, this harness's and the trainer's: loaded by their `kind`, and listed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.table import Column, Table

from eval import recipe as harness
from eval.study.recipe import StudyRecipe
from sfd_scale import config
from sfd_scale.models.lightningdit import LightningDiTConfig
from sfd_scale.recipe import TrainRecipe

KINDS: dict[str, type] = {**harness.KINDS, "study": StudyRecipe}


def load_any(name: str, overrides: Sequence[str] = ()) -> Any:
    """A recipe of any kind, by its `kind` key; see `config.load_by_kind`."""
    return config.load_by_kind(name, KINDS, overrides)


def summary_table() -> Table:
    """The complete recipes with model, engine, global batch, and the number they are to reach."""
    names = ("recipe", "kind", "model", "engine", "global batch", "published")
    table = Table(*(Column(name, no_wrap=True) for name in names), box=None, pad_edge=False)
    for name in config.recipe_names():
        if config.kind_of(name) is None:
            continue
        loaded = load_any(name)
        row = ["", "", ""]
        if isinstance(loaded, TrainRecipe):
            row = [_model(loaded), _engine(loaded), str(loaded.train.global_batch)]
        table.add_row(name, loaded.kind, *row, getattr(loaded, "published", None) or "")
    return table


def _model(recipe: TrainRecipe) -> str:
    model = recipe.model
    if isinstance(model, LightningDiTConfig) and model.size is not None:
        return f"{model.kind} {model.size}/{model.patch_size}"
    return model.kind


def _engine(recipe: TrainRecipe) -> str:
    engine = recipe.engine
    fields = {f.name for f in dataclasses.fields(engine)}
    detail = next((str(getattr(engine, name)) for name in ("zero_stage", "sharding") if name in fields), "")
    return f"{engine.kind} {detail}"
