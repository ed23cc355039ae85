"""A folder for the hub: read back as a model elsewhere, its card read by the hub's own library."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from sfd_scale import config, hub
from sfd_scale.diffusion.latents import LatentStats
from sfd_scale.export import WeightsChoice, export, read_note
from sfd_scale.recipe import TrainRecipe
from sfd_scale.runtime.files import sha256
from sfd_scale.sample import load_for_sampling
from tests.eval.test_report import result
from tests.helpers.encoded import tokenizer
from tests.helpers.small_run import encode, settings

INITIAL = WeightsChoice(initial=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a recipe and scores, whose weights are the initial ones."""
    root = tmp_path_factory.mktemp("hub")
    tokenizer().texture.save(root / "codec.safetensors")  # type: ignore[attr-defined]
    texture = {"kind": "patch_pca", "weights": str(root / "codec.safetensors")}
    folder = root / "run"
    folder.mkdir()
    plain = settings(encode(root / "data"), tokenizer={"texture": texture})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(plain))
    result(folder / "evaluations" / "step-00000000", 0, 4.5678)
    return folder


def test_the_folder_is_a_model_elsewhere(run: Path, tmp_path: Path) -> None:
    folder = hub.write_folder(run, tmp_path / "hub", INITIAL)
    codec = run.parent / "codec.safetensors"
    original = load_for_sampling(folder / "model.safetensors", torch.device("cpu"))
    codec.rename(codec.with_suffix(".gone"))  # another machine
    try:
        moved = load_for_sampling(folder / "model.safetensors", torch.device("cpu"))
    finally:
        codec.with_suffix(".gone").rename(codec)
    # The weights file alone carries a small codec.
    (folder / "texture.safetensors").rename(tmp_path / "codec")
    codec.rename(codec.with_suffix(".gone"))
    try:
        alone = load_for_sampling(folder / "model.safetensors", torch.device("cpu"))
    finally:
        codec.with_suffix(".gone").rename(codec)
    latents = torch.randn(2, *original.layout.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(moved.decode(latents), original.decode(latents))
    assert torch.equal(alone.decode(latents), original.decode(latents))
    assert LatentStats.load(folder / "stats.safetensors").hash == moved.stats.hash
    assert config.load(folder / "recipe.yaml", TrainRecipe) == config.load(run / "recipe.yaml", TrainRecipe)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "lightningdit"
    assert (folder / "samples.png").read_bytes() == (run / "evaluations/step-00000000/grid.png").read_bytes()
    # Again over itself, without what belonged to the former weights alone, but never over what is someone else's.
    shutil.move(run / "evaluations", tmp_path / "evaluations")
    hub.write_folder(run, folder, INITIAL)
    shutil.move(tmp_path / "evaluations", run / "evaluations")
    assert not {"samples.png", "results.json"} & {file.name for file in folder.iterdir()}
    assert "![samples]" not in (folder / "README.md").read_text() and (folder / "texture.safetensors").is_file()
    (folder / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="holds other files \\(thesis.tex\\)"):
        hub.write_folder(run, folder, INITIAL)


def test_scores_of_another_file_of_the_step_are_named_and_not_taken(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As an earlier release exported it: the same weights, another hash."""
    own = tmp_path / "run"
    shutil.copytree(run, own, ignore=shutil.ignore_patterns("evaluations"))
    digest = read_note(export(own, tmp_path / "model.safetensors", INITIAL))["recipe_digest"]
    drawn_with = {"sha256": "0" * 64, "name": "sfd", "step": 0, "recipe_digest": digest}
    file = result(tmp_path / "drawn", 0, 9.0, checkpoint=drawn_with)
    folder = hub.write_folder(own, tmp_path / "hub", INITIAL)
    assert not (folder / "results.json").exists() and f"those of {file} are of another file of step 0" in caplog.text
    drawn_with["sha256"] = sha256(folder / "model.safetensors")
    result(tmp_path / "again", 0, 7.0, checkpoint=drawn_with)
    hub.write_folder(own, folder, INITIAL)
    assert "| FID | 7 |" in (folder / "README.md").read_text()


def test_the_card_is_what_the_hub_reads(run: Path, tmp_path: Path) -> None:
    folder = hub.write_folder(run, tmp_path / "hub", INITIAL)
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "sfd-scale" and "semantic-first-diffusion" in card.data.tags
    scores = {entry.metric_type: entry.metric_value for entry in card.data.eval_results}
    assert scores["fid"] == 4.5678 and scores["precision"] == 0.75 and "sfid" not in scores
    assert "| FID | 4.568 |" in card.text and "untrained" in card.text and "![samples](samples.png)" in card.text
    loaded = load_for_sampling(folder / "model.safetensors", torch.device("cpu"))
    assert f"`{loaded.stats.hash[:16]}`" in card.text
    title = "Semantics Lead the Way: Harmonizing Semantic and Texture Modeling with Asynchronous Latent Diffusion"
    assert f"title   = {{{title}}}," in card.text and "author  = {Pan, Yueming and Feng, Ruoyu and" in card.text
