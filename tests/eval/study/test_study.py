"""A study: baselines of equal size, and a grid that is killed and goes on."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from eval.features.config import RegisteredConfig, TimmExtractorConfig
from eval.study import study
from eval.study.recipe import StudyRecipe
from sfd_scale import config
from sfd_scale.data.sources import ThingsConfig
from sfd_scale.recipe import EncodeRecipe, TrainRecipe
from sfd_scale.tokenizers.vision_encoder import TimmEncoderConfig
from tests.helpers import small_run


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
