"""results.json: the format on disk, what is refused, and the table of scores."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from eval.metrics.config import MetricsConfig
from eval.metrics.scores import SCORES, Score, Scores
from eval.results import Results, ScoreRow, read_table
from tests.eval.test_report import result

RELEASED = Path(__file__).parents[1] / "golden" / "release-0.1" / "results" / "results.json"


def test_the_file_of_the_release_is_written_again_to_the_byte(tmp_path: Path) -> None:
    Results.read(RELEASED).write(tmp_path / "results.json")
    assert (tmp_path / "results.json").read_text() == RELEASED.read_text()


def test_the_file_of_the_release_is_read_by_name() -> None:
    found = Results.read(RELEASED)
    assert Results.read(RELEASED.parent) == found
    assert (found.scores.recall, found.scores.is_std) == (0.7, 0.0019739692423124122)
    assert (found.step, found.count, found.metrics.is_split) == (4, 24, 12)
    assert (found.title, found.sampling) == ("golden, step 4", "euler 4, NFE 4, cfg 1.5/2")


def changed(path: Path, **changes: Any) -> Path:
    data = json.loads(RELEASED.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "not a results.json of this release$"),
        ({"format": None}, "not a results.json of this release$"),
        ({"scores": {"fid": "4.5"}}, "not a results.json of this release: scores.fid: '4.5'; allowed: a number"),
        ({"scores": {"fdi": 4.5}}, "scores.fdi: unknown key; .* did you mean scores.fid"),
        ({"run": None}, "not a results.json of this release: run: missing"),
        ({"samples": {}}, "of this release: samples.kind, samples.extractor, samples.images missing"),
        (
            {"samples": {"kind": "generated", "extractor": "x", "checkpoint": {"name": "a"}}},
            "samples.sampler, samples.guidance, samples.checkpoint.step, samples.checkpoint.sha256 missing",
        ),
        (
            {"samples": {"kind": "generated", "extractor": "x", "sampler": {}, "guidance": 1.5}},
            "samples.checkpoint, samples.sampler.kind, samples.guidance.kind missing",
        ),
        ({"scores": {"fid": math.nan}}, "scores.fid: nan; allowed: a number"),
        ({"scores": {"fid": 4.5, "is_mean": math.inf}}, "scores.is_mean: inf; allowed: a finite number"),
        ({"nfe": math.nan}, "nfe: nan; allowed: a number"),
        ({"reference": {}}, "not a results.json of this release: reference.data missing"),
    ],
)
def test_damaged_and_foreign_files_are_refused_in_one_sentence(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    file = changed(tmp_path / "x.json", **changes)
    with pytest.raises(ValueError, match=message) as error:
        Results.read(file)
    assert str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value)


def test_files_that_are_no_json_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(RELEASED.read_text()[:500])
    with pytest.raises(ValueError, match="x.json is truncated or damaged"):
        Results.read(tmp_path / "x.json")
    with pytest.raises(ValueError, match="results.json: no such file"):
        Results.read(tmp_path)


def test_results_are_paired_by_seed_labels_and_number(tmp_path: Path) -> None:
    first = Results.read(result(tmp_path / "a", 1000, 4.5))
    other = Results.read(result(tmp_path / "b", 2000, 4.4))
    labelled = [dataclasses.replace(found, samples=found.samples | {"labels": "iid"}) for found in (first, other)]
    assert labelled[0].paired_with(labelled[1])
    for key in ("seed", "labels", "num_samples"):
        assert not labelled[0].paired_with(
            dataclasses.replace(labelled[1], samples=labelled[1].samples | {key: "other"})
        )
    given = dataclasses.replace(labelled[0], samples={"kind": "extracted", "images": "npz:1"})
    assert not given.paired_with(given) and given.title == "a" and given.sampling == "given images"


def test_settings_of_later_scores_are_in_the_hash_where_they_are_not_the_default() -> None:
    """So results of the first release keep their ids, and other settings get another one."""
    usual = Scores.settings_in_hash(MetricsConfig())
    assert {"is_split", "neighbours"} <= usual.keys() and not {"mind_samples", "density_neighbours"} & usual.keys()
    assert Scores.settings_in_hash(MetricsConfig(mind_samples=7)) == {**usual, "mind_samples": 7}


# ------------------------------------------------------------------------------------------------- results.jsonl


def test_the_table_of_the_release_is_written_again_line_by_line() -> None:
    table = RELEASED.parents[1] / "run" / "evaluations" / "results.jsonl"
    rows = read_table(table)
    assert [row.step for row in rows] == [2, 4]
    assert "".join(f"{json.dumps(row.as_json())}\n" for row in rows) == table.read_text()
    last = Results.read(table.with_name("step-00000004"))
    now = ScoreRow.of(last)
    assert dataclasses.replace(now, labels=None, reference=None, evaluator=None) == rows[1]
    assert (now.labels, now.reference) == ("balanced", last.reference["data"])


def test_a_damaged_line_of_the_table_is_named(tmp_path: Path) -> None:
    assert read_table(tmp_path / "none.jsonl") == []
    for line in ('{"step": 1', "[]", '{"step": "one"}'):
        (tmp_path / "results.jsonl").write_text(line)
        with pytest.raises(ValueError, match="results.jsonl: line 1 is no line of a results.jsonl"):
            read_table(tmp_path / "results.jsonl")


# ------------------------------------------------------------------------------------------------- the scores


def test_the_best_value_follows_the_direction_of_the_score() -> None:
    best = {score.key: score.best([2.0, None, 1.0, 3.0]) for score in SCORES}
    lower, higher = (
        ("fid", "sfid", "kid_mean", "mind", "fdr"),
        ("is_mean", "precision", "recall", "density", "coverage"),
    )
    assert best == dict.fromkeys(lower, 1.0) | dict.fromkeys(higher, 3.0)
    assert SCORES[0].best([None]) is None


def test_scores_are_shown_in_their_unit_with_their_deviation() -> None:
    scores = Scores(fid=4.567, is_mean=8.125, is_std=0.25, kid_mean=0.0123, kid_std=0.001)
    shown = {score.title: scores.text(score) for score in SCORES}
    assert shown == {
        "FID": "4.57", "sFID": "–", "IS": "8.12 ± 0.25", "Precision": "–", "Recall": "–", "KID·10³": "12.30",
        "MIND": "–", "Density": "–", "Coverage": "–", "FDr": "–",
    }  # fmt: skip
    assert [scores.text(score, ".4g") for score in SCORES] == [
        "4.567",
        "–",
        "8.125",
        "–",
        "–",
        "12.3",
        "–",
        "–",
        "–",
        "–",
    ]


def test_the_table_names_scores_of_results_alone() -> None:
    keys = {field.name for field in dataclasses.fields(Scores)}
    for score in SCORES:
        assert isinstance(score, Score) and score.key in keys and (score.deviation is None or score.deviation in keys)
