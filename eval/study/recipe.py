"""The recipe of a study: preparations, cells to train, sweeps, and the cells that figures and tables show."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A sweep over settings of the evaluation, on a trained cell of the first seed.

    grid: the settings, as on the command line of `python -m eval sweep`.
    guide_step: the guidance model (AutoGuidance) is the cell's own checkpoint of this earlier step.
    """

    cell: str
    grid: str
    guide_step: int | None = None


@dataclass(frozen=True, kw_only=True)
class StudyRecipe:
    """Each step is written as on a command line: a recipe, then overrides.

    root, out: paths of the recipes below `root` are moved below `out`.
    prepare: encoding, fitting and training that the cells need.
    cell_settings: overrides of every cell, before its own.
    evaluation: the evaluation of every checkpoint of every cell.
    convergence, lead, ablation, generality: cells in the figures and tables (arXiv 2512.04926: Fig. 1b, Fig. 5,
        Table 3, Table 5). `generality` has pairs of cells: without and with semantics first.
    """

    kind: Literal["study"] = "study"
    name: str
    root: Path
    out: Path
    prepare: dict[str, str]
    cells: dict[str, str]
    evaluation: str
    cell_settings: str = ""
    seeds: tuple[int, ...] = (0,)
    sweeps: dict[str, SweepConfig] = field(default_factory=dict)
    convergence: tuple[str, ...] = ()
    lead: tuple[str, ...] = ()
    ablation: tuple[str, ...] = ()
    generality: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if not self.cells or not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("cells, seeds: allowed: one or more of each, and no seed twice")
        pairs = {"generality": [name for pair in self.generality for name in pair]}
        named = {**pairs, **{key: getattr(self, key) for key in ("convergence", "lead", "ablation")}}
        named["sweeps"] = [settings.cell for settings in self.sweeps.values()]
        for key, names in named.items():
            for name in names:
                if name not in self.cells:
                    raise ValueError(f"{key}: {name}; allowed: names of cells, {', '.join(self.cells)}")
        steps = {"prepare": self.prepare, "cells": self.cells, "evaluation": {"": self.evaluation}}
        for key, words in steps.items():
            for name, text in words.items():
                if not text.split():
                    raise ValueError(f"{key}.{name}: {text!r}; allowed: a recipe, then settings of it")
