"""`sfd report`: one page about training runs, with curves, scores and samples over steps, and recipes."""

from __future__ import annotations

import itertools
import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.metrics.scores import SCORES
from eval.pages import figures, html
from eval.pages.html import Picture, find_picture, path_labels, settings_as_text
from eval.pages.run_metrics import Row, loss_names, read_metrics
from eval.pages.score_table import ScoreTableRow, score_table
from eval.results import Results, results_of_run
from sfd_scale import config
from sfd_scale.recipe import TrainRecipe
from sfd_scale.runtime.files import read_json, write_atomically
from sfd_scale.runtime.run_paths import RunPaths

logger = logging.getLogger(__name__)
# Panels of the second figure. Metrics that were not logged are left out.
HEALTH = (
    "lr", "grad_norm", "samples_per_s", "mfu", "data_wait_share", "data_wait_share_max", "step_s/p50", "step_s/p99",
    "memory_allocated_bytes", "memory_host_bytes", "ema_distance", "skipped_steps", "accuracy",
)  # fmt: skip
MOST_GRIDS = 12


@dataclass(frozen=True)
class Run:
    """The contents of a run folder: metrics, evaluations by step, and the recipe as plain data."""

    path: Path
    label: str
    rows: list[Row]
    results: list[tuple[Path, Results]]
    recipe: Mapping[str, Any]

    @property
    def scores(self) -> list[Row]:
        """The scores of each step, for curves."""
        return [{"step": result.step, **result.scores.by_key()} for _, result in self.results]


def write(folders: Sequence[Path], out: Path | None = None, title: str | None = None) -> Path:
    """Write one self-contained HTML page about the runs, by default `report.html` in the first folder.

    Raises:
        ValueError: for a folder that is not a run folder, or that has no metrics yet.
    """
    runs = [read_run(path, label) for path, label in zip(folders, path_labels(folders), strict=True)]
    out = folders[0] / "report.html" if out is None else out
    colours = itertools.cycle(figures.COLOURS)
    values = {
        "title": title or ", ".join(run.label for run in runs),
        "date": html.now(),
        "columns": SCORES,
        "runs": [_summary(run, colour) for run, colour in zip(runs, colours, strict=False)],
        "sections": _sections(runs),
        "scores": _scores(runs),
        "grids": [(run.label, pictures) for run in runs if (pictures := _grids(run))],
        "between": _settings_that_differ(runs),
    }
    write_atomically(out, html.environment().get_template("run.html.j2").render(values))
    logger.info("%s", out)
    return out


def read_run(path: Path, label: str) -> Run:
    """The contents of a run folder. Raises ValueError: see `write`."""
    rows = read_metrics(path)
    if not rows:
        raise ValueError(f"{path}: nothing was logged yet")
    file = RunPaths(path).recipe_file
    return Run(path, label, rows, results_of_run(path, _digest(file)), config.tree(file))


def _digest(recipe: Path) -> str:
    """The digest that exported files of the run record; empty for a recipe that this release does not read."""
    try:
        return config.digest(config.load(recipe, TrainRecipe))
    except ValueError as error:
        logger.warning("%s: %s; results beside the run are not looked for", recipe, error)
        return ""


# ------------------------------------------------------------------------------------------------- pictures


def _sections(runs: Sequence[Run]) -> list[tuple[str, list[Picture]]]:
    rows = {run.label: run.rows for run in runs}
    every = [row for run in runs for row in run.rows]
    health = [name for name in HEALTH if any(isinstance(row.get(name), int | float) for row in every)]
    sections = [
        ("Losses", [Picture(name, figures.panel(rows, name)) for name in loss_names(every)]),
        ("Throughput and health", [Picture(name, figures.panel(rows, name)) for name in health]),
    ]
    clock = figures.clock_curves(rows)
    if clock is not None:
        sections.append(("Loss by clock", [Picture("early and late in training", clock)]))
    scored = {run.label: run.scores for run in runs}  # all runs, so that each has one colour in all figures
    if any(scored.values()):
        every = [row for rows in scored.values() for row in rows]
        drawn = [score for score in SCORES if score.in_curves and any(row[score.key] is not None for row in every)]
        curves = [Picture(score.title, figures.score_curve(scored, score.key, score.title)) for score in drawn]
        sections.append(("Scores over steps", curves))
    return sections


