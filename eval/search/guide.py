"""`eval guide`: search the scales and intervals of guidance, cheap first, and confirm the best with fresh noise."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from eval.comparison.compare import Difference, difference
from eval.features.extractor import LazyExtractor
from eval.metrics.scores import Score
from eval.recipe import EvalRecipe
from eval.search.paired import ROUNDS, influence_of, luck_of_the_best, score_named
from eval.search.sweep import Cell, Row, Shared, markdown, scored
from sfd_scale import config
from sfd_scale.diffusion.guidance import GuidanceConfig, InternalGuidance, IntervalMode, NoGuidance
from sfd_scale.runtime import distributed
from sfd_scale.runtime.files import write_atomically, write_json
from sfd_scale.runtime.output import plain_console

MODES: tuple[IntervalMode, ...] = ("both", "texture", "semantic")


@dataclass(frozen=True, kw_only=True)
class Confirmed:
    """A finalist: its score with few samples and with all, and the difference from no guidance with its interval.

    difference, low, high: None for scores without intervals, and for no guidance itself.
    """

    guidance: dict[str, Any]
    cheap: float | None
    full: float
    difference: float | None
    low: float | None
    high: float | None


def scale_cells(recipe: EvalRecipe, scales: Sequence[float]) -> list[Cell]:
    """Every pair of scales for texture and semantics, without an interval; 1 and 1 is no guidance and is left out."""
    guidance = recipe.guidance
    assert not isinstance(guidance, NoGuidance)
    plain: dict[str, Any] = {"interval_start": 0.0, "interval_mode": "none"}
    if isinstance(guidance, InternalGuidance):
        plain["interval_end"] = 1.0
    pairs = [pair for pair in itertools.product(scales, scales) if pair != (1, 1)]
    return [
        _cell(recipe, dataclasses.replace(guidance, scale_texture=texture, scale_semantic=semantic, **plain))
        for texture, semantic in pairs
    ]


def interval_cells(recipe: EvalRecipe, edges: Sequence[float]) -> list[Cell]:
    """The scales of a recipe with each interval: from an edge on, and for Internal Guidance also up to an edge."""
    guidance = recipe.guidance
    assert not isinstance(guidance, NoGuidance)
    found = [
        _cell(recipe, dataclasses.replace(guidance, interval_start=edge, interval_mode=mode))
        for edge in edges
        for mode in MODES
    ]
    if isinstance(guidance, InternalGuidance):
        found += [
            _cell(recipe, dataclasses.replace(guidance, interval_end=edge, interval_mode=mode))
            for edge in edges
            for mode in MODES
        ]
    return found


def guide(
    recipe: EvalRecipe,
    out: Path,
    *,
    scales: Sequence[float] = (1.0, 1.25, 1.5, 2.0),
    edges: Sequence[float] = (0.2, 0.4),
    few: int = 1000,
    confirm: int = 3,
    by: str = "fid",
    extractor: LazyExtractor | None = None,
) -> list[Confirmed]:
    """Search the guidance of a recipe. Writes guide.json and guide.md; prints the tables. A second start continues.

    First every pair of scales, then the intervals of the best pair, all with `few` samples and the same noise. Then the
    best `confirm` settings and no guidance, with the recipe's number of samples and with other noise (seed + 1): the
    search has not seen it, so these scores are not biased by the choice.

    Args:
        by: the key of the score that decides, such as fid.

    Raises:
        ValueError: for a recipe without guidance, settings of which none is left, or a score that does not exist.
    """
    deciding = score_named(by)
    if isinstance(recipe.guidance, NoGuidance):
        raise ValueError("guidance: kind none; allowed: cfg, autoguidance or internal, whose settings are searched")
    if few < 2 or confirm < 1 or not set(scales) - {1.0} or not all(0 < edge < 1 for edge in edges):
        raise ValueError(
            f"--few {few}, --confirm {confirm}, --scales {list(scales)}, --edges {list(edges)}; allowed: 2 and up, 1 "
            "and up, a scale other than 1, edges between 0 and 1"
        )
    shared, cheap = Shared.of(recipe, extractor), dataclasses.replace(recipe, num_samples=few)
    tried = _tried(scale_cells(cheap, scales), out, shared, deciding)
    tried += _tried(interval_cells(tried[0][0].recipe, edges), out, shared, deciding)
    tried = _ranked(tried, deciding)
    luck = _luck([row for _, row in tried], recipe, shared, deciding)
    best = [cell for cell, _ in tried[:confirm]]
    confirmed = _confirm(best, [_value(row, deciding) for _, row in tried[:confirm]], recipe, out, shared, deciding)
    if distributed.is_main():
        _write([row for _, row in tried], confirmed, luck, few, recipe, deciding, out)
    return confirmed


def _tried(cells: list[Cell], out: Path, shared: Shared, by: Score) -> list[tuple[Cell, Row]]:
    return _ranked(list(zip(cells, scored(cells, out, shared), strict=True)), by)


def _ranked(tried: list[tuple[Cell, Row]], by: Score) -> list[tuple[Cell, Row]]:
    """The best first."""
    sign = 1 if by.better == "lower" else -1
    return sorted(tried, key=lambda found: sign * _value(found[1], by))


def _value(row: Row, by: Score) -> float:
    value = row.scores.of(by)
    if value is None:
        raise ValueError(f"--by: {by.key} has no value for these samples; allowed: a score that this recipe computes")
    return value


def _luck(rows: Sequence[Row], recipe: EvalRecipe, shared: Shared, by: Score) -> float | None:
    """How much better the best of the rows looks by chance; None for scores without intervals."""
    found = [influence_of(by, Path(row.folder), shared.reference, recipe.metrics) for row in rows]
    known = [influence for influence in found if influence is not None]
    return luck_of_the_best(known, lower_is_better=by.better == "lower") if len(known) == len(rows) else None


def _confirm(
    best: list[Cell], cheap: list[float], recipe: EvalRecipe, out: Path, shared: Shared, by: Score
) -> list[Confirmed]:
    """No guidance, and the finalists, with all samples and noise that the search has not seen."""
    whole = dataclasses.replace(recipe, seed=recipe.seed + 1)
    cells = [
        _cell(dataclasses.replace(whole, guidance=NoGuidance(), guide=None), NoGuidance()),
        *(_cell(whole, cell.recipe.guidance) for cell in best),
    ]
    rows = list(scored(cells, out / "confirmed", shared))
    influences = [influence_of(by, Path(row.folder), shared.reference, recipe.metrics) for row in rows]
    found = []
    for cell, early, row, own in zip(cells, [None, *cheap], rows, influences, strict=True):
        gap: Difference | None = None
        if early is not None and own is not None and influences[0] is not None:
            gap = difference(by.key, influences[0], own, paired=True, rounds=ROUNDS)
        bounds = (None, None, None) if gap is None else (gap.difference, gap.low, gap.high)
        found.append(
            Confirmed(
                guidance=config.to_dict(cell.recipe.guidance),
                cheap=early,
                full=_value(row, by),
                difference=bounds[0],
                low=bounds[1],
                high=bounds[2],
            )  # fmt: skip
        )
    return found


def _cell(recipe: EvalRecipe, guidance: GuidanceConfig) -> Cell:
    return Cell({"guidance": words(config.to_dict(guidance))}, dataclasses.replace(recipe, guidance=guidance))


def words(guidance: dict[str, Any]) -> str:
    """Guidance in a few words, for tables and names of folders."""
    if guidance["kind"] == "none":
        return "none"
    text = f"{guidance['kind']} {guidance['scale_texture']:g} {guidance['scale_semantic']:g}"
    if guidance["interval_mode"] == "none":
        return text
    end = guidance.get("interval_end", 1.0)
    return f"{text} {guidance['interval_mode']} {guidance['interval_start']:g}-{end:g}"


# ------------------------------------------------------------------------------------------------------- output


def _write(
    tried: list[Row], confirmed: list[Confirmed], luck: float | None, few: int, recipe: EvalRecipe, by: Score, out: Path
) -> None:
    rows = [[row.settings["guidance"], row.scores.text(by, ".4g")] for row in tried]
    heads = ("guidance (texture, semantic)", f"{by.title}, {few} samples")
    finalists = [_finalist(row) for row in confirmed]
    final_heads = ("guidance", f"{by.title}, search", f"{by.title}, {recipe.num_samples} samples", "less none",
                   "95% interval")  # fmt: skip
    chance = (
        f"{by.title} has no interval, so the luck of the best is not known."
        if luck is None
        else f"Of {len(tried)} equally good settings the best would look {luck:.4g} better in the search by chance."
    )
    note = f"{chance} The finalists are drawn with noise that the search has not seen (seed {recipe.seed + 1})."
    data = {
        "by": by.key, "few": few, "num_samples": recipe.num_samples, "luck_of_the_best": luck, "note": note,
        "tried": config.to_dict(tried), "confirmed": config.to_dict(confirmed),
    }  # fmt: skip
    write_json(out / "guide.json", data)
    body = f"{markdown(heads, rows)}\n{markdown(final_heads, finalists)}\n{note}\n"
    write_atomically(out / "guide.md", body)
    for columns, lines in ((heads, rows), (final_heads, finalists)):
        table = Table(*columns)
        for line in lines:
            table.add_row(*line)
        plain_console().print(table)
    plain_console().print(note)


def _finalist(row: Confirmed) -> list[str]:
    early = "–" if row.cheap is None else f"{row.cheap:.4g}"
    if row.difference is None:
        return [words(row.guidance), early, f"{row.full:.4g}", "–", "–"]
    return [
        words(row.guidance), early, f"{row.full:.4g}", f"{row.difference:+.4g}", f"{row.low:+.4g} to {row.high:+.4g}",
    ]  # fmt: skip


if __name__ == "__main__":
    from eval.__main__ import main

    main("guide")
