"""The report of a study: spreads, differences, tables and pictures."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.metrics.scores import Scores
from eval.pages import figures
from eval.results import ScoreRow
from eval.study import report as study_report
from eval.study.recipe import StudyRecipe


def scored(
    cell: str, seed: int, step: int, fid: float, delta_t: float = 0.0, precision: float | None = None
) -> study_report.Row:
    scores = Scores(fid=fid, precision=precision)
    row = ScoreRow(step=step, scores=scores, count=8, nfe=1.0, name="eval", id=f"{cell}{seed}{step}")
    return study_report.Row(cell, seed, delta_t, row)


def test_spreads_and_differences_are_over_the_seeds_that_are_there() -> None:
    fids = {("a", 0): 3.0, ("a", 1): 5.0, ("a", 2): 4.0, ("b", 0): 2.0, ("b", 1): 3.0}
    rows = [
        scored(cell, seed, step, fid + (10 if step == 1 else 0), delta_t=0.1)
        for (cell, seed), fid in fids.items()
        for step in (1, 2)
    ]
    assert str(study_report.spread(list(study_report.scores(rows, "a").values()))) == "4 ± 1 (3 seeds)"
    change = study_report.difference(rows, "a", "b")
    assert change is not None and change.count == 2 and change.mean == pytest.approx(-1.5)
    assert study_report.convergence(rows, ["b", "absent"]) == {"b": [(1.0, [12.0, 13.0]), (2.0, [2.0, 3.0])]}
    assert study_report.lead_curve(rows, ["a"]) == [(0.1, [3.0, 5.0, 4.0])]
    assert study_report.difference(rows, "a", "absent") is None


def test_samples_of_cells_stand_side_by_side(tmp_path: Path) -> None:
    images = {"dit": Image.new("RGB", (20, 30), (255, 0, 0)), "sfd": Image.new("RGB", (10, 30), (0, 0, 255))}
    for name, image in images.items():
        image.save(tmp_path / f"{name}.png")
    page = Image.open(io.BytesIO(figures.side_by_side({name: tmp_path / f"{name}.png" for name in images})))
    pixels = np.asarray(page.convert("RGB"))
    assert page.width == 20 + 12 + 10
    assert (pixels[-30:, :20] == (255, 0, 0)).all() and (pixels[-30:, -10:] == (0, 0, 255)).all()
    assert (pixels[-30:, 20:-10] == 255).all() and (pixels[:-30] != 255).any()


def test_a_report_without_the_scores_that_an_evaluation_does_not_have(tmp_path: Path) -> None:
    rows = [scored("a", seed, 2, 3.0, precision=0.5 if seed == 0 else None) for seed in (0, 1)]
    recipe = StudyRecipe(
        name="x", root=tmp_path, out=tmp_path, prepare={}, cells={"a": "study/dit"}, evaluation="study/eval",
        convergence=("a",), lead=("a",), ablation=("a",),
    )  # fmt: skip
    text = study_report.write(recipe, rows, []).read_text()
    assert "| cell | FID | minus the row above, same seeds | Precision |\n" in text
    assert "| a | 3 ± 0 (2 seeds) | – | 0.5 (1 seed) |\n" in text and "Other methods" not in text
    every = text[text.index("## FID of every cell") :]
    assert "| cell | step 2 |\n|---|---|\n| a | 3 ± 0 (2 seeds) |\n" in every


def test_a_report_has_the_losses_of_both_parts_and_the_oracle(tmp_path: Path) -> None:
    recipe = StudyRecipe(
        name="x", root=tmp_path, out=tmp_path, prepare={}, cells={"a": "study/dit"}, evaluation="study/eval"
    )
    examined = {
        "a": {"losses": {"own": [(0.1, 1.0), (0.2, 2.0)]}, "fid": {"own": 5.0, "pictures": 1.0}},
        "b": {
            "losses": {"own": [(0.1, 3.0), (0.2, 4.0)], "another": [(0.1, 6.0), (0.2, 7.0)]},
            "semantic_losses": [(0.1, 0.5), (0.2, 0.25)], "fid": {"own": 4.0, "oracle": 2.0, "pictures": 1.0},
        },
    }  # fmt: skip
    text = study_report.write(recipe, [], [], examined=examined).read_text()
    assert "| a | own | 1.000 | 2.000 |\n| b | own | 3.000 | 4.000 |\n| b | another | 6.000 | 7.000 |\n\n" in text
    assert "| cell, loss of semantics | 0.1 | 0.2 |\n|---|---|---|\n| b | 0.500 | 0.250 |\n\n" in text
    assert "| a | 5 | – | 1 |\n| b | 4 | 2 | 1 |\n" in text
