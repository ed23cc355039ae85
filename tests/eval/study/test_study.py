"""The study: its scenes, its pretext task, its aligned codec, its baselines, and a grid that is killed and goes on."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch import Tensor

from eval.features.config import RegisteredConfig, TimmExtractorConfig
from eval.metrics.scores import Scores
from eval.pages import figures
from eval.results import ScoreRow
from eval.study import report as study_report
from eval.study import study
from eval.study.recipe import StudyRecipe
from eval.work.processes import run_in_parallel
from sfd_scale import config
from sfd_scale.data.batches import ImageBatch
from sfd_scale.data.sources import ThingsConfig
from sfd_scale.recipe import EncodeRecipe, FitRecipe, TrainRecipe
from sfd_scale.tokenizers.pca import CovarianceAccumulator
from sfd_scale.tokenizers.vision_encoder import TimmEncoderConfig
from sfd_scale.toy import scenes
from sfd_scale.toy.scenes import SceneSplit, scene_digits, scene_image
from sfd_scale.training.classification import ClassificationConfig, ClassificationObjective
from tests.helpers import small_run

SPLITS: tuple[SceneSplit, ...] = ("train", "reference", "classifier")


def test_a_scene_is_a_function_of_seed_split_and_index() -> None:
    again = [scene_image(0, "train", index) for index in (7, 3, 7)]
    assert torch.equal(again[0][0], again[2][0]) and (again[0][1], again[1][1]) == (7, 3)
    assert again[0][0].shape == (3, 64, 64) and again[0][0].dtype == torch.uint8
    others = [scene_image(1, "train", 7), scene_image(0, "reference", 7), scene_image(0, "train", 17)]
    assert all(not torch.equal(again[0][0], other) for other, _ in others)
    head = hashlib.sha256(again[0][0].numpy().tobytes()).hexdigest()
    state = torch.random.get_rng_state()
    assert hashlib.sha256(scene_image(0, "train", 7)[0].numpy().tobytes()).hexdigest() == head
    assert torch.equal(torch.random.get_rng_state(), state)


def test_splits_of_scenes_share_no_digit() -> None:
    def digests(split: SceneSplit) -> set[bytes]:
        return {hashlib.sha256(d.numpy().tobytes()).digest() for own in scene_digits(split) for d in own}

    train, reference, classifier = map(digests, SPLITS)
    assert not train & reference and not train & classifier and not reference & classifier
    assert sum(len(own) for split in SPLITS for own in scene_digits(split)) == 1797


def test_the_class_is_the_digit_that_stands_there_most_often(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    inner = scenes._placed
    monkeypatch.setattr(scenes, "_placed", lambda split, shown, *rest: seen.append(shown) or inner(split, shown, *rest))
    labels = [scene_image(0, "train", index)[1] for index in range(60)]
    for label, shown in zip(labels, seen, strict=True):
        (first, most), *rest = Counter(shown).most_common()
        assert first == label and most > max(count for _, count in rest) and 3 <= len(shown) <= 5
    assert Counter(labels) == dict.fromkeys(range(10), 6)
    scene_image(0, "classifier", 3)
    assert set(seen[-1]) == {3}


# ------------------------------------------------------------------------------------------ pretext task


def batch_of(count: int) -> ImageBatch:
    images = torch.arange(count * 3 * 16).remainder(251).to(torch.uint8).view(count, 3, 4, 4)
    keys = torch.stack([torch.zeros(count, dtype=torch.int64), torch.arange(count)], 1)
    return ImageBatch(images, torch.full((count,), 9), keys)


def test_rotation_asks_for_the_turn_and_not_for_the_class() -> None:
    batch = batch_of(60)
    pretext = ClassificationObjective(ClassificationConfig(pretext="rotation", label_smoothing=0.0), seed=0)
    images, turns = pretext.rotate(batch.images, batch.keys)
    assert set(turns.tolist()) == {0, 1, 2, 3}
    back = torch.stack([image.rot90(-int(turn), (1, 2)) for image, turn in zip(images, turns, strict=True)])
    assert torch.equal(back, batch.images)
    part = batch.slice(7, 20)
    assert torch.equal(pretext.rotate(part.images, part.keys)[0], images[7:20]), "a draw belongs to its sample"

    def model(seen: Tensor) -> SimpleNamespace:
        assert torch.equal(seen, images)
        return SimpleNamespace(logits=30.0 * torch.nn.functional.one_hot(turns, 4))

    found = pretext(model, batch)
    assert found.measures["accuracy"] == 1 and found.total < 1e-6


def test_rotation_has_four_classes() -> None:
    assert config.load("study/vision", TrainRecipe).model.num_classes == 4
    with pytest.raises(ValueError, match="num_classes: 10; allowed: 4 with objective.pretext rotation"):
        config.load("study/vision", TrainRecipe, ["model.num_classes=10"])


# ----------------------------------------------------------------------------------------- aligned codec


def test_aligned_codes_are_the_best_that_descent_finds() -> None:
    """Against minimising ‖x − D·E·x‖² + w·‖f − A·E·x‖² over all three matrices, from several starts."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=generator, dtype=torch.float64) * torch.tensor([3.0, 2, 1.5, 1, 0.6, 0.4])
    f = x @ torch.randn(6, 3, generator=generator, dtype=torch.float64) * torch.tensor([0.1, 0.1, 2.0])
    f[:, 2] += 4 * x[:, 5]  # what pixels hardly show
    f += 0.3 * torch.randn(400, 3, generator=generator, dtype=torch.float64)
    x, f = x - x.mean(0), f - f.mean(0)
    total = CovarianceAccumulator.of(torch.cat([x, f], 1))
    weight = 0.7 * x.square().mean(0).sum() / f.square().mean(0).sum()

    def loss(e: Tensor, d: Tensor, a: Tensor) -> Tensor:
        z = x @ e.T
        return (x - z @ d).square().sum(1).mean() + weight * (f - z @ a).square().sum(1).mean()

    def of(encoder: Tensor) -> float:
        z = x @ encoder.T
        return float(loss(encoder, torch.linalg.lstsq(z, x).solution, torch.linalg.lstsq(z, f).solution))

    found = total.aligned(2, 6, 0.7)
    assert found.restoring is not None
    best = float("inf")
    for start in range(4):
        begin = torch.Generator().manual_seed(start)
        parts = [
            torch.randn(*s, generator=begin, dtype=torch.float64, requires_grad=True) for s in ((2, 6), (2, 6), (2, 3))
        ]
        optimizer = torch.optim.LBFGS(
            parts, lr=0.5, max_iter=400, tolerance_change=1e-14, line_search_fn="strong_wolfe"
        )

        def closure(parts: list[Tensor] = parts, optimizer: torch.optim.LBFGS = optimizer) -> Tensor:
            optimizer.zero_grad()
            value = loss(*parts)
            value.backward()
            return value

        optimizer.step(closure)
        best = min(best, float(loss(*parts).detach()))
    ours = of(found.directions.double())
    assert ours == pytest.approx(best, rel=1e-6)
    # Its own decoder is the best for its codes, and components of pixels alone are worse codes.
    z = x @ found.directions.double().T
    assert (torch.linalg.lstsq(z, x).solution - found.restoring.double()).abs().max() < 1e-5
    assert of(CovarianceAccumulator.of(x).components(2).directions.double()) > 1.02 * ours


