"""`eval guide`: the search over scales and intervals, its confirmation, and the luck of the best."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import scipy.stats
import torch

from eval.metrics.influence import Influence
from eval.search.paired import luck_of_the_best
from tests.helpers.eval_export import run_eval, write_eval_recipe, write_export


def influences(values: torch.Tensor) -> list[Influence]:
    return [Influence(0.0, column - column.mean()) for column in values.double().T]


def test_the_luck_of_the_best_is_the_expected_extreme_of_independent_cells() -> None:
    """The mean of the lowest of 8 independent standard normal draws is −1.4236 (order statistics)."""
    values = torch.randn(4000, 8, generator=torch.Generator().manual_seed(1))
    expected = 1.4236 / 4000**0.5
    assert luck_of_the_best(influences(values), rounds=250) == pytest.approx(expected, rel=0.12)
    assert luck_of_the_best(influences(-values), rounds=250, lower_is_better=False) == pytest.approx(expected, rel=0.12)
    # An error that all cells share favours none. A single cell has no luck.
    shared = torch.randn(4000, 1, generator=torch.Generator().manual_seed(2))
    assert luck_of_the_best(influences(10 * shared + values), rounds=250) == pytest.approx(expected, rel=0.15)
    assert luck_of_the_best(influences(values[:, :1]), rounds=250) == pytest.approx(0, abs=1e-12)


def test_the_best_is_the_lowest_or_the_highest_as_the_score_says() -> None:
    """Each of three cells is moved by one image of 20, by its number of copies: multinomial, and skewed to many."""
    law = scipy.stats.multinomial(20, [0.05, 0.05, 0.05, 0.85])
    cases = [(law.pmf([*k, 20 - sum(k)]), k) for k in itertools.product(range(7), repeat=3)]
    low = sum(share * (sum(k) / 3 - min(k)) for share, k in cases)
    high = sum(share * (max(k) - sum(k) / 3) for share, k in cases)
    assert high > 1.12 * low
    cells = influences(20 * torch.eye(20)[:, :3])
    assert luck_of_the_best(cells, rounds=4000) == pytest.approx(low, rel=0.05)
    assert luck_of_the_best(cells, rounds=4000, lower_is_better=False) == pytest.approx(high, rel=0.05)


def test_guide_as_a_command_on_a_model_with_an_internal_layer(tmp_path: Path) -> None:
    """The file of an export carries the internal layer, and the search guides by it."""
    exported = write_export(
        tmp_path, "depth: 2, internal_depth: 1", "alignment_weight: 0.0, internal_weight: 0.5"
    )  # fmt: skip
    recipe = write_eval_recipe(tmp_path, exported)
    words = (
        "guide", recipe, "guidance={kind: internal}", "precision=fp32", "sampler.num_steps=4", "--scales", "1,1.5",
        "--edges", "0.3", "--few", 8, "--confirm", 2, "--out", tmp_path / "g",
    )  # fmt: skip
    shown = run_eval(*words)
    data = json.loads((tmp_path / "g" / "guide.json").read_text())
    names = [row["settings"]["guidance"] for row in data["tried"]]
    assert {"internal 1.5 1.5", "internal 1 1.5", "internal 1.5 1"} <= set(names) and len(names) == 3 + 6
    assert any("0.3-1" in name for name in names) and any("0-0.3" in name for name in names)
    found = [row["scores"]["fid"] for row in data["tried"]]
    assert found == sorted(found) and found[0] < found[-1]
    none, best, second = data["confirmed"]
    assert none["guidance"] == {"kind": "none"} and none["difference"] is None
    assert [best["cheap"], second["cheap"]] == found[:2] and best["guidance"]["kind"] == "internal"
    assert best["difference"] == pytest.approx(best["full"] - none["full"], abs=1e-6)
    assert best["low"] <= best["difference"] <= best["high"] and data["luck_of_the_best"] > 0
    assert "equally good settings" in shown and "less none" in (tmp_path / "g" / "guide.md").read_text()
    settings = json.loads(next((tmp_path / "g" / "confirmed").rglob("config.json")).read_text())
    assert settings["seed"] == 1 and settings["num_samples"] == 24
    with pytest.raises(ValueError, match="--by: fud; allowed: fid"):
        run_eval(*words[:2], "--by", "fud", "--out", tmp_path / "g")
    with pytest.raises(ValueError, match="guidance: kind none; allowed: cfg"):
        run_eval("guide", recipe, "guidance={kind: none}", "--out", tmp_path / "g")


def test_internal_guidance_of_a_model_without_the_layer_is_refused(tmp_path: Path) -> None:
    recipe = write_eval_recipe(tmp_path, write_export(tmp_path))
    with pytest.raises(ValueError, match="needs a model with an internal layer"):
        run_eval("generate", recipe, "guidance={kind: internal}", "--out", tmp_path / "o")
