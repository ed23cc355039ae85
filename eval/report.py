"""Several results in one page: scores, samples beside real images, loss curves, provenance, and where every file is."""

from __future__ import annotations

import base64
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from eval.metrics.scores import SCORES
from eval.pages import figures
from eval.results import Results
from sfd_scale import config
from sfd_scale.runtime.files import write_atomically, write_json
from sfd_scale.runtime.run_paths import RunPaths

logger = logging.getLogger(__name__)
TEMPLATES = Path(__file__).parent / "pages" / "templates"
HTML, MARKDOWN, JSON = "index.html", "report.md", "report.json"
_COMPARED = ("samples.checkpoint.",)


@dataclass(frozen=True)
class Picture:
    """A PNG beside the report, and inside it."""

    title: str
    file: str
    data: bytes
    wide: bool = False

    @property
    def inline(self) -> str:
        return f"data:image/png;base64,{base64.b64encode(self.data).decode()}"


def report(results: Sequence[Path], out: Path, *, runs: Sequence[Path] = (), title: str = "Evaluation") -> Path:
    """Write index.html, report.md and report.json, and the figures, to `out`.

    Raises:
        ValueError: for results or run folders that cannot be read.
    """
    results = list(dict.fromkeys(results))
    loaded = [Results.read(path) for path in results]
    if not loaded:
        raise ValueError("--result: none given; allowed: one results.json and more")
    labels = _labels(loaded, results)
    grids, curves = _grids(loaded, labels, results), _curves(runs)
    values = {
        "title": title,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "columns": SCORES,
        "rows": _rows(loaded, labels),
        "differences": differences(loaded, labels),
        "warnings": _warnings(loaded, labels),
        "grids": grids,
        "curves": curves,
        "details": [(label, flatten(_shown(result))) for label, result in zip(labels, loaded, strict=True)],
        "files": _files(loaded, labels, results, runs, out),
    }
    environment = templates()
    for picture in [*grids, *curves]:
        write_atomically(out / picture.file, picture.data)
    write_atomically(out / HTML, environment.get_template("report.html.j2").render(values))
    plain = environment.overlay(autoescape=False)
    write_atomically(out / MARKDOWN, plain.get_template("report.md.j2").render(values))
    data = {
        "title": title,
        "differences": values["differences"],
        "results": {label: result.as_json() for label, result in zip(labels, loaded, strict=True)},
    }
    write_json(out / JSON, data)
    logger.info("%s", out / HTML)
    return out / HTML


def templates() -> Environment:
    """The pages, which share one style (page.html.j2)."""
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


# ------------------------------------------------------------------------------------------------- tables


def _labels(loaded: Sequence[Results], paths: Sequence[Path]) -> list[str]:
    """A name for each result: its run and step, and its place where these are not enough."""
    names, places = [result.title for result in loaded], path_labels(paths)
    return [name if names.count(name) == 1 else f"{name} ({place})" for name, place in zip(names, places, strict=True)]


def path_labels(paths: Sequence[Path]) -> list[str]:
    """The paths' names, with as much of the path as tells them apart."""
    resolved = [path.resolve() for path in paths]
    for depth in range(1, max((len(path.parts) for path in resolved), default=0) + 1):
        labels = ["/".join(path.parts[-depth:]) for path in resolved]
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in resolved]


def _rows(loaded: Sequence[Results], labels: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"label": label, "cells": cells, "count": f"{result.count:,}", "how": result.sampling}
        for label, cells, result in zip(labels, score_cells(loaded), loaded, strict=True)
    ]


def score_cells(loaded: Sequence[Results]) -> list[list[dict[str, Any]]]:
    """For each result the texts of its scores, by SCORES, and which is the best of its column."""
    best = {score.key: score.best(result.scores.of(score) for result in loaded) for score in SCORES}
    rows = []
    for scores in (result.scores for result in loaded):
        values = {score: scores.of(score) for score in SCORES}
        several = len(loaded) > 1
        rows.append(
            [
                {"text": scores.text(score), "best": several and value is not None and value == best[score.key]}
                for score, value in values.items()
            ]
        )
    return rows