def test_alignment_needs_features() -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.vision: null; codec\.alignment above 0 needs a vision encoder"):
        config.load("study/texture", FitRecipe, ["codec.alignment=1.0"])


# --------------------------------------------------------------------------------------------- baselines


def parameters(name: str) -> int:
    recipe = config.load(f"study/{name}", TrainRecipe)
    with torch.device("meta"):
        model = recipe.task.make_model()
    return sum(p.numel() for n, p in model.named_parameters() if not n.startswith("repa_projector"))


def test_baselines_have_as_many_parameters_steps_and_the_same_optimizer() -> None:
    names = ("lightningdit", "dit", "repa", "sfd", "redi", "vavae", "vavae_first")
    counts = {name: parameters(name) for name in names}
    assert all(abs(count / counts["lightningdit"] - 1) < 0.02 for count in counts.values()), counts
    recipes = [config.load(f"study/{name}", TrainRecipe) for name in names]
    for part in ("train", "optimizer", "lr", "ema", "engine", "checkpoint", "seed"):
        assert len({config.digest(getattr(recipe, part)) for recipe in recipes}) == 1, part
    tokens = {(r.latents.size // r.model.patch_size) ** 2 for r in recipes}  # type: ignore[union-attr]
    assert tokens == {64}


def test_the_judge_of_the_things_sees_other_pictures_than_the_models_and_is_another_network_than_the_teacher() -> None:
    made = study.Study(config.load("study/things/small", StudyRecipe))
    images, reference = (config.load(f"study/things/{name}", EncodeRecipe).source for name in ("images", "reference"))
    assert isinstance(images, ThingsConfig) and isinstance(reference, ThingsConfig)
    assert (images.split, images.num_images) == ("train", 4000)
    assert (reference.split, reference.num_images) == ("reference", 2000)
    vision = made.cell("sfd", 0).tokenizer.vision
    assert isinstance(vision, TimmEncoderConfig) and isinstance(made.evaluation.extractor, TimmExtractorConfig)
    assert (vision.model, made.evaluation.extractor.model) == ("tf_efficientnet_lite0", "tf_efficientnet_lite1")
    # Nothing that the former study learnt on its scenes is used.
    needed = {step.key for step in made.select([])}
    assert not needed & {"prepare/vision", "prepare/classifier", "prepare/classifier_images"}


# ------------------------------------------------------------------------------------------------- a grid


GRID = """
kind: study
name: tiny
extends: study/grid
out: {out}
prepare:
  images: study/images source.num_images=32 store.chunk=32
  reference: study/reference source.num_images=20
  classifier_images: study/classifier_images source.num_images=32
  vision: study/vision model.widths=[8,8,8] train.steps=2 train.global_batch=8
  classifier: study/classifier model.widths=[8,8,8] train.steps=2 train.global_batch=8
  reference_latents: study/latents_texture source.path=runs/study/reference out=runs/study/reference_latents
cell_settings: model.depth=2 model.width=16 model.heads=2 train.steps=4 train.global_batch=8 checkpoint.every=2
evaluation: study/eval num_samples=20 batch=10 sampler.num_steps=2
seeds: [0]
sweeps: {{autoguidance: {{cell: dit, guide_step: 2, grid: "guidance.kind=autoguidance guidance.scale_texture=1.5,2"}}}}
lead_losses: {{cells: [lightningdit], latents: runs/study/reference_latents, loss_pictures: 8, sampled_pictures: 12}}
"""
KILLED = """
import os, signal, sys
from sfd_scale import config
from eval.study import study
from eval.study.recipe import StudyRecipe
from sfd_scale.checkpoint import CheckpointManager
save = CheckpointManager.save
def then_die(self, step, *args):
    save(self, step, *args)
    if step == 2 and "/dit/" in str(self.folder):
        self.wait()
        os.kill(os.getpid(), signal.SIGKILL)
CheckpointManager.save = then_die
study.run(study.Study(config.load(sys.argv[1], StudyRecipe)), ["lightningdit", "dit"])
"""


def test_a_grid_that_was_killed_ends_with_the_results_of_one_that_was_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sfd_scale.training.trainer")  # "resumed from ..."
    file, out = tmp_path / "tiny.yaml", tmp_path / "out"
    file.write_text(GRID.format(out=out))
    recipe = config.load(file, StudyRecipe)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(file)], capture_output=True, timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    done = study.Study(recipe)
    steps = {key for key, step in done.steps.items() if done.done(step)}
    assert "cells/lightningdit/seed0" in steps and "cells/dit/seed0" not in steps
    assert (out / "cells/dit/seed0/checkpoints").is_dir() and "prepare/semvae" not in steps
    # Only now the second cell, from its checkpoint; the first is not touched.
    first = {path: path.stat().st_mtime_ns for path in (out / "cells/lightningdit").rglob("*") if path.is_file()}
    assert study.run(done, ["lightningdit", "dit", "autoguidance"])
    assert first == {path: path.stat().st_mtime_ns for path in first}
    assert "cells/dit/seed0/checkpoints/step-00000002" in caplog.text
    resumed, missing = study.results(done)
    weights = [small_run.weights(out / "cells/dit/seed0", step) for step in (2, 4)]
    assert len(missing) == 11 and len(resumed) == 4
    sweep = json.loads((out / "sweeps/autoguidance/sweep.json").read_text())
    assert len(sweep["done"]) == 2
    # The same cell undisturbed.
    (out / "cells/dit").rename(tmp_path / "set_aside")
    (out / "steps/cells.dit.seed0.json").unlink()
    started = time.monotonic()
    assert study.run(done, ["dit/seed0"])
    again = [small_run.weights(out / "cells/dit/seed0", step) for step in (2, 4)]
    assert all(map(small_run.same, again, weights))
    # A checkpoint also notes the losses that its own process saw: the file's hash, and `id` with it, is another.
    known = [row.as_json() | {"id": None} for row in resumed]
    assert [row.as_json() | {"id": None} for row in study.results(done)[0]] == known
    assert study.run(done, ["dit/seed0"]) and time.monotonic() - started < 120
    assert study.report(done) == missing and (out / "report/convergence.png").is_file()
    losses = json.loads((out / "lead/lightningdit.json").read_text())
    assert len(losses["losses"]["own"]) == 9 and losses["fid"].keys() == {"own", "pictures"}
    assert "| lightningdit | own |" in (out / "report/report.md").read_text()
    with pytest.raises(ValueError, match="cells/dit/seed0 was made with other settings"):
        other = file.read_text().replace("train.steps=4", "train.steps=6")
        file.write_text(other)
        study.run(study.Study(config.load(file, StudyRecipe)), ["dit"])
    with pytest.raises(ValueError, match="--only: nothing matches none of"):
        study.run(done, ["nothing"])


def stamped(file: Path, *overrides: str) -> study.Study:
    """A study whose every step looks done, by the settings of `file`."""
    made = study.Study(config.load(file, StudyRecipe))
    for step in made.steps.values():
        for path in (made.stamp(step), *step.outputs):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        made.stamp(step).write_text(json.dumps(made.record(step)))
    return study.Study(config.load(file, StudyRecipe, overrides))


def test_what_was_made_of_other_data_is_refused_with_all_that_is_to_go(tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(GRID.format(out=tmp_path / "out"))
    assert not (same := stamped(file)).missing(same.select(["sfd"]))
    other = stamped(file, "prepare.classifier='study/classifier model.widths=[8,8,8] train.steps=3'")
    with pytest.raises(ValueError, match="made with other settings") as told:
        other.missing(other.select([]))
    first, *rest = str(told.value).splitlines()
    assert first.startswith("prepare/classifier was made with other settings")
    assert first.endswith(f"{tmp_path}/out/classifier.safetensors {tmp_path}/out/classifier")
    # The score of every cell, and the sweep of one.
    assert len(rest) == 13 + 1 + 1 + 1  # `interval` of study/grid too, and the losses of one cell
    assert all("was made from another" in line for line in rest)
    # A report says so of these, and does not fail for a cell that nobody asked for.
    assert study.report(other) == [f"{key.removeprefix('cells/')} (made with other settings)" for key in other.steps
                                   if key.startswith("cells/")]  # fmt: skip
    # A cell alone: its sweep is of the cell.
    one = stamped(file, "cells.dit='study/dit lr.warmup_steps=1'")
    with pytest.raises(ValueError, match="sweeps/autoguidance was made from another cells/dit/seed0"):
        one.missing(one.select([]))
    # What changes no result.
    free = stamped(
        file, "prepare.images='study/images source.num_images=32 store.chunk=32 store.num_workers=1'",
        "cell_settings='model.depth=2 model.width=16 model.heads=2 train.steps=4 train.global_batch=8"
        " checkpoint.every=2 train.log_every=1'",
    )  # fmt: skip
    assert not free.missing(free.select([]))
    # A registered extractor is what its name says.
    named = [
        config.settings_affecting_results(RegisteredConfig(name=name, pooled="2048"))
        for name in ("vgg16", "clip-vit-b-32")
    ]
    assert named[0] != named[1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prepare.images=study/eval", r"prepare\.images: kind eval; allowed: encode, fit, train"),
        ("cells.sfd=''", r"cells\.sfd: ''; allowed: a recipe, then settings of it"),
    ],
)
def test_steps_are_recipes_that_prepare(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        study.Study(config.load("study/small", StudyRecipe, [override, f"out={tmp_path}"]))


SLOW = """
import os, signal, sys, time
place = sys.argv[1]
slow = True
try:
    os.close(os.open(place + "/fast", os.O_CREAT | os.O_EXCL))
    slow = False
except FileExistsError:
    pass
signals = []
signal.signal(signal.SIGTERM, lambda *_: signals.append(time.monotonic()))
open(place + f"/ready{int(slow)}", "w").close()
while not signals:
    time.sleep(0.05)
if not slow:
    sys.exit(75)
time.sleep(2.5)  # a save that takes long
open(place + "/saved", "w").write(str(len(signals)))
sys.exit(75)
"""


def test_a_stop_is_passed_on_once_and_waits_for_every_save(tmp_path: Path) -> None:
    parent = (
        "import sys; from eval.work.processes import run_in_parallel\n"
        "sys.exit(run_in_parallel([sys.executable, '-c', sys.argv[1], sys.argv[2]], 2))"
    )
    beside = subprocess.Popen([sys.executable, "-c", parent, SLOW, str(tmp_path)])
    while not all((tmp_path / f"ready{n}").exists() for n in (0, 1)):
        assert beside.poll() is None
        time.sleep(0.05)
    beside.send_signal(signal.SIGTERM)
    assert beside.wait(timeout=60) == 75
    assert (tmp_path / "saved").read_text() == "1"


def test_a_process_that_does_not_stop_is_killed_after_the_limit(tmp_path: Path) -> None:
    deaf = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "open(f'{sys.argv[1]}/up{os.getpid()}', 'w').close()\n"
        "time.sleep(100)"
    )
    parent = (
        "import sys; from eval.work.processes import run_in_parallel\n"
        "sys.exit(run_in_parallel([sys.executable, '-c', sys.argv[1], sys.argv[2]], 2))"
    )
    beside = subprocess.Popen(
        [sys.executable, "-c", parent, deaf, str(tmp_path)], env={**os.environ, "SHUTDOWN_TIMEOUT": "1"}
    )
    while len(found := list(tmp_path.glob("up*"))) < 2:
        assert beside.poll() is None
        time.sleep(0.05)
    beside.send_signal(signal.SIGTERM)
    assert beside.wait(timeout=60) == 75
    assert not any(psutil.pid_exists(int(file.name.removeprefix("up"))) for file in found)


def test_a_worker_that_fails_ends_the_others_with_its_exit_code(tmp_path: Path) -> None:
    code = (
        "import os, sys, time\n"
        "try: os.close(os.open(sys.argv[1] + '/first', os.O_CREAT | os.O_EXCL))\n"
        "except FileExistsError: sys.exit(3)\n"
        "time.sleep(100)"
    )
    started = time.monotonic()
    assert run_in_parallel([sys.executable, "-c", code, str(tmp_path)], 2) == 3
    assert time.monotonic() - started < 60


def scored(
    cell: str, seed: int, step: int, fid: float, delta_t: float = 0.0, precision: float | None = None
) -> study_report.Row:
    scores = Scores(fid=fid, precision=precision)
    row = ScoreRow(step=step, scores=scores, count=8, nfe=1.0, name="eval", id=f"{cell}{seed}{step}")
    return study_report.Row(cell, seed, delta_t, row)


def test_spreads_and_differences_are_over_the_seeds_that_are_there() -> None:
    fids = {("a", 0): 3.0, ("a", 1): 5.0, ("a", 2): 4.0, ("b", 0): 2.0, ("b", 1): 3.0}
    rows = [
        scored(cell, seed, step, fid + (10 if step == 1 else 0), delta_t=0.1)
        for (cell, seed), fid in fids.items()
        for step in (1, 2)
    ]
    assert str(study_report.spread(list(study_report.scores(rows, "a").values()))) == "4 ± 1 (3 seeds)"
    change = study_report.difference(rows, "a", "b")
    assert change is not None and change.count == 2 and change.mean == pytest.approx(-1.5)
    assert study_report.convergence(rows, ["b", "absent"]) == {"b": [(1.0, [12.0, 13.0]), (2.0, [2.0, 3.0])]}
    assert study_report.lead_curve(rows, ["a"]) == [(0.1, [3.0, 5.0, 4.0])]
    assert study_report.difference(rows, "a", "absent") is None


def test_samples_of_cells_stand_side_by_side(tmp_path: Path) -> None:
    images = {"dit": Image.new("RGB", (20, 30), (255, 0, 0)), "sfd": Image.new("RGB", (10, 30), (0, 0, 255))}
    for name, image in images.items():
        image.save(tmp_path / f"{name}.png")
    page = Image.open(io.BytesIO(figures.side_by_side({name: tmp_path / f"{name}.png" for name in images})))
    pixels = np.asarray(page.convert("RGB"))
    assert page.width == 20 + 12 + 10
    assert (pixels[-30:, :20] == (255, 0, 0)).all() and (pixels[-30:, -10:] == (0, 0, 255)).all()
    assert (pixels[-30:, 20:-10] == 255).all() and (pixels[:-30] != 255).any()


def test_a_report_without_the_scores_that_an_evaluation_does_not_have(tmp_path: Path) -> None:
    rows = [scored("a", seed, 2, 3.0, precision=0.5 if seed == 0 else None) for seed in (0, 1)]
    recipe = StudyRecipe(
        name="x", root=tmp_path, out=tmp_path, prepare={}, cells={"a": "study/dit"}, evaluation="study/eval",
        convergence=("a",), lead=("a",), ablation=("a",),
    )  # fmt: skip
    text = study_report.write(recipe, rows, []).read_text()
    assert "| cell | FID | minus the row above, same seeds | Precision |\n" in text
    assert "| a | 3 ± 0 (2 seeds) | – | 0.5 (1 seed) |\n" in text and "Other methods" not in text
