"""A finished run is exported and sampled from its folder, whatever happened to the data that it was trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from sfd_scale import config, export
from sfd_scale.checkpoint import load_weights
from sfd_scale.recipe import TrainRecipe
from sfd_scale.runs import RunFolder
from sfd_scale.sample import load_for_sampling, sample_grid
from sfd_scale.train import train
from tests.helpers import small_run
from tests.helpers.encoded import tokenizer

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
