"""`eval report`: one page about several results, with scores, samples beside real images, curves and provenance."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.metrics.scores import SCORES
from eval.pages import figures, html
from eval.pages.html import Picture, find_picture, path_labels, settings_as_text
from eval.pages.run_metrics import loss_names, read_metrics
from eval.pages.score_table import score_table
from eval.results import Results
from sfd_scale import config
from sfd_scale.runtime.files import write_atomically, write_json
from sfd_scale.runtime.run_paths import RunPaths

logger = logging.getLogger(__name__)
PROGRESS = ("lr", "grad_norm", "samples_per_s", "accuracy")  # metrics that are drawn beside the losses
HTML, MARKDOWN, JSON = "index.html", "report.md", "report.json"


def report(results: Sequence[Path], out: Path, *, runs: Sequence[Path] = (), title: str = "Evaluation") -> Path:
    """Write index.html, report.md and report.json, and the figures, to `out`.

    Raises:
        ValueError: for results or run folders that cannot be read.
    """
    results = list(dict.fromkeys(results))
    loaded = [Results.read(path) for path in results]
    if not loaded:
        raise ValueError("--result: none given; allowed: one results.json or more")
    labels = _labels(loaded, results)
    grids, curves = _grids(loaded, labels, results), _curves(runs)
    values = {
        "title": title,
        "date": html.now(),
        "columns": SCORES,
        "rows": score_table(loaded, [(label,) for label in labels]),
        "differences": differences(loaded, labels),
        "warnings": _warnings(loaded, labels),
        "grids": grids,
        "curves": curves,
        "details": [(label, settings_as_text(_shown(result))) for label, result in zip(labels, loaded, strict=True)],
        "files": _files(loaded, labels, results, runs, out),
    }
    for picture in [*grids, *curves]:
        write_atomically(out / picture.file, picture.data)
    for name, template, escaped in ((HTML, "report.html.j2", True), (MARKDOWN, "report.md.j2", False)):
        write_atomically(out / name, html.environment(autoescape=escaped).get_template(template).render(values))
    data = {
        "title": title,
        "differences": config.to_dict(values["differences"]),
        "results": {label: result.as_json() for label, result in zip(labels, loaded, strict=True)},
    }
    write_json(out / JSON, data)
    logger.info("%s", out / HTML)
    return out / HTML


# ------------------------------------------------------------------------------------------------- tables


def _labels(loaded: Sequence[Results], paths: Sequence[Path]) -> list[str]:
    """A name for each result: its model and step, and its path where names are the same."""
    names, places = [result.title for result in loaded], path_labels(paths)
    return [name if names.count(name) == 1 else f"{name} ({place})" for name, place in zip(names, places, strict=True)]


@dataclass(frozen=True)
class SettingDifference:
    """A setting in which results differ: its dotted key, and (label, value) of each result."""

    key: str
    values: list[tuple[str, str]]


def differences(loaded: Sequence[Results], labels: Sequence[str]) -> list[SettingDifference]:
    """The settings in which the results differ, apart from what they compare: checkpoints, or given images."""
    subject = ("samples.checkpoint.",) if any(found.generated for found in loaded) else ("samples.images",)
    flat = [
        settings_as_text({key: found.as_json()[key] for key in ("samples", "reference", "metrics", "versions")})
        for found in loaded
    ]
    found = []
    for key in dict.fromkeys(key for settings in flat for key in settings):
        values = [settings.get(key, "–") for settings in flat]
        if len(set(values)) > 1 and not key.startswith(subject):
            found.append(SettingDifference(key, list(zip(labels, values, strict=True))))
    return found


def _warnings(loaded: Sequence[Results], labels: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each warning once, with the labels of its results; without labels, if it is about all of them."""
    about: dict[str, list[str]] = {}
    for label, result in zip(labels, loaded, strict=True):
        for warning in result.warnings:
            about.setdefault(warning, []).append(label)
    return [(warning, [] if len(named) == len(loaded) else named) for warning, named in about.items()]


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
            file = find_picture(recorded, path)
            if file is None:
                continue
            data = file.read_bytes()
            if data not in seen:
                seen.add(data)
                found.append(Picture(title, data, file=f"figures/{name}"))
    return found


def _curves(runs: Sequence[Path]) -> list[Picture]:
    found = []
    for run, label in zip(runs, path_labels(runs), strict=True):
        rows = read_metrics(run)
        if not loss_names(rows):
            logger.warning("%s: no losses were logged yet", run)
            continue
        progress = [name for name in PROGRESS if any(name in row for row in rows)]
        drawn = {name: figures.panel({"": rows}, name) for name in [*loss_names(rows), *progress]}
        clock = figures.clock_curve(rows)
        for what, data in {**drawn, **({} if clock is None else {"loss by time": clock})}.items():
            file = f"figures/{label.replace('/', '-')}-{what.replace('/', '-').replace(' ', '-')}.png"
            found.append(Picture(f"{label}: {what}", data, file))
    return found


def _files(
    loaded: Sequence[Results], labels: Sequence[str], paths: Sequence[Path], runs: Sequence[Path], out: Path
) -> list[tuple[str, str]]:
    """What each file of the report is, and its path."""
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


if __name__ == "__main__":
    from eval.__main__ import main

    main("report")
