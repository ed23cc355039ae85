"""What the benchmarks share: turns, ratios, files and tables."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import __main__ as suite
from benchmarks import harness, startup

SECONDS = {"ours": [1.0, 2.0, 4.0], "peer": [2.0, 2.0, 12.0]}


def test_contenders_take_turns_in_changing_order() -> None:
    calls: list[str] = []
    seconds = harness.race({name: lambda name=name: calls.append(name) for name in "ab"}, repeats=2, warmup=1)  # type: ignore[misc]
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_the_ratio_is_the_median_of_the_rounds() -> None:
    figure = harness.compare("step", SECONDS, against="it", work=8, unit="samples/s", target=2.5)
    # Round by round 2, 1 and 3; the ratio of the median times would be 1.
    assert (figure.ratio, figure.low, figure.high) == (2.0, 1.5, 2.5)
    assert (figure.ours, figure.peer, figure.met) == (4.0, 4.0, False)


# One round of ours was interrupted, and two of the peer's: the paired ratio is 1, that of the medians 2.
UNSETTLED = {"ours": [1.0, 1.0, 1.0, 2.0, 2.0], "peer": [1.0, 1.0, 2.0, 2.0, 2.0]}


def test_a_row_says_where_its_two_ratios_disagree_by_more_than_their_spread() -> None:
    figure = harness.compare("step", UNSETTLED, against="it", work=8, unit="samples/s", target=1.0)
    assert (figure.ratio, figure.low, figure.high, figure.medians) == (1.0, 1.0, 1.0, 2.0)
    assert harness.row(figure)[-1] == "met; unsettled: the medians' ratio is 2.00"
    # A spread as wide as the difference explains it, and so does a difference of less than 2%.
    assert harness.compare("step", SECONDS, against="it", work=8, unit="samples/s").medians is None
    near = {"ours": [1.0, 1.0, 1.0, 1.01, 1.01], "peer": [1.0, 1.0, 1.01, 1.01, 1.01]}
    assert harness.compare("step", near, against="it", work=8, unit="samples/s").medians is None


def made_up(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, list[float]]) -> dict[str, Callable[[], object]]:
    """Contenders whose calls take the given times by the clock of the harness."""
    now, left = [0.0], {name: iter(times) for name, times in seconds.items()}
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])

    def pass_time(name: str) -> None:
        now[0] += next(left[name])

    return {name: functools.partial(pass_time, name) for name in seconds}


def test_rounds_whose_ratios_disagree_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    calm = [1.0] * 10
    settled = {name: times + calm for name, times in UNSETTLED.items()}
    seconds = harness.race(made_up(monkeypatch, settled), repeats=5, warmup=0)
    assert len(seconds["ours"]) == 10  # the second rounds were calm
    assert harness.compare("step", seconds, against="it", work=8, unit="1/s").medians is None
    never = {name: times * (1 + harness.EXTENSIONS) for name, times in UNSETTLED.items()}
    seconds = harness.race(made_up(monkeypatch, never), repeats=5, warmup=0)
    assert len(seconds["ours"]) == 5 * (1 + harness.EXTENSIONS)
    assert harness.compare("step", seconds, against="it", work=8, unit="1/s").medians == 2.0
    agreeing = {"ours": [1.0] * 5, "peer": [2.0] * 5}
    assert len(harness.race(made_up(monkeypatch, agreeing), repeats=5, warmup=0)["peer"]) == 5


def test_a_value_that_is_unknown_is_an_empty_cell(tmp_path: Path) -> None:
    figure = harness.measured("rate", ours=2.0, peer=math.nan, against="it", unit="1/s", better="higher")
    assert harness.row(figure) == ("rate", "it", "1/s", "2", "", "", "", "", "")


def test_values_are_better_lower_or_higher() -> None:
    assert harness.measured("memory", ours=2, peer=3, against="it", unit="GiB", target=1).met
    assert harness.measured("images", ours=2, peer=3, against="it", unit="1/s", better="higher", target=1).met is False


def test_figures_come_back_from_their_file(tmp_path: Path) -> None:
    figures = [harness.compare("step", SECONDS, against="it", work=8, unit="samples/s")]
    path = harness.write("step", "python -m benchmarks.step", figures, {"machine": harness.machine()}, tmp_path)
    assert path == tmp_path / "step.json"
    assert harness.figures_of(harness.read(path)) == figures


def test_a_new_result_takes_the_place_of_its_older_one(tmp_path: Path) -> None:
    file = tmp_path / "results" / "cpu.json"
    assert harness.sections(file) == []
    for name, date in (("loader", 1), ("step", 1), ("step", 2)):
        harness.merge(file, [{"benchmark": name, "date": date}], order=("step", "loader"))
    assert harness.sections(file) == [{"benchmark": "step", "date": 2}, {"benchmark": "loader", "date": 1}]


def test_the_page_has_the_targets_first_and_says_where_each_figure_is_from(tmp_path: Path) -> None:
    with_target = harness.compare("step", SECONDS, against="it", work=8, unit="samples/s", target=2.5)
    other = harness.measured("memory", ours=2, peer=3, against="it", unit="GiB")
    state = {"machine": harness.machine(), "versions": harness.versions(), "threads": 2, "seconds": 1.0}
    section = harness.read(harness.write("step", "python -m benchmarks.step", [with_target, other], state, tmp_path))
    blocks = [block.replace("\n", " ") if block[0] != "|" else block for block in suite.page([section]).split("\n\n")]
    lines = "\n".join(blocks).splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    # The table of targets names its machine, and so does each table below it.
    assert lines[0].startswith("**Targets.** Machine: ") and section["machine"]["cpu"] in lines[0]
    assert ["step", "it", "samples/s", "4", "4", "2.00", "1.50 to 2.50", "2.5", "not met"] in table
    assert table.index(["memory", "it", "GiB", "2", "3", "1.50", "1.50 to 1.50", "", ""]) > 2
    source = next(line for line in lines if line.startswith("`python -m benchmarks.step`"))
    assert section["date"] in source and section["machine"]["cpu"] in source and "2 threads" in source


def test_targets_of_several_machines_name_each_of_them() -> None:
    def section(name: str, cpu: str) -> dict[str, object]:
        machine = {"cpu": cpu, "cores": 2, "instructions": "AVX2"}
        return {"benchmark": name, "machine": machine, "date": "2026-01-01"}

    text = suite.machines([section("loader", "A"), section("metrics", "A"), section("startup", "B")])
    assert text == "loader, metrics: A, 2 cores (AVX2), 2026-01-01. startup: B, 2 cores (AVX2), 2026-01-01."


def _allocate(count: int) -> None:
    bytearray(count).extend(b"x")


def test_peak_memory_is_that_of_the_process() -> None:
    small, large = harness.peak_memory(_allocate, 1), harness.peak_memory(_allocate, 400_000_000)
    assert 300_000_000 < large - small < 900_000_000


def test_the_parts_of_a_start_are_medians_of_what_lies_between_the_stamps() -> None:
    stamps = ((1.0, 3.0, 9.0), (2.0, 8.0, 9.0), (4.0, 5.0, 9.0))
    runs = [dict(zip(("rank", "imports", "step"), times, strict=True)) for times in stamps]
    assert startup.describe_parts(runs, {"rank": "launcher", "imports": "imports", "step": "first step"}) == (
        "launcher 2.0, imports 2.0, first step 4.0"
    )


def test_a_start_that_fails_or_lacks_a_part_is_an_error(tmp_path: Path) -> None:
    program = "import json, os; json.dump({'rank': 2e9}, open(os.environ['SFD_STAMPS'], 'w'))"
    with pytest.raises(RuntimeError, match="never reached: step"):
        startup.run_with_stamps([sys.executable, "-c", program], tmp_path / "a", {"rank": "", "step": ""}, {})
    with pytest.raises(RuntimeError, match="ended with 3:\\nno such thing"):
        startup.run_with_stamps(
            [sys.executable, "-c", "import sys; print('no such thing'); sys.exit(3)"], tmp_path / "b", {}, {}
        )


@pytest.mark.full
def test_both_starts_come_to_a_step() -> None:
    limit, ratio = startup.run(harness.Options(quick=True))
    assert limit.ours == ratio.ours > ratio.peer > 0
    assert "model and engine" in ratio.what and "model and DDP" in ratio.against


def test_the_table_is_put_between_the_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"a\n{suite.START}\nold\n{suite.END}\nb\n")
    suite.insert(page, "new")
    assert page.read_text() == f"a\n{suite.START}\nnew\n{suite.END}\nb\n"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="needs the lines"):
        suite.insert(page, "new")
