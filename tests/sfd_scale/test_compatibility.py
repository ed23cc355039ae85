"""Whose checkpoints a run goes on from: its own, those of an older release, and another recipe's only when told."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sfd_scale import official, runs, train
from sfd_scale.checkpoint.official_checkpoint import read_official
from sfd_scale.engines.optim import AdamWConfig
from sfd_scale.tokenizers.patch_pca import PatchPCA, PatchPCAFitConfig
from tests.helpers import small_run
from tests.helpers.encoded import tokenizer

HALF, ALL = 4, 8
MUON: dict[str, Any] = {"kind": "muon", "lr": 0.01, "adamw": {"lr": 0.01}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.encode(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def half(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of half the steps."""
    run = tmp_path_factory.mktemp("runs") / "half"
    # The learning rate is constant: how many steps there are decides nothing.
    assert train.train(small_run.recipe(data, steps=HALF, every=HALF), run)
    return run


def rewrite(run: Path, state: Callable[[dict[str, Any]], None], recipe: Callable[[dict[str, Any]], None]) -> None:
    """Change what the last checkpoint and recipe.yaml record, as if it had been written so."""
    folder = run / "checkpoints" / f"step-{HALF:08d}"
    stored = json.loads((folder / "state.json").read_text())
    state(stored)
    recipe(stored["recipe"])
    text = json.dumps(stored).encode()
    (folder / "state.json").write_bytes(text)
    sums = json.loads((folder / "checksums.json").read_text())
    sums["state.json"] = {"sha256": hashlib.sha256(text).hexdigest(), "bytes": len(text)}
    (folder / "checksums.json").write_text(json.dumps(sums))
    (folder / "COMMIT").write_text(hashlib.sha256((folder / "checksums.json").read_bytes()).hexdigest())
    settings = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe(settings)
    (run / "recipe.yaml").write_text(yaml.safe_dump(settings))


def forget(recipe: dict[str, Any]) -> None:
    """Fields that a release did not know yet: of a member of a union, of a plain part, and a whole part."""
    del recipe["model"]["rope"], recipe["objective"]["cosine_weight"], recipe["optimizer"]["betas"], recipe["ema"]
    recipe.pop("grad_clip", None)


def nothing(_: dict[str, Any]) -> None:
    pass


def test_a_run_of_an_older_release_goes_on_as_if_it_were_new(data: Path, half: Path, tmp_path: Path) -> None:
    new, old = (Path(shutil.copytree(half, tmp_path / name)) for name in ("new", "old"))
    rewrite(old, lambda state: state.pop("divergence"), forget)
    for run in (new, old):
        assert train.train(small_run.recipe(data, steps=ALL), run)
    assert small_run.same(small_run.weights(new, ALL), small_run.weights(old, ALL))
    steps = [row["step"] for row in small_run.lines(old / "metrics.jsonl")]
    assert steps == list(range(1, ALL + 1)), "it went on, and did not begin anew"


def test_what_was_not_the_default_then_still_differs(data: Path, half: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(half, tmp_path / "run"))
    rewrite(run, nothing, forget)
    changed = small_run.recipe(data, steps=ALL, ema={"decay": 0.5})
    with pytest.raises(ValueError, match=r"another recipe \(recipe\.ema\.decay: 0\.5, in the checkpoint 0\.9999\)"):
        train.train(changed, run)


