"""What release 0.1 wrote still loads: shards, a run, its checkpoints, exports and scores (tests/golden/release-0.1)."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from eval import generate, score
from eval.comparison.compare import compare
from eval.pages.run_metrics import read_metrics
from eval.recipe import EvalRecipe
from eval.report import report
from eval.results import Results
from eval.watch import watch
from sfd_scale import checkpoint, config, encode, export, official, train
from sfd_scale.data.manifest import Manifest, restored
from sfd_scale.data.shards import check_data, open_shards
from sfd_scale.diffusion.fixed_step import FixedStepConfig
from sfd_scale.diffusion.guidance import NoGuidance, guided
from sfd_scale.diffusion.sampler import Sampler
from sfd_scale.recipe import EncodeRecipe, TrainRecipe
from sfd_scale.runs import RunFolder, check_recipe_matches
from sfd_scale.sample import load_for_sampling, sample_grid
from tests.helpers.encoded import files
from tests.helpers.ranks import run_alone
from tests.helpers.small_run import lines

GOLDEN = Path(__file__).parent / "golden" / "release-0.1"
CPU = torch.device("cpu")
PARTS = ("params", "ema", "exp_avg", "exp_avg_sq")
CHECKPOINTS = {"run": (2, 4), "run_zero1": (2,)}
# By the names of the release; the terms of the loss are below `loss/` now.
TERMS = ("velocity", "velocity_semantic", "velocity_texture", "cosine", "alignment")
COUNT, STEPS = 4, 4  # of the images of samples.png
ZERO1 = ["engine.kind=deepspeed", "engine.zero_stage=1", "engine.precision=fp32", "engine.grad_clip=1.0"]


# ------------------------------------------------------------------------------------------- what is measured


def sums(tensors: dict[str, Tensor]) -> dict[str, list[float]]:
    """Sum and sum of magnitudes of each tensor, and of all at the end."""
    found = {name: [t.double().sum().item(), t.double().abs().sum().item()] for name, t in sorted(tensors.items())}
    return {**found, "all": [sum(column) for column in zip(*found.values(), strict=True)]}


def stored_columns() -> dict[str, Tensor]:
    """The columns of shards/, sample by sample."""
    manifest, rows = Manifest.read(Path("shards")), open_shards(Path("shards"))
    columns: dict[str, Tensor] = {}
    for name, form in manifest.columns.items():
        values = [rows[i][name] for i in range(manifest.num_samples)]
        columns[name] = torch.tensor(values) if form == "int" else restored(values, manifest.dtype)
    return columns


def drawn(file: Path) -> dict[str, Tensor]:
    """The latents and the images that `sfd sample` draws into samples.png."""
    loaded = load_for_sampling(file, CPU)
    velocity = guided(loaded.model, NoGuidance(), loaded.layout)
    sampler = Sampler(
        velocity, loaded.layout, loaded.schedule, FixedStepConfig(num_steps=STEPS), loaded.stats, loaded.decode,
        0, COUNT, CPU,
    )  # fmt: skip
    latents = sampler.draw(range(COUNT), loaded.conditioning.in_turn(COUNT))
    return {"latents": latents.latents, "images": sampler.pixels(latents).float()}


def checkpoint_folder(run: str, step: int) -> Path:
    return Path(run, "checkpoints", f"step-{step:08d}")


def checkpoint_sums() -> dict[str, list[float]]:
    return {
        f"{run}/{step}/{part}": sums(checkpoint.load_weights(checkpoint_folder(run, step), part))["all"]
        for run, steps in CHECKPOINTS.items()
        for step in steps
        for part in PARTS
    }


def measured() -> dict[str, Any]:
    """Of the files in the current folder, by the code that is imported. expected.json is this, and `curves`."""
    return {
        "stats_hash": Manifest.read(Path("shards")).stats_hash,
        "shards": sums(stored_columns()),
        "checkpoints": checkpoint_sums(),
        "export": sums(checkpoint.load_weights(Path("export.safetensors"))),
        "drawn": sums(drawn(Path("export.safetensors"))),
        "scores": Results.read(Path("results")).scores.as_json(),
    }


def curves(runs: dict[str, Path]) -> dict[str, list[dict[str, float]]]:
    """The losses of runs, a row a step."""
    return {
        name: [
            {key: row[key] for key in ("step", "loss", "lr", "samples")} | {key: row[f"loss/{key}"] for key in TERMS}
            for row in read_metrics(run)
        ]
        for name, run in runs.items()
    }


# ---------------------------------------------------------------------------------------------------- fixtures


def unpack(folder: Path) -> Path:
    """A copy of what the release left, as it left it."""
    shutil.copytree(GOLDEN, folder, dirs_exist_ok=True)
    with tarfile.open(folder / "packed.tar.xz") as packed:
        packed.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which holds what the release left."""
    monkeypatch.chdir(unpack(tmp_path))
    return tmp_path


