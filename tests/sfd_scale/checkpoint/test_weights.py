"""Weights of a checkpoint: as a file, and as what another run starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from sfd_scale.checkpoint import Checkpoint, export_weights, load_weights, start_weights
from tests.helpers.tiny import TinyModel
from tests.helpers.whole_engine import flip, names, saved, started


@pytest.mark.parametrize("weights", ["ema", "params"])
@pytest.mark.parametrize("source", ["run", "checkpoint", "file", "hub"])
def test_a_start_takes_the_weights_that_are_named_and_nothing_else(tmp_path: Path, weights: Any, source: str) -> None:
    _, engine, ema = saved(tmp_path / "checkpoints", 3)
    path = {
        "run": tmp_path,
        "checkpoint": tmp_path / "checkpoints" / "step-00000003",
        "file": tmp_path / "w.safetensors",
        "hub": tmp_path / "hub",
    }
    if source in ("file", "hub"):
        file = path["file"] if source == "file" else path["hub"] / "model.safetensors"
        export_weights(Checkpoint(path["checkpoint"]), file, weights, {})
    model = TinyModel(seed=5)
    model.load_state_dict(start_weights(path[source], weights, model), strict=False)
    expected = ema.tensors if weights == "ema" else [f.param for f in engine.fragments()]
    assert all(torch.equal(p.view(-1), e) for p, e in zip(model.parameters(), expected, strict=True))
    other, other_ema = started(model)
    assert other.optimizer_steps == 0 and not any(f.exp_avg.any() for f in other.fragments())
    assert all(torch.equal(a, e) for a, e in zip(other_ema.tensors, expected, strict=True)), "the average starts there"


def test_equal_weights_and_metadata_give_equal_files(tmp_path: Path) -> None:
    """The model card and `eval verify` find the weights by the SHA-256 of their file."""
    saved(tmp_path / "checkpoints")
    checkpoint = Checkpoint(tmp_path / "checkpoints" / "step-00000001")
    notes = {f"note {n}": f'„ä\x7f\n"{n}' for n in range(9)}
    files = [export_weights(checkpoint, tmp_path / f"{n}.safetensors", "ema", notes) for n in range(4)]
    assert len({file.read_bytes() for file in files}) == 1
    with safe_open(str(files[0]), "pt") as file:
        assert notes.items() <= file.metadata().items() and file.metadata()["weights"] == "ema"


def test_a_start_from_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "checkpoints")
    export_weights(Checkpoint(tmp_path / "checkpoints" / "step-00000001"), tmp_path / "ema.safetensors", "ema", {})
    with pytest.raises(ValueError, match="holds the weights 'ema', not 'params'; set init_from.weights=ema"):
        start_weights(tmp_path / "ema.safetensors", "params", TinyModel())
    with pytest.raises(ValueError, match=r"another model: blocks\.0\.down\.bias: \(37,\) in the checkpoint, \(38,\)"):
        start_weights(tmp_path, "ema", TinyModel(width=38))
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="no whole checkpoint"):
        start_weights(tmp_path / "empty", "ema", TinyModel())


@pytest.mark.parametrize("weights", ["ema", "params"])
def test_export_has_the_names_the_weights_and_the_notes(tmp_path: Path, weights: Any) -> None:
    _, engine, ema = saved(tmp_path / "run", 2)
    checkpoint = Checkpoint(tmp_path / "run" / "step-00000002")
    out = export_weights(checkpoint, tmp_path / "out" / "model.safetensors", weights, {"stats": "def"})
    tensors = load_weights(out)
    source = ema.tensors if weights == "ema" else [f.param for f in engine.fragments()]
    assert list(tensors) == sorted(f.name for f in engine.fragments())
    for fragment, value in zip(engine.fragments(), source, strict=True):
        assert tensors[fragment.name].shape == fragment.shape
        assert torch.equal(tensors[fragment.name].view(-1), value)
    assert all(torch.equal(tensors[n], t) for n, t in load_weights(checkpoint.path, weights).items())
    with safe_open(out, "pt") as file:
        notes = file.metadata()
    assert notes == {
        "step": "2", "format": "1", "optimizer_steps": "2", "recipe_digest": "abc", "stats": "def",
        "weights": weights, "checkpoint_sha256": checkpoint.hash,
    }  # fmt: skip
    assert names(tmp_path / "out") == ["model.safetensors"]


def test_export_refuses_damage_and_other_names(tmp_path: Path) -> None:
    saved(tmp_path)
    checkpoint = Checkpoint(tmp_path / "step-00000001")
    with pytest.raises(ValueError, match="ends in .safetensors"):
        export_weights(checkpoint, tmp_path / "model.pt", "ema", {})
    flip(tmp_path / "step-00000001" / "__0_0.distcp")
    with pytest.raises(ValueError, match="__0_0.distcp has changed"):
        export_weights(checkpoint, tmp_path / "model.safetensors", "ema", {})