def test_other_steps_are_another_recipe_where_the_learning_rate_falls(data: Path, tmp_path: Path) -> None:
    """With wsd they are not, as long as the rate is constant under both."""
    falling = {"lr": {"kind": "cosine"}}
    assert train.train(small_run.recipe(data, steps=HALF, every=HALF, **falling), tmp_path / "cosine")
    with pytest.raises(ValueError, match=rf"\(recipe\.steps: {ALL}, in the checkpoint {HALF}\)"):
        train.train(small_run.recipe(data, steps=ALL, **falling), tmp_path / "cosine")
    run = runs.RunFolder(tmp_path / "cosine")
    for steps in (ALL + 4, ALL + 8):
        recipe = small_run.recipe(data, steps=steps, every=1, lr={"kind": "wsd", "decay_steps": 2})
        runs.begin(run, recipe, None, {}, allow_foreign=True)
    written = yaml.safe_load(run.recipe_file.read_text())
    assert written["train"]["steps"] == ALL + 8
    runs.begin(run, small_run.recipe(data, steps=ALL, lr=written["lr"]), None, {}, allow_foreign=False)
    with pytest.raises(ValueError, match=r"recipe\.steps: 5, in the checkpoint 8"):
        runs.begin(run, small_run.recipe(data, steps=5, lr=written["lr"]), None, {}, allow_foreign=False)


def test_another_clipping_is_another_recipe(data: Path, half: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(half, tmp_path / "run"))
    clipped = small_run.recipe(data, steps=ALL, engine={"kind": "fsdp", "precision": "fp32", "grad_clip": 0.5})
    with pytest.raises(ValueError, match=r"recipe\.grad_clip: 0\.5, in the checkpoint"):
        train.train(clipped, run)


def test_a_stop_that_comes_with_the_last_step_is_a_stop(data: Path, tmp_path: Path) -> None:
    """Whoever asked gets the exit code of a stop; the next start has nothing left to do."""
    recipe, run = small_run.recipe(data, steps=1), tmp_path / "run"
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        assert not train.train(replace(recipe, train=replace(recipe.train, max_duration_s=0.0)), run)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert train.train(recipe, run) and len(small_run.lines(run / "metrics.jsonl")) == 1


