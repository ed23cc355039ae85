"""What the benchmarks share: turns, ratios, files and tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import __main__ as suite
from benchmarks import harness

SECONDS = {"ours": [1.0, 2.0, 4.0], "peer": [2.0, 2.0, 12.0]}


def test_contenders_take_turns_in_changing_order() -> None:
    calls: list[str] = []
    seconds = harness.race({name: lambda name=name: calls.append(name) for name in "ab"}, repeats=2, warmup=1)  # type: ignore[misc]
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_the_ratio_is_the_median_of_the_rounds() -> None:
    figure = harness.compare("step", SECONDS, against="it", work=8, unit="samples/s", bar=2.5)
    # Round by round 2, 1 and 3; the ratio of the median times would be 1.
    assert (figure.ratio, figure.low, figure.high) == (2.0, 1.5, 2.5)
    assert (figure.ours, figure.peer, figure.met) == (4.0, 4.0, False)


def test_values_are_better_lower_or_higher() -> None:
    assert harness.measured("memory", ours=2, peer=3, against="it", unit="GiB", bar=1).met
    assert harness.measured("images", ours=2, peer=3, against="it", unit="1/s", better="higher", bar=1).met is False


def test_figures_come_back_from_their_file(tmp_path: Path) -> None:
    figures = [harness.compare("step", SECONDS, against="it", work=8, unit="samples/s")]
    path = harness.write("step", "python -m benchmarks.step", figures, {"machine": harness.machine()}, tmp_path)
    assert path == tmp_path / "step.json"
    assert harness.read(path) == figures


def _allocate(count: int) -> None:
    bytearray(count).extend(b"x")


def test_peak_memory_is_that_of_the_process() -> None:
    small, large = harness.peak_memory(_allocate, 1), harness.peak_memory(_allocate, 400_000_000)
    assert 300_000_000 < large - small < 900_000_000


def test_the_table_is_put_between_the_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"a\n{suite.START}\nold\n{suite.END}\nb\n")
    suite.insert(page, "new")
    assert page.read_text() == f"a\n{suite.START}\nnew\n{suite.END}\nb\n"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="needs the lines"):
        suite.insert(page, "new")