def go_on(folder: Path) -> dict[str, Any]:
    """Give every command of the release again, and train on; what is there afterwards."""
    logging.disable(logging.INFO)
    os.chdir(folder)
    settings = config.load("recipes/eval.yaml", EvalRecipe)
    run, out, results = Path("run"), Path("run/evaluations"), Path("results")
    rows = {name: Path(name, "metrics.jsonl").read_text(encoding="utf-8") for name in CHECKPOINTS}
    begun = {name: files(Path(name)) for name in ("shards", "run/evaluations", "run/checkpoints", "results")}
    encode.encode(config.load("recipes/latents.yaml", EncodeRecipe))
    watch(settings, run, out, once=True)
    generate.generate(settings, results)
    repeated = {name: files(Path(name)) == before for name, before in begun.items()}
    again = score.score(settings, results, Path("again.json"))
    train.train(config.load("recipes/sfd.yaml", TrainRecipe, ["train.steps=6"]), run)
    train.train(config.load("recipes/sfd.yaml", TrainRecipe, ["train.steps=4", *ZERO1]), Path("run_zero1"))
    watch(settings, run, out, once=True)
    after = files(out)
    # A run that began anew would have the same losses, but other times in its first rows.
    resumed = [Path(name, "metrics.jsonl").read_text(encoding="utf-8").startswith(rows[name]) for name in CHECKPOINTS]
    kept = all(after[name] == content for name, content in begun["run/evaluations"].items() if name != "results.jsonl")
    return {
        "repeated": repeated, "kept": kept, "resumed": resumed, "scores": again.scores.by_key(), "id": again.id,
        "evaluated": [row["step"] for row in lines(out / "results.jsonl")],
        "curves": curves({"run": run, "run_zero1": Path("run_zero1")}),
    }  # fmt: skip


@pytest.fixture(scope="module")
def gone_on(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_alone(go_on, unpack(tmp_path_factory.mktemp("old")), timeout=300.0)


def close(found: Any, wanted: Any, rel: float = 1e-6) -> None:
    """Nested numbers, each within `rel` of the one of the release, or of the scale beside it."""
    assert type(found) is type(wanted) or {type(found), type(wanted)} == {int, float}, (found, wanted)
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            close(found[key], wanted[key], rel)
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        if all(isinstance(item, float) for item in wanted):
            assert found == pytest.approx(wanted, rel=rel, abs=rel * max(map(abs, wanted), default=0))
        else:
            for a, b in zip(found, wanted, strict=True):
                close(a, b, rel)
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=rel, abs=1e-9)
    else:
        assert found == wanted


# ------------------------------------------------------------------------------------------------------- tests


def test_shards_open_and_hold_the_same_numbers(old: Path, expected: dict[str, Any]) -> None:
    assert check_data(Path("shards")) == []
    assert Manifest.read(Path("shards")).stats_hash == expected["stats_hash"]
    close(sums(stored_columns()), expected["shards"], rel=1e-12)


@pytest.mark.parametrize("run", CHECKPOINTS)
def test_the_recipe_of_a_run_is_read_setting_by_setting(old: Path, run: str) -> None:
    file = Path(run, "recipe.yaml")
    stored, loaded = config.tree(file), config.to_dict(config.load(file, TrainRecipe))
    now = config.flatten(loaded)
    assert {key: now[key] for key in config.flatten(stored)} == config.flatten(stored)
    assert config.source_of(file) == "recipes/sfd.yaml"


def test_the_same_recipe_is_the_same_run(old: Path) -> None:
    own = config.load("recipes/sfd.yaml", TrainRecipe, ["train.steps=6"])
    check_recipe_matches(own, RunFolder(Path("run")), 4, allow_foreign=False)
    check_recipe_matches(own, RunFolder(Path("run_zero1")), 2, allow_foreign=False)
    other = config.load("recipes/sfd.yaml", TrainRecipe, ["optimizer.lr=0.5"])
    with pytest.raises(ValueError, match=r"another recipe \(recipe\.optimizer\.lr: 0\.5, in the checkpoint 0\.01\)"):
        check_recipe_matches(other, RunFolder(Path("run")), 4, allow_foreign=False)


