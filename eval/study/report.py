"""Figures and tables of a study, from its rows of scores."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.metrics.scores import SCORES, Score
from eval.pages import figures
from eval.results import ScoreRow
from eval.study.recipe import StudyRecipe
from eval.study.semantics import Knowledge
from sfd_scale.runtime.files import write_atomically

FID = SCORES[0]


@dataclass(frozen=True)
class Row:
    """The scores of one checkpoint of a cell."""

    cell: str
    seed: int
    delta_t: float
    scored: ScoreRow

    @property
    def step(self) -> int:
        return self.scored.step

    def as_json(self) -> dict[str, Any]:
        """The plain data of a line of the study's results.jsonl. Its name is that of the cell."""
        facts = {"cell": self.cell, "seed": self.seed, "delta_t": self.delta_t}
        return {**facts, **self.scored.as_json(), "name": self.cell}


@dataclass(frozen=True)
class Spread:
    """Number, mean and standard deviation (None for one seed) of the scores of the seeds."""

    count: int
    mean: float
    deviation: float | None

    def __str__(self) -> str:
        if self.deviation is None:
            return f"{self.mean:.4g} (1 seed)"
        return f"{self.mean:.4g} ± {self.deviation:.2g} ({self.count} seeds)"


def spread(values: Sequence[float]) -> Spread:
    """Number, mean and standard deviation of at least one value."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(len(values), statistics.fmean(values), deviation)


def scores(rows: Sequence[Row], cell: str, step: int | None = None, score: Score = FID) -> dict[int, float]:
    """A score of a cell by seed, without seeds that lack it (IS without logits, precision without images).

    Args:
        step: by default the last one that any cell has.
    """
    at = max((row.step for row in rows), default=0) if step is None else step
    found = {row.seed: row.scored.scores.of(score) for row in rows if row.cell == cell and row.step == at}
    return {seed: value for seed, value in found.items() if value is not None}


def convergence(rows: Sequence[Row], cells: Sequence[str]) -> dict[str, list[tuple[float, list[float]]]]:
    """For each cell, points (step, one FID per seed)."""
    steps = sorted({row.step for row in rows})
    curves = {c: [(float(s), list(scores(rows, c, s).values())) for s in steps] for c in cells}
    return {
        cell: [point for point in points if point[1]] for cell, points in curves.items() if any(p[1] for p in points)
    }


def lead_curve(rows: Sequence[Row], cells: Sequence[str]) -> list[tuple[float, list[float]]]:
    """Points (delta_t, one FID per seed) of the last step."""
    leads = {row.cell: row.delta_t for row in rows}
    found = [(leads[cell], list(scores(rows, cell).values())) for cell in cells if cell in leads]
    return sorted(point for point in found if point[1])


def difference(rows: Sequence[Row], a: str, b: str) -> Spread | None:
    """FID of `b` minus FID of `a`, on the seeds that both have. They share the order of data and the noise."""
    first, second = scores(rows, a), scores(rows, b)
    shared = sorted(first.keys() & second.keys())
    return spread([second[seed] - first[seed] for seed in shared]) if shared else None


def _shown(values: dict[int, float]) -> str:
    return str(spread(list(values.values()))) if values else "missing"


def _table(rows: Sequence[Row], cells: Sequence[str]) -> list[str]:
    """One row per cell: FID, its change from the row above, and every other score that there is."""
    others = [
        score for score in SCORES if score != FID and any(row.scored.scores.of(score) is not None for row in rows)
    ]
    heads = ["cell", FID.title, "minus the row above, same seeds", *(score.title for score in others)]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for above, cell in zip((None, *cells), cells, strict=False):
        change = None if above is None else difference(rows, above, cell)
        fid, *columns = [_shown(scores(rows, cell, score=score)) for score in (FID, *others)]
        lines.append(f"| {' | '.join([cell, fid, '–' if change is None else str(change), *columns])} |")
    return lines


def _pairs(rows: Sequence[Row], pairs: Sequence[tuple[str, str]]) -> list[str]:
    lines = ["| without | with a lead | FID without | FID with | difference |", "|---|---|---|---|---|"]
    for a, b in pairs:
        change = difference(rows, a, b)
        columns = [_shown(scores(rows, name)) for name in (a, b)]
        lines.append(f"| {a} | {b} | {' | '.join(columns)} | {'missing' if change is None else change} |")
    return lines


def _every_cell(rows: Sequence[Row]) -> list[str]:
    """One row per cell, with the FID of every step that was scored."""
    steps, cells = sorted({row.step for row in rows}), dict.fromkeys(row.cell for row in rows)
    lines = [f"| cell | {' | '.join(f'step {step:,}' for step in steps)} |", f"|{'---|' * (len(steps) + 1)}"]
    for cell in cells:
        lines.append(f"| {cell} | {' | '.join(_shown(scores(rows, cell, step)) for step in steps)} |")
    return lines


def _knowledge(known: Knowledge) -> list[str]:
    lines = ["## What the semantics know", "", "| of pictures that are held out | |", "|---|---|"]
    if known.features_accuracy is not None:
        lines.append(
            f"| accuracy of a linear probe of the class, from pooled features | {known.features_accuracy:.3f} |"
        )
    lines += [
        f"| the same, from pooled semantic latents | {known.class_accuracy:.3f} |",
        f"| variance of texture that the class explains | {known.by_label:.1%} |",
        f"| variance that remains and semantics explain | {known.by_semantics:.1%} |",
    ]
    return [*lines, ""]


def _lead_losses(examined: Mapping[str, Any], out: Path) -> list[str]:
    """A figure and tables of `lead.examine`, by cell."""
    curves = {cell: [(time, [value]) for time, value in found["losses"]["own"]] for cell, found in examined.items()}
    write_atomically(out / "lead_losses.png", figures.spread_curves(curves, "loss of texture", "texture's clock"))
    kinds = ("own", "oracle", "pictures")
    lines = ["## Losses of the parts by their clocks, and an oracle", "", "![loss of texture](lead_losses.png)", ""]
    lines += [f"| cell | loss of texture, semantics of | {' | '.join(f'{time:g}' for time in lead_times(examined))} |"]
    lines += [f"|{'---|' * (2 + len(lead_times(examined)))}"]
    for cell, found in examined.items():
        for name, points in found["losses"].items():
            lines.append(f"| {cell} | {name} | {' | '.join(f'{value:.3f}' for _, value in points)} |")
    lines += ["", f"| cell, loss of semantics | {' | '.join(f'{time:g}' for time in lead_times(examined))} |"]
    lines += [f"|{'---|' * (1 + len(lead_times(examined)))}"]
    for cell, found in examined.items():
        if points := found.get("semantic_losses"):
            lines.append(f"| {cell} | {' | '.join(f'{value:.3f}' for _, value in points)} |")
    lines += ["", f"| cell | FID, {' | FID, '.join(kinds)} |", f"|{'---|' * (1 + len(kinds))}"]
    for cell, found in examined.items():
        shown = (f"{found['fid'][kind]:.4g}" if kind in found["fid"] else "–" for kind in kinds)
        lines.append(f"| {cell} | {' | '.join(shown)} |")
    return [*lines, ""]


def lead_times(examined: Mapping[str, Any]) -> list[float]:
    """The texture times of the losses."""
    return [time for time, _ in next(iter(examined.values()))["losses"]["own"]]


def write(
    recipe: StudyRecipe, rows: Sequence[Row], missing: Sequence[str], known: Knowledge | None = None,
    examined: Mapping[str, Any] | None = None, samples: Mapping[str, Path] | None = None,
) -> Path:  # fmt: skip
    """Write report.md and its figures. Tables have the scores of the last step that any cell has reached.

    Args:
        known: what the semantics know.
        examined: the results of `lead.examine`, by cell.
        samples: an image of samples, by cell.
    """
    out, text = recipe.out / "report", [f"# Study {recipe.name}", ""]
    if missing:
        text += [f"Not done: {', '.join(missing)}.", ""]
    if known is not None:
        text += _knowledge(known)
    if curves := convergence(rows, recipe.convergence):
        png = figures.spread_curves(curves, "FID over training", "step")
        write_atomically(out / "convergence.png", png)
        text += ["## Convergence", "", "![FID over training steps](convergence.png)", ""]
    if samples:
        write_atomically(out / "samples.png", figures.side_by_side(samples))
        text += ["## Samples", "", "One row per class, not selected.", "", "![samples](samples.png)", ""]
    if points := lead_curve(rows, recipe.lead):
        png = figures.spread_curves({"": points}, "FID by the lead of semantics", "delta_t")
        write_atomically(out / "lead.png", png)
        text += ["## The lead of semantics", "", "![FID by delta_t](lead.png)", ""]
        text += ["| delta_t | FID |", "|---|---|", *(f"| {lead:g} | {spread(values)} |" for lead, values in points), ""]
    if recipe.ablation:
        text += ["## Ablation", "", *_table(rows, recipe.ablation), ""]
    if recipe.generality:
        text += ["## Other methods", "", *_pairs(rows, recipe.generality), ""]
    if rows:
        text += ["## FID of every cell", "", *_every_cell(rows), ""]
    if examined:
        text += _lead_losses(examined, out)
    for name in recipe.sweeps:
        if (file := recipe.out / "sweeps" / name / "sweep.md").is_file():
            text += [f"## Sweep: {name}", "", file.read_text(encoding="utf-8").strip(), ""]
    write_atomically(out / "report.md", "\n".join(text))
    return out / "report.md"
