"""`eval sweep`: every combination of settings, with the same noise and labels. Models are loaded once."""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from eval import generate
from eval.features.extractor import LazyExtractor
from eval.features.make import make_extractor
from eval.generate import LoadModel, PreparedGeneration, load_model
from eval.metrics.reference import Reference
from eval.metrics.scores import SCORES, Scores
from eval.recipe import EvalRecipe, LabelFile
from eval.reference import Judge, load_judges, load_reference
from eval.results import PAIRING, Results
from eval.score import score
from sfd_scale import config
from sfd_scale.runtime import distributed
from sfd_scale.runtime.files import file_sha256, write_atomically, write_json
from sfd_scale.runtime.output import plain_console
from sfd_scale.runtime.run_paths import RESULTS

logger = logging.getLogger(__name__)
_COMMON = (
    "extractor",
    "extractors",
    "extractor_weights",
    "extractor_batch",
    "reference",
    "references",
    "validation",
    "metrics",
    "cache",
)  # the same in all cells
MODELS = 2  # in memory: a checkpoint and a guidance model


@dataclass(frozen=True)
class Cell:
    """One combination of settings: those that vary, and the whole recipe."""

    settings: dict[str, str]
    recipe: EvalRecipe

    @property
    def name(self) -> str:
        """A folder name that people can read, made unique by a hash."""
        words = "_".join(f"{key.split('.')[-1]}-{value}" for key, value in self.settings.items())
        clean = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in words)[:80]
        return f"{clean}_{config.digest(self.settings)[:8]}"


@dataclass(frozen=True)
class Row:
    """What came of one cell: its settings and scores, the mean NFE, and its folder."""

    settings: dict[str, str]
    scores: Scores
    nfe: float | None
    folder: str


def cells(recipe: str, grid: Sequence[str]) -> list[Cell]:
    """All combinations of `key=value1,value2` and `key=value`, each checked as a recipe.

    Raises:
        ValueError: if nothing varies, or a combination is not a valid recipe.
    """
    axes: list[tuple[str, list[str]]] = []
    for word in grid:
        key, _, values = word.partition("=")
        if not key or not values:
            raise ValueError(f"{word}: allowed: key=value, or key=value1,value2 for a setting that varies")
        axes.append((key, split_values(values)))
    if all(len(values) == 1 for _, values in axes):
        raise ValueError(
            "nothing varies; allowed: several values for at least one setting, such as guidance.scale_texture=1,1.5"
        )
    found = []
    for combination in itertools.product(*(values for _, values in axes)):
        chosen = dict(zip((key for key, _ in axes), combination, strict=True))
        loaded = config.load(recipe, EvalRecipe, [f"{key}={value}" for key, value in chosen.items()])
        varying = {key: chosen[key] for key, values in axes if len(values) > 1}
        found.append(Cell(varying, loaded))
    return found


