"""A dozen seeded kills of the fault harness, and the faults that cost little; `make faults` makes all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def faults(*options: str, timeout: float = 900) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", *options], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_dozen_kills_lose_nothing() -> None:
    table = faults("--kills", "12", "--only", "kill")
    assert table.split("\nall ")[1].split()[:3] == ["12", "12", "0"], table


@pytest.mark.full
def test_every_fault_once() -> None:
    table = faults("--kills", "0", timeout=3600)
    times, survived, lost = map(int, table.split("\nall ")[1].split()[:3])
    assert times == survived >= 15 and lost == 0, table


@pytest.mark.full
def test_kills_under_the_real_launchers() -> None:
    table = faults("--kills", "0", "--only", "nothing else", "--launchers", timeout=3600)
    assert table.split("\nall ")[1].split()[:3] == ["6", "6", "0"], table
