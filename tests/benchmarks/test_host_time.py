"""The benchmark of the host's time: an engine in a process of its own, of this checkout or another one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks import host_time


def test_an_unknown_engine_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        host_time.main(["zero9"])
    assert "zero9; allowed: fsdp compiled; fsdp compiled, 8 ranks; zero1 compiled" in capsys.readouterr().err


@pytest.mark.full
def test_an_installed_package_is_not_taken_for_that_of_a_checkout(tmp_path: Path) -> None:
    with pytest.raises((ValueError, RuntimeError), match="sfd_scale was not found|the worker ended with"):
        host_time.Worker(tmp_path, "fsdp eager")


@pytest.mark.full
def test_two_checkouts_take_turns() -> None:
    figure = host_time.measure("fsdp eager", host_time.ROOT, repeats=3)
    assert figure.ours > 1 and figure.peer > 1 and 0.5 < figure.ratio < 2
    alone = host_time.measure("fsdp eager", None, repeats=1)
    assert alone.ours > 1 and math.isnan(alone.peer)


@pytest.mark.full
def test_two_engines_of_one_checkout_take_turns() -> None:
    floor = "no engine, compiled"
    figure = host_time.measure(floor, None, repeats=3, other="fsdp compiled, units of 1 block, 8 ranks")
    assert figure.ours > 1 and figure.ratio > 2
