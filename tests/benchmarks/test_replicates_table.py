"""The tables of docs/evaluation.md on how sure a comparison is, from the scores of real replicates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.replicates import DRAWS, FILE, of_groups, one_each, read, tables
from sfd_scale.runtime.files import read_json

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"


def made(count: int, differing: list[list[int]]) -> dict[str, Any]:
    """Scores of one normal distribution, and one training that differs in its initial weights alone."""
    draw = torch.Generator().manual_seed(0)
    seeds = [{"init": n, "data": n, "noise": n} for n in range(count)] + [{"init": 1, "data": 0, "noise": 0}]
    rows = [{"seeds": s, "scores": {"fid": 10 + torch.randn((), generator=draw).item()}} for s in seeds]
    return {"replicates": rows, "gram": (1e-9 * torch.eye(count + 1)).tolist(), "differing": differing}


def test_pairs_are_counted_among_trainings_that_differ_in_all_parts() -> None:
    data = made(12, [[0, 1], [2, 5], [3, 12]])
    found = read(data)
    assert len(found.scores) == 12 and found.differing == {(0, 1), (2, 5)}
    assert one_each(found)["interval of sampling alone"] == pytest.approx(2 / 66)
    everything = [[i, j] for i in range(12) for j in range(i + 1, 12)]
    by_rule = one_each(read(made(12, everything)))
    assert by_rule["interval of sampling alone"] == 1.0
    by_literature, own = list(by_rule.values())[1:]
    # A spread of 10% is far above that of the literature.
    assert by_literature > 0.5 and own < 0.15
    draw = torch.Generator().manual_seed(1)
    assert DRAWS >= 1000 and of_groups(found, 3, draw) < 0.1


@pytest.mark.full
def test_the_page_has_the_tables_of_the_file() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for part in tables(read_json(FILE)):
        for line in part.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert line in page or f"| {' | '.join(cells)} |" in page, line
