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
class LeadConfig:
    """Where a lead of semantics gains or loses, on trained cells of the first seed.

    cells: they train on the latents of one texture codec; a cell may have no semantic channels.
    latents: a folder of encoded pictures that no cell trains on.
    loss_pictures, sampled_pictures: so many of them for the losses, and for the oracle and its FID.
    """

    cells: tuple[str, ...]
    latents: Path
    loss_pictures: int = 200
    sampled_pictures: int = 500


@dataclass(frozen=True, kw_only=True)
class StudyRecipe:
    """Each step is written as on a command line: a recipe, then overrides.

    root, out: paths of the recipes below `root` are moved below `out`.
    prepare: encoding, fitting and training that the cells need.
    cell_settings: overrides of every cell, before its own.
    evaluation: the evaluation of every checkpoint of every cell.
    lead_losses: see LeadConfig.
    semantics: the cell whose latents are examined for what its semantics know (eval.study.semantics).
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
    lead_losses: LeadConfig | None = None
    semantics: str | None = None
    convergence: tuple[str, ...] = ()
    lead: tuple[str, ...] = ()
    ablation: tuple[str, ...] = ()
    generality: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if not self.cells or not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("cells, seeds: allowed: one or more of each, and no seed twice")
        pairs = {"generality": [name for pair in self.generality for name in pair]}
        named = {**pairs, **{key: getattr(self, key) for key in ("convergence", "lead", "ablation")}}
        named["lead_losses.cells"] = [] if self.lead_losses is None else self.lead_losses.cells
        named["semantics"] = [] if self.semantics is None else [self.semantics]
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