def _grids(run: Run) -> list[Picture]:
    """At most MOST_GRIDS sample grids, evenly spread over the steps; then real images."""
    found: list[Picture] = []
    real: Picture | None = None
    for file, result in run.results:
        grid, reference = (find_picture(name, file) for name in (result.run.grid, result.run.reference_grid))
        if grid is not None:
            found.append(Picture(f"step {result.step:,}", grid.read_bytes()))
        if real is None and reference is not None:
            real = Picture("real images", reference.read_bytes())
    if len(found) > MOST_GRIDS:
        found = [found[round(i * (len(found) - 1) / (MOST_GRIDS - 1))] for i in range(MOST_GRIDS)]
    return [*found, *([real] if real and found else [])]


# ------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class SettingChange:
    """A setting that a run's recipe or command line changes: its value before, its value, and what sets it."""

    key: str
    inherited: str
    value: str
    by: str


@dataclass(frozen=True)
class RecipeOrigin:
    """The recipe that a run was started with, the recipes that it extends, and the settings that are changed."""

    source: str
    parents: list[str]
    changes: list[SettingChange]


@dataclass(frozen=True)
class RunSummary:
    """What the page shows of a run beside its figures. `cells` is its row of the first table."""

    label: str
    colour: str
    cells: list[str]
    details: list[tuple[str, dict[str, str]]]
    origin: RecipeOrigin | None


def _summary(run: Run, colour: str) -> RunSummary:
    last = run.rows[-max(1, len(run.rows) // 10) :]
    fids = [(fid, result.step) for _, result in run.results if (fid := result.scores.fid) is not None]
    cells = [
        f"{run.rows[-1]['step']:,} of {run.recipe['train']['steps']:,}",
        _median(last, "loss", "{:.4f}"),
        _median(last, "samples_per_s", "{:,.1f}"),
        _median(last, "mfu", "{:.1%}"),
        _median(last, "data_wait_share", "{:.1%}"),
        f"{run.rows[-1].get('skipped_steps') or 0:,}",
        "{:.2f} at {:,}".format(*min(fids)) if fids else "–",
    ]
    details = [("every setting", settings_as_text(dict(run.recipe)))]
    machine = RunPaths(run.path).environment_file
    if machine.is_file():
        details.append(("environment", settings_as_text(read_json(machine))))
    return RunSummary(run.label, colour, cells, details, _origin(run))


def _median(rows: Sequence[Row], name: str, form: str) -> str:
    values = [row[name] for row in rows if isinstance(row.get(name), int | float)]
    return form.format(statistics.median(values)) if values else "–"


def _origin(run: Run) -> RecipeOrigin | None:
    """None if the run does not record its recipe, or the recipe does not exist any more."""
    source = config.source_of(RunPaths(run.path).recipe_file)
    if source is None:
        return None
    try:
        lineage = config.lineage(source, TrainRecipe)
    except config.ConfigError as error:
        logger.warning("%s: %s", run.path, error)
        return None
    changes = []
    for key, value in settings_as_text(dict(run.recipe)).items():
        inherited, resolved = str(lineage.inherited.get(key, "–")), str(lineage.resolved.get(key, "–"))
        if value != resolved:
            changes.append(SettingChange(key, resolved, value, "the command line"))
        elif key in lineage.own and str(lineage.own[key]) != inherited:
            changes.append(SettingChange(key, inherited, value, source))
    return RecipeOrigin(source, lineage.parents, [found for found in changes if found.key not in ("name", "kind")])


def _settings_that_differ(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Each setting that differs between the runs, with its value in each."""
    flat = [settings_as_text(dict(run.recipe)) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    rows = [(key, [settings.get(key, "–") for settings in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1 and key not in ("run", "name")]


def _scores(runs: Sequence[Run]) -> list[ScoreTableRow]:
    results = [(run.label, result) for run in runs for _, result in run.results]
    return score_table([result for _, result in results], [(label, f"{result.step:,}") for label, result in results])


if __name__ == "__main__":
    from sfd_scale.__main__ import main

    main("report")