def test_another_texture_codec_is_told_before_training_and_not_after(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Training itself needs none, so that it may be absent; but samples will be decoded by it."""
    own, other = tmp_path / "own.safetensors", tmp_path / "other.safetensors"
    codec = tokenizer().texture
    assert isinstance(codec, PatchPCA)
    codec.save(own)
    codec.fit([torch.rand(8, 3, 32, 32) * 255], PatchPCAFitConfig(patch=4, channels=6)).save(other)
    named = [{"tokenizer": {"texture": {"kind": "patch_pca", "weights": str(path)}}} for path in (own, other)]
    train.train(small_run.recipe(data, steps=1, **named[0]), tmp_path / "right")
    assert "tokenizer.texture" not in caplog.text
    with pytest.raises(ValueError, match=r"tokenizer\.texture: patch_pca:.*, but the data was encoded with patch_pca:"):
        train.train(small_run.recipe(data, steps=1, **named[1]), tmp_path / "wrong")
    assert not (tmp_path / "wrong" / "recipe.yaml").exists()
    other.unlink()
    train.train(small_run.recipe(data, steps=1, **named[1]), tmp_path / "absent")
    assert "tokenizer.texture.weights: " in caplog.text and "is not here" in caplog.text


def test_a_setting_that_is_no_more_is_named(
    data: Path, half: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Path(shutil.copytree(half, tmp_path / "run"))
    rewrite(run, nothing, lambda recipe: recipe["model"].update(gate="tanh"))
    recipe = small_run.recipe(data, steps=ALL)
    with pytest.raises(ValueError, match=r"\(recipe\.model\.gate: None, in the checkpoint 'tanh'\)"):
        train.train(recipe, run)
    assert train.train(recipe, run, allow_foreign=True)
    assert "goes on under another recipe: recipe.model.gate: None, in the checkpoint 'tanh'" in caplog.text


def test_adamw_and_muon_refuse_the_state_of_each_other(data: Path, half: Path, tmp_path: Path) -> None:
    muon = small_run.recipe(data, steps=2, every=1, optimizer=MUON)
    train.train(muon, tmp_path / "muon")
    adamw = replace(muon, optimizer=AdamWConfig(lr=0.01))
    for recipe, run in ((adamw, tmp_path / "muon"), (small_run.recipe(data, optimizer=MUON), half)):
        other = {"muon": "adamw", "adamw": "muon"}[recipe.optimizer.kind]
        with pytest.raises(
            ValueError, match=rf"optimizer\.kind: .{recipe.optimizer.kind}., in the checkpoint .{other}"
        ):
            train.train(recipe, run)
    # Told to go on, AdamW has no second moments.
    more = replace(adamw, train=replace(adamw.train, steps=3))
    with pytest.raises(ValueError, match=r"of another optimizer: optim\.exp_avg_sq\.blocks\.0.* not in the checkpoint"):
        train.train(more, tmp_path / "muon", allow_foreign=True)


def test_muon_starts_from_the_weights_of_adamw(
    data: Path, half: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = {"path": str(half), "weights": "params"}
    tiny = {**MUON, "lr": 1e-30, "adamw": {"lr": 1e-30}}
    recipe = small_run.recipe(data, steps=1, every=1, optimizer=tiny, init_from=start)
    train.train(recipe, tmp_path / "muon")
    before, after = small_run.weights(half, HALF), small_run.weights(tmp_path / "muon", 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items() if name.startswith("params."))
    # The file for the official code has weights and EMA, and says that it has no moments.
    official.export_official(tmp_path / "muon", tmp_path / "out.pt")
    assert "without opt, as the official code has no Muon; it cannot resume this run" in caplog.text
    content = read_official(tmp_path / "out.pt", optimizer=True)
    assert content.model is not None and content.ema is not None and content.opt is None


def test_another_recipe_is_refused_and_loaded_when_told(
    data: Path, half: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Path(shutil.copytree(half, tmp_path / "run"))
    files = [path for path in run.rglob("*") if path.is_file() and path.parent.name != "logs" and path.name != "lock"]
    before = {path: path.read_bytes() for path in files}
    frozen = small_run.recipe(data, steps=ALL, seed=3, optimizer={"lr": 1e-30})
    with pytest.raises(ValueError, match=r"optimizer\.lr: 1e-30, in the checkpoint 0\.01; recipe\.seed: 3, in .* 0\)"):
        train.train(frozen, run)
    assert {path: path.read_bytes() for path in files} == before, "refused, and nothing is changed"
    assert train.train(frozen, run, allow_foreign=True)
    assert "goes on under another recipe: recipe.optimizer.lr: 1e-30" in caplog.text
    # The step and weights are the checkpoint's; a learning rate of next to nothing keeps them.
    params = {name: tensor for name, tensor in small_run.weights(run, ALL).items() if name.startswith("params.")}
    assert all((tensor - small_run.weights(half, HALF)[name]).abs().max() < 1e-20 for name, tensor in params.items())
    caplog.clear()
    assert train.train(frozen, run), "from here on the run is that of the other recipe"
    assert "another recipe" not in caplog.text


@pytest.mark.parametrize("content", [None, b"", b"\0" * 300, b"train: {steps: [", b"\xff\xfe\xff"])
def test_a_lost_or_damaged_recipe_of_a_run_is_written_anew_and_the_checkpoint_is_compared(
    data: Path, half: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes | None
) -> None:
    run = tmp_path / "run"
    shutil.copytree(half, run)
    whole = (run / "recipe.yaml").read_bytes()
    (run / "recipe.yaml").unlink()
    if content is not None:
        (run / "recipe.yaml").write_bytes(content)
    with pytest.raises(ValueError, match="holds a run of another recipe .*seed: 5, in the checkpoint 0"):
        train.train(small_run.recipe(data, steps=HALF, every=HALF, seed=5), run)
    (run / "recipe.yaml").write_bytes(content or b"")
    assert train.train(small_run.recipe(data, steps=HALF, every=HALF), run)
    assert (run / "recipe.yaml").read_bytes() == whole
    assert "recipe.yaml is missing, empty or damaged, and is written anew" in caplog.text
