"""The report: every score, every difference, every file, and curves of what a run logged."""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eval.pages import figures
from eval.pages.html import find_picture
from eval.pages.run_metrics import loss_names, read_metrics
from eval.report import differences, report
from eval.results import Results


def result(folder: Path, step: int, fid: float, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    for name, colour in (("grid.png", (step % 255, 80, 120)), ("reference.png", (10, 200, 30))):
        Image.new("RGB", (40, 30), colour).save(folder / name)
    samples = {
        "kind": "generated", "num_samples": 2000, "seed": 0, "extractor": "convnet:1",
        "checkpoint": {"sha256": f"{step:064d}", "name": "sfd", "step": step, "recipe_digest": "r"},
        "sampler": {"kind": "euler", "num_steps": 30, "shift": 0.0},
        "guidance": {"kind": "cfg", "scale_texture": 1.5, "scale_semantic": 1.25},
    }  # fmt: skip
    data = {
        "format": 1, "name": "quickstart", "id": "1", "count": 2000, "nfe": 30.0,
        "scores": {
            "fid": fid, "sfid": None, "is_mean": 8.125, "is_std": 0.25, "is_whole_splits": 8.1,
            "precision": 0.75, "recall": 0.5, "kid_mean": 0.0123, "kid_std": 0.001,
        },
        "warnings": ["too few <samples>"], "samples": samples | changes, "reference": {"data": "mds:1"},
        "metrics": {"is_split": 5000}, "arithmetic": {"tf32": False}, "recipe_digest": "e", "versions": {"torch": "2"},
        "run": {
            "finished": "2026-01-01T00:00:00+00:00", "seconds": 1.5, "world_size": 2, "made_on": ["a CPU"],
            "device": "x86_64", "samples": str(folder), "features": str(folder), "reference": "cache/r.safetensors",
            "checkpoint": f"runs/{step}.safetensors", "reference_grid": "elsewhere/reference.png",
            "grid": str(folder / "grid.png"),
        },
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(data))
    return folder / "results.json"


def run_folder(path: Path) -> Path:
    path.mkdir()
    lines = []
    for step in range(10, 1010, 10):
        loss = 1 + math.exp(-step / 200)
        clocks = {f"loss_by_clock/{i}": loss * (1 + i / 10) for i in range(10)}
        row = {"step": step, "loss": loss, "loss/velocity": 0.6 * loss, "loss/cosine": 0.4 * loss}
        lines.append(json.dumps(row | clocks | {"lr": 1e-3, "grad_norm": 0.5, "samples_per_s": 90.0, "mfu": None}))
    (path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 10')
    (path / "recipe.yaml").write_text("name: sfd\n")
    return path


def test_report_has_every_score_and_file(tmp_path: Path) -> None:
    good, bad = result(tmp_path / "a", 1000, 4.567), result(tmp_path / "b", 0, 345.678)
    run = run_folder(tmp_path / "sfd")
    page = report([good, bad], tmp_path / "out", runs=[run], title="A & B").read_text()
    assert "A &amp; B" in page and "too few &lt;samples&gt;" in page and page.count("too few") == 1
    assert '<td class="best">4.57</td>' in page and "<td>345.68</td>" in page
    assert "sfd, step 1,000" in page and "sfd, untrained" in page
    assert "8.12 ± 0.25" in page and "12.30" in page  # IS, KID in thousandths
    assert "euler 30, NFE 30, cfg 1.5/1.25" in page
    # Self-contained: 2 sample grids, the real images once, 7 figures of the run, nothing loaded from elsewhere.
    assert page.count("data:image/png;base64,") == 10 and "http" not in page.replace("http-equiv", "")
    assert "differ in more" not in page
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| sfd, step 1,000 | **4.57** | – | **8.12 ± 0.25** |" in text and "A & B" in text
    for line in text.splitlines():
        if line.startswith("!["):
            assert (tmp_path / "out" / line.split("(")[1].rstrip(")")).is_file()
    for path in (good, bad, run / "metrics.jsonl", run / "recipe.yaml"):
        assert str(path) in page and str(path) in text
    assert (
        json.loads((tmp_path / "out" / "report.json").read_text())["results"]["sfd, untrained"]["scores"]["fid"]
        == 345.678
    )


def test_results_that_differ_otherwise_are_said_to(tmp_path: Path) -> None:
    paths = [result(tmp_path / "a", 1000, 4.5), result(tmp_path / "b", 1000, 4.4, num_samples=1000, seed=1)]
    loaded = [Results.read(path) for path in paths]
    assert [found.key for found in differences(loaded, ["x", "y"])] == ["samples.num_samples", "samples.seed"]
    page = report(paths, tmp_path / "out").read_text()
    assert "differ in more than the checkpoint" in page and "samples.num_samples" in page
    # Two results of one checkpoint are told apart by their places.
    assert "sfd, step 1,000 (a/results.json)" in page and "sfd, step 1,000 (b/results.json)" in page


def test_curves() -> None:
    rows = [
        {
            "step": step,
            "loss": 2.0 - step / 100,
            "loss/cosine": 0.1,
            "accuracy": 0.5,
            "lr": 1e-3,
            "data_wait_share": 0.1,
        }
        for step in range(50)
    ]
    assert loss_names(rows) == ["loss", "loss/cosine"]
    assert Image.open(io.BytesIO(figures.panel({"": rows}, "loss"))).size[0] > 600
    assert figures.clock_curve(rows) is None
    assert figures.smoothed([1.0, 2.0, 3.0, 4.0]) == [1.5, 2.0, 3.0, 3.5]


def test_curves_of_a_run_of_the_release_before_are_drawn() -> None:
    """Release 0.1 wrote the terms of the loss without the prefix."""
    rows = read_metrics(Path(__file__).parents[1] / "golden" / "release-0.1" / "run")
    terms = ["alignment", "cosine", "velocity", "velocity_semantic", "velocity_texture"]
    assert loss_names(rows) == ["loss", *(f"loss/{term}" for term in terms)]
    assert rows[0]["loss/velocity"] == 2.8842597007751465 and "velocity" not in rows[0]


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none.json: no such file"):
        report([tmp_path / "none.json"], tmp_path / "out")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ValueError, match="not a results.json of this release"):
        report([tmp_path / "x.json"], tmp_path / "out")
    with pytest.raises(ValueError, match="no run folder"):
        report([result(tmp_path / "a", 1, 2.0)], tmp_path / "out", runs=[tmp_path])


def test_results_and_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [result(tmp_path / name / "seed0" / "step-1", 1000, 4.0 + n) for n, name in enumerate("ab")]
    runs = []
    for name in "ab":
        (tmp_path / name / "runs").mkdir()
        runs.append(run_folder(tmp_path / name / "runs" / "seed0"))
    report([*paths, paths[0]], tmp_path / "out", runs=runs)
    data = json.loads((tmp_path / "out/report.json").read_text())
    assert [found["scores"]["fid"] for found in data["results"].values()] == [4.0, 5.0]
    assert len(list((tmp_path / "out/figures").glob("*-loss.png"))) == 2


def test_results_that_were_moved_keep_their_pictures(tmp_path: Path) -> None:
    old = result(tmp_path / "a", 1000, 4.5).parent.rename(tmp_path / "old")
    result(tmp_path / "a", 7, 4.4)  # another run, where the first one was
    recorded = json.loads((old / "results.json").read_text())["run"]["grid"]
    assert find_picture(recorded, old / "results.json") == old / "grid.png"


def test_a_page_shows_no_other_file_than_a_picture(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Results of somebody else may record any path. Its content was in the page."""
    secret = tmp_path / "secret.png"
    secret.write_text("a key")
    own = result(tmp_path / "a", 1000, 4.5)
    data = json.loads(own.read_text())
    data["run"]["grid"] = str(secret)
    own.write_text(json.dumps(data))
    assert find_picture(str(secret), own) is None
    assert f"{own}: its picture {secret} is no PNG file; it is left out" in caplog.text
    assert base64.b64encode(b"a key").decode() not in report([own], tmp_path / "out").read_text()