def differences(loaded: Sequence[Results], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Settings, other than the checkpoint itself, in which the results differ: what a comparison has to say."""
    flat = [flatten({key: r.as_json()[key] for key in ("samples", "reference", "metrics", "versions")}) for r in loaded]
    # What the results are of may differ: that is what they compare.
    compared = _COMPARED if any(r.generated for r in loaded) else (*_COMPARED, "samples.images")
    keys = dict.fromkeys(key for settings in flat for key in settings)
    found = []
    for key in keys:
        values = [settings.get(key, "–") for settings in flat]
        if len(set(values)) > 1 and not key.startswith(compared):
            found.append({"key": key, "values": list(zip(labels, values, strict=True))})
    return found


def _warnings(loaded: Sequence[Results], labels: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each warning once, with the results it is about; all of them need no naming."""
    about: dict[str, list[str]] = {}
    for label, result in zip(labels, loaded, strict=True):
        for warning in result.warnings:
            about.setdefault(warning, []).append(label)
    return [(warning, [] if len(named) == len(loaded) else named) for warning, named in about.items()]


def flatten(tree: Any) -> dict[str, str]:
    """Nested settings as dotted keys and texts."""
    return {key: str(value) for key, value in config.flatten(tree).items()}


def _shown(result: Results) -> dict[str, Any]:
    return {key: value for key, value in result.as_json().items() if key not in ("warnings", "format")}


# ------------------------------------------------------------------------------------------------- pictures


def _grids(loaded: Sequence[Results], labels: Sequence[str], paths: Sequence[Path]) -> list[Picture]:
    found, seen = [], set()
    for index, (label, result, path) in enumerate(zip(labels, loaded, paths, strict=True)):
        for title, recorded, name in (
            ("Real images", result.run.reference_grid, f"real-{index}.png"),
            (f"Samples: {label}", result.run.grid, f"samples-{index}.png"),
        ):
            file = find(recorded, path)
            if file is None:
                continue
            data = file.read_bytes()
            if data not in seen:
                seen.add(data)
                found.append(Picture(title, f"figures/{name}", data))
    return found


def find(recorded: str | None, results: Path) -> Path | None:
    """A file beside the results, with which it may have been moved, or by its recorded path."""
    if recorded is None:
        return None
    folder = results if results.is_dir() else results.parent
    return next((file for file in (folder / Path(recorded).name, Path(recorded)) if file.is_file()), None)


def _curves(runs: Sequence[Path]) -> list[Picture]:
    found = []
    for run, label in zip(runs, path_labels(runs), strict=True):
        rows = figures.read_metrics(run)
        if not figures.loss_names(rows):
            logger.warning("%s: no losses were logged yet", run)
            continue
        for what, draw, wide in (
            ("losses", figures.loss_curves, True),
            ("progress", figures.progress_curves, True),
            ("loss by time", figures.clock_curve, False),
        ):
            data = draw(rows)
            if data is not None:
                file = f"figures/{label.replace('/', '-')}-{what.replace(' ', '-')}.png"
                found.append(Picture(f"{label}: {what}", file, data, wide))
    return found


def _files(
    loaded: Sequence[Results], labels: Sequence[str], paths: Sequence[Path], runs: Sequence[Path], out: Path
) -> list[tuple[str, str]]:
    """(what it is, path) of everything that the report is made of."""
    found = [("this page", str(out / HTML)), ("the same as Markdown", str(out / MARKDOWN))]
    found.append(("all numbers", str(out / JSON)))
    for label, result, path in zip(labels, loaded, paths, strict=True):
        found.append((f"{label}: results", str(path)))
        found.append((f"{label}: samples", result.run.samples))
        if result.run.checkpoint is not None and result.generated:
            found.append((f"{label}: checkpoint", result.run.checkpoint))
    for run, label in zip(map(RunPaths, runs), path_labels(runs), strict=True):
        parts = {"recipe": run.recipe_file, "metrics": run.metrics_file, "checkpoints": run.checkpoints_folder}
        found += [(f"{label}: {what}", str(path)) for what, path in parts.items() if path.exists()]
    return found
