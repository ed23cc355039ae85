"""`eval solvers` as a command: what it draws, writes and names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.search.solvers import SolverRow, candidates, cheapest
from sfd_scale.diffusion.fixed_step import FixedStepConfig
from sfd_scale.diffusion.multistep import MultistepConfig
from tests.helpers.eval_export import run_eval, write_eval_recipe, write_export


def row(nfe: float, error: float, low: float, high: float) -> SolverRow:
    return SolverRow(
        method="m", steps="1", nfe=nfe, error=error, fid=2.0, difference=(low + high) / 2, low=low, high=high,
        sampler={},
    )  # fmt: skip


def test_every_candidate_spends_its_budget_and_none_has_too_few_steps() -> None:
    found = candidates((8, 13), fewest=3)
    fixed = [c for c in found if isinstance(c.sampler, FixedStepConfig | MultistepConfig)]
    names = [(c.method, c.steps) for c in fixed]
    assert ("rk4 (jump)", "3") in names and ("rk4 (jump)", "2") not in names and ("heun2 (jump)", "6") in names
    assert {c.method for c in found} >= {"ab2", "ab3", "exp_ab2", "euler", "euler (jump)", "dopri5, official"}
    assert len({(c.method, c.steps) for c in found}) == len(found)


def test_the_cheapest_solver_is_surely_within_the_tolerance() -> None:
    sure, cheap_but_unsure, equal = row(12, 0.1, -0.3, 0.01), row(8, 0.1, -0.3, 0.03), row(12, 0.05, -0.2, 0.02)
    assert cheapest([sure, cheap_but_unsure, equal], 0.02) is equal
    assert cheapest([sure, cheap_but_unsure, equal], 0.03) is cheap_but_unsure
    assert cheapest([sure], 0.001) is None


def test_solvers_as_a_command(tmp_path: Path) -> None:
    recipe = write_eval_recipe(tmp_path, write_export(tmp_path))
    words = ("solvers", recipe, "precision=fp32", "num_samples=16", "--budgets", "6,12", "--out", tmp_path / "s")
    shown = run_eval(*words)
    data = json.loads((tmp_path / "s" / "solvers.json").read_text())
    rows = {(r["method"], r["steps"]): r for r in data["rows"]}
    assert all(rows[kind, "6"]["nfe"] == 6 for kind in ("ab2", "ab3", "euler", "exp_ab2"))
    assert rows["heun2 (jump)", "3"]["nfe"] == 6 and rows["rk4 (jump)", "3"]["nfe"] == 12
    # More evaluations bring each method closer to the fine solution, whose own error is smaller than all.
    for kind in ("ab2", "ab3", "euler (jump)", "exp_ab2"):
        assert rows[kind, "12"]["error"] < rows[kind, "6"]["error"]
    assert data["fine"]["error_of_half_the_steps"] < min(r["error"] for r in rows.values() if r["nfe"] <= 12)
    assert rows["ab2", "12"]["difference"] == pytest.approx(rows["ab2", "12"]["fid"] - data["fine"]["fid"], abs=1e-6)
    assert all(r["low"] <= r["difference"] <= r["high"] for r in rows.values())
    assert (tmp_path / "s" / "solvers.png").read_bytes().startswith(b"\x89PNG")
    assert "FID − fine" in (tmp_path / "s" / "solvers.md").read_text() and "fine solution" in shown
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "s" / "cells").rglob("chunk-*.safetensors")}
    assert made and "fine solution" in run_eval(*words)
    assert made == {file: file.stat().st_mtime_ns for file in made}, "a second start draws nothing again"
    with pytest.raises(ValueError, match="--budgets: six; allowed: numbers between commas"):
        run_eval("solvers", recipe, "--budgets", "six", "--out", tmp_path / "s")
