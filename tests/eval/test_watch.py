"""A training run and the evaluation of its checkpoints, each once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.images import npz
from eval.recipe import EvalRecipe
from eval.watch import saved_steps, watch
from sfd_scale import checkpoint, config, train
from sfd_scale.data.sources import DigitsConfig, ToyImages
from sfd_scale.recipe import TrainRecipe
from sfd_scale.runs import RunFolder
from sfd_scale.toy.convnet import SmallConvNet, SmallConvNetConfig
from sfd_scale.training.metrics_writer import WandbScores
from tests.helpers.encoded import encode_digits, tokenizer
from tests.helpers.ranks import run_ranks
from tests.sfd_scale.training.test_metrics import read_by_wandb

TRAIN = """
kind: train
name: tiny
latents: {{texture_channels: 6, semantic_channels: 3, size: 8}}
model:
  {{kind: lightningdit, size: null, depth: 1, width: 32, heads: 2, patch_size: 2, num_classes: 10, alignment: null}}
objective: {{kind: semantic_first, alignment_weight: 0.0}}
data: {{path: {folder}/latents, flip: false}}
train: {{steps: 2, global_batch: 8, log_every: 1}}
tokenizer: {{texture: {{kind: patch_pca, weights: {folder}/texture.safetensors}}}}
engine: {{kind: fsdp, precision: fp32}}
checkpoint: {{every: 2, keep_last: 5}}
wandb: {{mode: offline}}
"""
EVAL = """
kind: eval
num_samples: 20
batch: 10
sampler: {{kind: euler, num_steps: 2}}
extractor: {{kind: convnet, weights: {folder}/classifier.safetensors}}
reference: {{kind: npz, path: {folder}/reference.npz}}
cache: {folder}/cache
metrics: {{kid_subsets: 0}}
"""


def prepare(folder: Path) -> None:
    """Latents of digits, a texture codec, a classifier and a reference."""
    encode_digits(folder / "latents", count=40)
    tokenizer().texture.save(folder / "texture.safetensors")  # type: ignore[attr-defined]
    net = SmallConvNet(SmallConvNetConfig())
    net.init_weights(0)
    checkpoint.save_weights(net.state_dict(), folder / "classifier.safetensors", {})
    digits = ToyImages(DigitsConfig(num_images=30))
    images = torch.stack([digits[i][0] for i in range(30)])
    npz.write_images(folder / "reference.npz", [images], 30, (32, 32), torch.zeros(30, dtype=torch.int64))
    (folder / "train.yaml").write_text(TRAIN.format(folder=folder))
    (folder / "eval.yaml").write_text(EVAL.format(folder=folder))


def train_and_watch(folder: Path) -> list[Any]:
    prepare(folder)
    settings, found = config.load(folder / "eval.yaml", EvalRecipe), []
    run, out = folder / "run", folder / "run" / "evaluations"
    for steps in (2, 4):
        recipe = config.load(folder / "train.yaml", TrainRecipe, [f"train.steps={steps}"])
        train.train(recipe, run)
        watch(settings, run, out, interval=0.1)
        times = {file.parent.name: file.stat().st_mtime_ns for file in out.glob("*/results.json")}
        found.append((times, (out / "results.jsonl").read_text()))
    # A run that goes back keeps what it goes back from under another name, and trains the step again.
    whole = run / "checkpoints/step-00000004"
    shutil.copytree(whole, whole.with_name(f"{whole.name}.aside-1"))
    (out / whole.name / "checkpoint").write_text("another one of that step")
    watch(settings, run, out, once=True)
    times = {file.parent.name: file.stat().st_mtime_ns for file in out.glob("*/results.json")}
    return [*found, (times, (out / "results.jsonl").read_text())]


def test_every_checkpoint_is_evaluated_once(tmp_path: Path) -> None:
    first, second, third = run_ranks(train_and_watch, 1, tmp_path, timeout=400.0)[0]
    assert third[0]["step-00000002"] == second[0]["step-00000002"]
    assert third[0]["step-00000004"] > second[0]["step-00000004"]
    assert third[1] == second[1]
    run = RunFolder(tmp_path / "run")
    assert run.checkpoint().path.name == "step-00000004"
    assert list(saved_steps(run)) == [2, 4]
    assert list(first[0]) == ["step-00000002"] and len(second[0]) == 2
    assert second[0]["step-00000002"] == first[0]["step-00000002"]
    rows = [json.loads(line) for line in second[1].splitlines()]
    assert [row["step"] for row in rows] == [2, 4] and rows[0]["fid"] != rows[1]["fid"]
    assert second[1].startswith(first[1])
    # Each score is once in the W&B run of the training. Equal weights have the same export, samples and id of scores:
    # the step that was evaluated again gives what W&B has.
    files = sorted((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))
    records = [record for file in files for record in read_by_wandb(file)]
    identity = (tmp_path / "run" / "wandb_run_id").read_text().strip()
    assert {record["run"]["run_id"] for record in records if record["type"] == "run"} == {identity}
    logged = [record["history"]["item"] for record in records if record["type"] == "history"]
    scores = [(row["eval/step"], row["eval/fid"]) for row in logged if "eval/fid" in row]
    assert scores == [(row["step"], pytest.approx(row["fid"])) for row in rows]
    assert not WandbScores(run).pending()
    # One table is of one recipe.
    other = config.load(tmp_path / "eval.yaml", EvalRecipe, ["seed=1"])
    with pytest.raises(ValueError, match=r"its scores are of another recipe \(seed differ\)"):
        watch(other, tmp_path / "run", tmp_path / "run" / "evaluations", once=True)
    # The weights are in the run; the evaluation keeps no copies.
    assert not list((tmp_path / "run" / "evaluations").rglob("model.safetensors"))


def test_a_run_that_saves_nothing_more_is_not_watched_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFD_WATCH_TIMEOUT", "1")
    for name, text in (("train", TRAIN), ("eval", EVAL)):
        (tmp_path / f"{name}.yaml").write_text(text.format(folder=tmp_path))
    recipe = config.load(tmp_path / "train.yaml", TrainRecipe)
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(config.to_yaml(recipe))
    with pytest.raises(TimeoutError, match=rf"{run}: no new checkpoint for 1 s, and no process trains in it; start"):
        watch(config.load(tmp_path / "eval.yaml", EvalRecipe), run, interval=0.1)
