"""The page about runs, looked at in a browser; and what a recipe changes of those that it extends."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eval import run_report
from eval.pages import figures
from sfd_scale import config
from sfd_scale.recipe import TrainRecipe
from tests.eval.test_report import result
from tests.helpers.browser import browser, overflow

MEASURE = """<script>addEventListener("load", () => { const out = document.createElement("pre"); out.id = "measured";
out.textContent = JSON.stringify([...document.images].map(i => { const b = i.getBoundingClientRect(); return {
width: i.naturalWidth, kind: i.parentElement.className, alt: i.alt, box: [b.left, b.top, b.right, b.bottom] } }));
document.body.append(out) })</script></body>"""


def run_folder(path: Path, overrides: list[str], scale: float) -> Path:
    """A run as it is left behind: recipe, metrics with a step that was not finite, two evaluations."""
    path.mkdir(parents=True)
    recipe = config.load("quickstart/sfd", TrainRecipe, overrides)
    (path / "recipe.yaml").write_text(config.with_source(config.to_yaml(recipe), "quickstart/sfd"))
    (path / "environment.json").write_text(json.dumps({"python": "3.11", "packages": {"torch": "2"}}))
    lines = []
    for step in range(10, 1010, 10):
        loss = scale * (1 + math.exp(-step / 200) + 0.05 * math.sin(step))
        row: dict[str, Any] = {"step": step, "loss": loss, "velocity": 0.6 * loss, "cosine": 0.4 * loss, "lr": 1e-3}
        row |= {f"loss_by_clock/{i}": loss * (1 + i / 10) for i in range(10)}
        row |= {
            "grad_norm": math.inf if step == 500 else 0.5,
            "samples_per_s": 90.0 * scale,
            "mfu": 0.4,
            "skipped_steps": 1,
        }
        lines.append(json.dumps(row))
    (path / "metrics.jsonl").write_text("\n".join(lines))
    for step in (500, 1000):
        result(path / "evaluations" / f"step-{step:08d}", step, scale * 1e3 / step)
    return path


def coloured(pixels: np.ndarray[Any, Any], colour: str) -> int:
    """How many pixels are near a colour."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(pixels.astype(int) - wanted).max(-1) < 40).sum())


def test_a_browser_shows_every_figure_of_both_runs(tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / "first", [], 1.0), run_folder(tmp_path / "second", ["optimizer.lr=1e-3"], 1.3)]
    page = run_report.write(runs, tmp_path / "report.html", "Two runs")
    text = page.read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", text)  # nothing is loaded from elsewhere
    look = tmp_path / "look.html"
    look.write_text(text.replace("</body>", MEASURE))
    dom = browser(look, "--virtual-time-budget=5000", "--dump-dom")
    measured = json.loads(re.search(r'<pre id="measured">(.*?)</pre>', dom, re.DOTALL)[1])  # type: ignore[index]
    kinds = [image["kind"].split()[0] for image in measured]
    # Losses, health, clock, scores; two steps and the real images for each run.
    assert kinds.count("curves") > 8 and kinds == ["curves"] * (len(kinds) - 6) + ["samples"] * 6
    assert all(image["width"] > 0 for image in measured)
    shot = tmp_path / "shot.png"
    browser(look, "--virtual-time-budget=5000", f"--screenshot={shot}")
    pixels = np.asarray(Image.open(shot).convert("RGB"))
    for image in measured:
        left, top, right, bottom = map(int, image["box"])
        cut = pixels[top:bottom, left:right]
        assert cut.size and cut.std() > 1, f"{image['alt']} is blank"
        if image["alt"].startswith(("Losses:", "Loss by clock:", "Scores over steps: FID")):
            for colour in figures.COLOURS[:2]:  # a line of each run
                assert coloured(cut, colour) > 100, f"{image['alt']} lacks {colour}"
            assert coloured(cut, figures.COLOURS[2]) == 0


@pytest.mark.parametrize("width", [400, 1440])
def test_nothing_reaches_beyond_the_window(tmp_path: Path, width: int) -> None:
    runs = [run_folder(tmp_path / "first", [], 1.0), run_folder(tmp_path / "second", ["optimizer.lr=1e-3"], 1.3)]
    found = overflow(run_report.write(runs, tmp_path / "report.html", "Two runs"), width)
    assert found == {"width": width, "window": width, "beyond": []}


def test_results_beside_the_run_are_those_of_its_weights(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", [], 1.0)
    own = config.digest(config.load(run / "recipe.yaml", TrainRecipe))
    for name, digest in (("samples", own), ("samples_other", "another")):
        file = result(tmp_path / name, 1000, 3.21)
        data = json.loads(file.read_text())
        data["samples"]["checkpoint"]["recipe_digest"] = digest
        file.write_text(json.dumps(data))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/results.json").write_text("{")
    found = [file.parent.name for file, _ in run_report.read_run(run, "run").results]
    assert found == ["step-00000500", "step-00001000", "samples"]


def test_the_page_says_what_a_recipe_changes(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", ["optimizer.lr=1e-3", "train.micro_batch=8"], 1.0)
    page = run_report.write([run])
    assert page == run / "report.html"
    text = re.sub(r"</?code>", "", page.read_text())
    for key, inherited, value, by in (
        ("optimizer.lr", "0.002", "0.001", "the command line"),
        ("train.micro_batch", "None", "8", "the command line"),
        ("model.width", "–", "128", "quickstart/sfd"),
    ):
        cells = f'<td>{key}</td><td class="left wrap">{inherited}</td><td class="left wrap">{value}</td>'
        assert f'{cells}<td class="left">{by}</td>' in text
    assert "<p>run: quickstart/sfd, which extends base, tokenizer.</p>" in text
    # What is inherited unchanged is no difference.
    assert '<td>ema.decay</td><td class="left wrap">0.999</td><td class="left wrap">' not in text
    assert "1.00 at 1,000" in text  # the best FID and its step


def test_runs_are_told_apart_and_bad_folders_are_named(tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / name / "sfd", [], 1.0) for name in ("a", "b")]
    text = run_report.write(runs, tmp_path / "r.html").read_text()
    assert "a/sfd" in text and "b/sfd" in text
    with pytest.raises(ValueError, match="no run folder"):
        run_report.write([tmp_path])
    (runs[0] / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="nothing was logged yet"):
        run_report.write(runs)


def test_smoothing_leaves_out_what_is_not_finite() -> None:
    assert figures.smoothed([1.0, math.nan, 3.0, math.inf]) == [1.0, 2.0, 3.0, 3.0]
