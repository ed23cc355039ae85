"""A finished run is exported and sampled from its folder, whatever happened to the data that it was trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from eval import generate, run_report
from eval.images import npz
from eval.recipe import EvalRecipe
from eval.score import score
from sfd_scale import config, export
from sfd_scale.checkpoint import load_weights, save_weights
from sfd_scale.recipe import TrainRecipe
from sfd_scale.runs import RunFolder
from sfd_scale.sample import load_for_sampling, sample_grid
from sfd_scale.toy.convnet import SmallConvNet, SmallConvNetConfig
from sfd_scale.train import train
from tests.helpers import small_run
from tests.helpers.encoded import digits, tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a codec, a finished run, and an export and an image grid from before anything was lost."""
    place = tmp_path_factory.mktemp("trained")
    data = small_run.encode(place / "data")
    tokenizer().texture.save(place / "codec.safetensors")  # type: ignore[attr-defined]
    texture = {"kind": "patch_pca", "weights": str(place / "codec.safetensors")}
    recipe = config.from_dict(
        TrainRecipe, small_run.settings(data, steps=2, every=2, tokenizer={"texture": texture})
    )  # fmt: skip
    assert train(recipe, place / "run")
    export.export(place / "run", place / "before.safetensors")
    sample_grid(place / "before.safetensors", place / "before.png", count=4, label=None, steps=2, seed=0)
    return place


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    """The data and the codec are moved away; the recipe names their old place."""
    for name in ("data", "codec.safetensors"):
        if (trained / name).exists():
            (trained / name).rename(trained / f"{name}.away")
    shutil.copytree(trained / "run", tmp_path / "run")
    return tmp_path


@pytest.mark.parametrize("choice", [{}, {"weights": "params"}, {"initial": True}, {"step": 2}])
def test_export_needs_no_data(trained: Path, place: Path, choice: dict[str, object]) -> None:
    out = export.export(place / "run", place / "out.safetensors", export.WeightsChoice(**choice))  # type: ignore[arg-type]
    before, now = (export.read_note(file) for file in (trained / "before.safetensors", out))
    assert {key: now[key] for key in ("stats", "stats_hash", "tokenizers", "texture_codec")} == {
        key: before[key] for key in ("stats", "stats_hash", "tokenizers", "texture_codec")
    }
    if not choice:
        assert small_run.same(load_weights(out), load_weights(trained / "before.safetensors"))


def test_an_export_alone_is_sampled_to_the_same_images(trained: Path, place: Path) -> None:
    out = export.export(place / "run", place / "alone" / "out.safetensors")
    shutil.rmtree(place / "run")
    sample_grid(out, place / "grid.png", count=4, label=None, steps=2, seed=0)
    assert (place / "grid.png").read_bytes() == (trained / "before.png").read_bytes()


EVAL = """
kind: eval
num_samples: 12
batch: 6
sampler: {{kind: euler, num_steps: 2}}
extractor: {{kind: convnet, weights: {folder}/classifier.safetensors}}
reference: {{kind: npz, path: {folder}/reference.npz}}
cache: {folder}/cache
metrics: {{kid_subsets: 0, is_split: 6, reference_images: 12}}
"""


def test_a_run_is_reported_generated_and_scored_without_its_data(place: Path) -> None:
    page = run_report.write([place / "run"], place / "report")
    assert "small" in page.read_text() and "data:image/" in page.read_text(), "settings and curves"
    net = SmallConvNet(SmallConvNetConfig())
    net.init_weights(0)
    save_weights(net.state_dict(), place / "classifier.safetensors", {})
    images = torch.stack([digits(12)[i][0] for i in range(12)])
    npz.write_images(place / "reference.npz", [images], 12, (32, 32), torch.zeros(12, dtype=torch.int64))
    (place / "eval.yaml").write_text(EVAL.format(folder=place))
    out = export.export(place / "run", place / "out.safetensors")
    recipe = config.load(place / "eval.yaml", EvalRecipe, [f"checkpoint={out}"])
    generate.generate(recipe, place / "samples", generate.prepare(recipe, CPU))
    before = score(recipe, place / "samples", place / "before.json").scores
    for name in ("run", "alone"):
        shutil.rmtree(place / name, ignore_errors=True)
    out.unlink()
    shutil.move(place / "samples", place / "elsewhere")
    again = config.load(place / "eval.yaml", EvalRecipe)
    assert score(again, place / "elsewhere", place / "again.json").scores == before


def test_what_is_really_needed_is_named(trained: Path, place: Path) -> None:
    out = export.export(place / "run", place / "out.safetensors")
    note = export.read_note(out)
    del note["texture_codec"]  # as of a codec that is too large to be carried
    from safetensors.torch import load_file, save_file

    save_file(load_file(out), out, {export.EXPORT_KEY: json.dumps(note)})
    with pytest.raises((ValueError, OSError), match=r"codec\.safetensors"):
        load_for_sampling(out, CPU)
    (place / "run" / "data.json").unlink()  # as of a run of an older release
    with pytest.raises(ValueError, match=r"it has no data\.json.*/data.*Put the data back, or start the run once more"):
        export.export(place / "run", out)


@pytest.mark.parametrize("text", ["", "[]", '{"stats": {"mean": [1], "std": "x"}, "tokenizers": {}}', '{"stats": {}}'])
def test_a_damaged_record_is_named(place: Path, text: str) -> None:
    RunFolder(place / "run").data_file.write_text(text)
    with pytest.raises(ValueError, match=r"data\.json"):
        export.export(place / "run", place / "out.safetensors")


def test_a_damaged_codec_in_a_note_is_named(place: Path) -> None:
    for texture in ("no base64!", 7):
        with pytest.raises(ValueError, match=r"x\.safetensors: its note is damaged: texture"):
            export.carried_codec({"texture_codec": texture}, Path("x.safetensors"))