def split_values(text: str) -> list[str]:
    """Split at commas outside brackets and quotes. The name of an existing file or folder is one value."""
    if os.path.exists(text):
        return [text]
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if letter in ("'", '"') and quote in ("", letter) and (quote or not parts[-1]):
            quote = "" if quote else letter
        depth += 0 if quote else (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


@dataclass(frozen=True)
class Shared:
    """What the cells of a search share: the features and the reference of their scores, and the models in memory."""

    device: torch.device
    extractor: LazyExtractor
    reference: Reference
    judges: Mapping[str, Judge]
    load: LoadModel

    @classmethod
    def of(cls, recipe: EvalRecipe, extractor: LazyExtractor | None = None) -> Shared:
        """Of the cells of a recipe. Computes the reference. All ranks have to call this."""
        device = distributed.device()
        extractor = make_extractor(recipe.extractor, device) if extractor is None else extractor
        reference, judges = load_reference(recipe, extractor), load_judges(recipe, device)
        return cls(device, extractor, reference, judges, functools.lru_cache(MODELS)(load_model))

    def prepare(self, recipe: EvalRecipe) -> PreparedGeneration:
        """The models of a recipe, which stay in memory for the next cell."""
        further = {name: judge.extractor for name, judge in self.judges.items()}
        return generate.prepare(recipe, self.device, self.extractor, self.load, further)


def scored(todo: Sequence[Cell], out: Path, shared: Shared) -> Iterator[Row]:
    """Generate and score each cell, in its own folder below `out`. A second start continues."""
    folders = [out / "cells" / cell.name for cell in todo]
    for number, (cell, folder) in enumerate(zip(todo, folders, strict=True), start=1):
        if distributed.is_main():
            logger.info("cell %d of %d: %s", number, len(todo), _words(cell.settings))
        results = distributed.broadcast_object(_done(cell.recipe, folder, shared.extractor, shared.reference))
        if results is None:
            # `batch: auto` finds the batch of the first cell; all others take it.
            own = generate.with_recorded_batch(cell.recipe, folder, *folders)
            generate.generate(own, folder, shared.prepare(own))
            results = score(cell.recipe, folder, folder / RESULTS, shared.extractor, shared.reference, shared.judges)
        yield Row(cell.settings, results.scores, results.nfe, str(folder))


def sweep(recipe: str, grid: Sequence[str], out: Path, extractor: LazyExtractor | None = None) -> list[Row]:
    """Generate and score every cell; sweep.json and sweep.md are written after each. A second start continues.

    Raises:
        ValueError: if the extractor, the reference or the metrics vary, so that scores cannot be compared.
    """
    todo = cells(recipe, grid)
    for name in varying(todo, _COMMON):
        raise ValueError(f"{name}: varies; the scores of a sweep have to share it; allowed: one sweep per value")
    note = ""
    if unpaired := varying(todo, PAIRING):
        note = f"The cells do not share noise and labels, because these settings vary: {', '.join(unpaired)}."
    rows: list[Row] = []
    for row in scored(todo, out, Shared.of(todo[0].recipe, extractor)):
        rows.append(row)
        if distributed.is_main():
            _write(rows, len(todo), note, out)
    if distributed.is_main():
        _show(rows, note)
    return rows


def _done(recipe: EvalRecipe, folder: Path, extractor: LazyExtractor, reference: Reference) -> Results | None:
    """The results of a cell that an earlier start finished; None if recipe, weights, extractor or data have changed."""
    if not (folder / RESULTS).is_file():
        return None
    results = Results.read(folder)
    samples = results.samples
    files = [
        (path, samples[name]) for name, path in (("checkpoint", recipe.checkpoint), ("guide", recipe.guide)) if path
    ]
    same = (
        results.recipe_digest == config.digest(recipe)
        and all(path.is_file() and file_sha256(path) == used["sha256"] for path, used in files)
        and samples["extractor"] == extractor.fingerprint
        and results.reference["data"] == reference.provenance["data"]
        and (
            not isinstance(recipe.labels, LabelFile)
            or file_sha256(recipe.labels.path) == samples["labels"].get("sha256")
        )
    )
    return results if same else None


def varying(todo: Sequence[Cell], names: Sequence[str]) -> list[str]:
    """The settings that differ between cells."""
    return [name for name in names if len({config.digest(getattr(cell.recipe, name)) for cell in todo}) > 1]


def _write(rows: list[Row], total: int, note: str, out: Path) -> None:
    write_json(out / "sweep.json", {"cells": total, "note": note, "done": config.to_dict(rows)})
    table = markdown(_heads(rows), [_cells(row) for row in rows])
    write_atomically(out / "sweep.md", f"{table}\n{note}\n" if note else table)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def _show(rows: list[Row], note: str) -> None:
    table = Table(*_heads(rows), caption=note or None)
    fid = SCORES[0]
    best = fid.best(row.scores.of(fid) for row in rows)
    for row in rows:
        table.add_row(*_cells(row), style="bold" if row.scores.of(fid) == best else None)
    plain_console().print(table)


def _heads(rows: list[Row]) -> list[str]:
    return [*rows[0].settings, "NFE", *(score.title for score in SCORES)]


def _cells(row: Row) -> list[str]:
    nfe = "–" if row.nfe is None else f"{row.nfe:.1f}"
    return [*row.settings.values(), nfe, *(row.scores.text(score, ".4g") for score in SCORES)]


def _words(settings: dict[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items())


if __name__ == "__main__":
    from eval.__main__ import main

    main("sweep")
