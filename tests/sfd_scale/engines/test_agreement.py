"""Engines agree on the real model and objective: same losses and same resume for every world size and accumulation."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.agreement import OPTIMIZERS, Cell, broken, errors, matrix, measure, read, reference, run_cells
from tests.helpers.ranks import run_ranks

STEPS = 6
SOME = [
    Cell("ZeRO-1", 2), Cell("ZeRO-2", 2, grad_accum_steps=2), Cell("ZeRO-3", 2), Cell("FSDP2", 2, grad_accum_steps=4),
    Cell("HSDP", 2), Cell("ZeRO-2", 2, "bf16"), Cell("FSDP2", 2, "bf16", 2),
]  # fmt: skip


@pytest.mark.full
def test_engines_agree_on_a_run_of_the_real_model(tmp_path: Path) -> None:
    plain = {"adamw": reference(STEPS)}
    run_ranks(run_cells, 2, str(tmp_path), SOME, STEPS, timeout=900)
    found = read(str(tmp_path))
    assert list(found) == SOME and broken(found, plain) == []
    assert all(e > 1e-7 for cell, e in errors(found, plain).items() if cell.precision == "bf16"), "bf16 was computed in"


@pytest.mark.full
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_whole_matrix(optimizer: str, tmp_path: Path) -> None:
    groups = matrix(optimizer)
    measure(str(tmp_path), groups)
    found, plain = read(str(tmp_path)), reference(optimizer=optimizer)
    assert set(found) == {cell for group in groups for cell in group}
    assert broken(found, {optimizer: plain}) == []
    assert plain[-1] < 0.92 * plain[0]