def test_checkpoints_hold_the_same_weights_and_moments(old: Path, expected: dict[str, Any]) -> None:
    close(checkpoint_sums(), expected["checkpoints"], rel=1e-9)
    exported = checkpoint.load_weights(Path("export.safetensors"))
    average = checkpoint.load_weights(checkpoint_folder("run", 4), "ema")
    assert exported.keys() == average.keys() and all(torch.equal(exported[name], average[name]) for name in average)
    for run, steps in CHECKPOINTS.items():
        assert [checkpoint.Checkpoint(checkpoint_folder(run, s)).state["optimizer_steps"] for s in steps] == list(steps)


@pytest.mark.parametrize("run", CHECKPOINTS)
def test_training_goes_on_as_the_release_did(gone_on: dict[str, Any], expected: dict[str, Any], run: str) -> None:
    straight = expected["curves"][run]
    assert len(straight) == {"run": 6, "run_zero1": 4}[run]
    assert gone_on["resumed"] == [True, True]
    close(gone_on["curves"][run], straight)


def test_finished_work_is_not_done_again(gone_on: dict[str, Any], expected: dict[str, Any]) -> None:
    assert gone_on["repeated"] == dict.fromkeys(gone_on["repeated"], True)
    assert gone_on["kept"] and gone_on["evaluated"] == [2, 4, 6]
    close({key: gone_on["scores"][key] for key in expected["scores"]}, expected["scores"])  # newer scores aside
    stored = json.loads((GOLDEN / "results" / "results.json").read_text(encoding="utf-8"))
    assert gone_on["id"] == stored["id"]


def test_the_export_draws_the_same_images(old: Path, expected: dict[str, Any]) -> None:
    close(sums(checkpoint.load_weights(Path("export.safetensors"))), expected["export"], rel=1e-9)
    close(sums(drawn(Path("export.safetensors"))), expected["drawn"], rel=1e-4)
    sample_grid(Path("export.safetensors"), Path("now.png"), count=COUNT, label=None, steps=STEPS, seed=0)
    now, then = (np.array(Image.open(name)).astype(int) for name in ("now.png", "samples.png"))
    assert now.shape == then.shape and np.abs(now - then).max() <= 1  # a last bit may turn a rounding


def test_a_checkpoint_exports_to_the_same_weights(old: Path) -> None:
    export.export(Path("run"), Path("now.safetensors"))
    now, then = (checkpoint.load_weights(Path(name)) for name in ("now.safetensors", "export.safetensors"))
    assert now.keys() == then.keys() and all(torch.equal(now[name], then[name]) for name in then)
    notes = [export.read_note(Path(name)) for name in ("now.safetensors", "export.safetensors")]
    assert all(notes[0][key] == notes[1][key] for key in notes[1] if key not in ("recipe", "recipe_digest"))


def test_the_official_file_is_imported(old: Path) -> None:
    recipe = official.recipe_for(Path("export.pt"), "run/recipe.yaml", [])
    official.import_weights(Path("export.pt"), Path("back.safetensors"), recipe)
    back, then = (checkpoint.load_weights(Path(name)) for name in ("back.safetensors", "export.safetensors"))
    assert back.keys() == then.keys() and all(torch.equal(back[name], then[name]) for name in then)
    official.import_run(Path("export.pt"), Path("imported"), recipe)
    for part in PARTS:
        a, b = (checkpoint.load_weights(checkpoint_folder(run, 4), part) for run in ("imported", "run"))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b), part


def test_scores_are_read_compared_and_reported(old: Path, expected: dict[str, Any]) -> None:
    close(Results.read(Path("results")).scores.as_json(), expected["scores"], rel=1e-12)
    evaluated = [Path("run/evaluations", f"step-{step:08d}") for step in (2, 4)]
    # The watch and the export drew with the same weights.
    same = compare(["results"], [str(evaluated[1])], rounds=50)
    assert all(found.difference == 0 for found in same.differences)
    other = compare(["results"], [str(evaluated[0])], rounds=50, out=Path("compared.json"))
    assert any(found.difference != 0 for found in other.differences)
    results = [Path("results/results.json"), *(folder / "results.json" for folder in evaluated)]
    page = report(results, Path("report"), runs=[Path("run"), Path("run_zero1")])
    assert f"{expected['scores']['fid']:.2f}" in page.read_text(encoding="utf-8")
    assert len(json.loads(Path("report/report.json").read_text(encoding="utf-8"))["results"]) == 3
