"""Images in Python, by `sfd sample` and by diffusers are the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

import sfd_scale
from sfd_scale import hub
from sfd_scale.checkpoint import save_weights
from sfd_scale.commands.models import SolverName
from sfd_scale.diffusion.samplers import Solver, solver_settings
from sfd_scale.export import WeightsChoice
from sfd_scale.runtime.weight_files import safetensors_metadata
from sfd_scale.sample import sample_grid
from tests.sfd_scale.test_hub import run as run  # a fixture: the run folder of a small diffusion model

QUIET = {"steps": 3, "show_progress": False}


@pytest.fixture(scope="module")
def folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub.write_folder(run, tmp_path_factory.mktemp("export") / "hub", WeightsChoice(initial=True))


@pytest.fixture(scope="module")
def pipe(folder: Path) -> sfd_scale.Pipeline:
    return sfd_scale.load(folder)


def _drawn(pipe: sfd_scale.Pipeline, **settings: object) -> Tensor:
    images = pipe(**{**QUIET, "output": "tensor", **settings}).images  # type: ignore[arg-type]
    assert isinstance(images, Tensor) and images.dtype == torch.uint8
    return images


def test_an_image_depends_on_its_number_label_and_seed_alone(pipe: sfd_scale.Pipeline) -> None:
    images = _drawn(pipe, labels=[7, 7, 3])
    assert torch.equal(images, _drawn(pipe, labels=[7, 7, 3]))
    assert torch.equal(images[:2], _drawn(pipe, labels=[7, 7, 5])[:2])
    assert not torch.equal(images[0], images[1]) and not torch.equal(images, _drawn(pipe, labels=[7, 7, 3], seed=1))
    assert torch.equal(images, _drawn(pipe, labels=[7, 7, 3], batch=2))
    pictures = pipe(labels=[7, 7, 3], **QUIET).images
    assert torch.equal(torch.stack([pil_to_tensor(picture) for picture in pictures]), images)


def test_guidance_is_that_of_the_settings_class(pipe: sfd_scale.Pipeline) -> None:
    by_scale = _drawn(pipe, labels=[1, 2], guidance=(3.0, 2.0))
    settings = sfd_scale.ClassifierFreeGuidance(scale_texture=3.0, scale_semantic=2.0)
    assert torch.equal(by_scale, _drawn(pipe, labels=[1, 2], guidance=settings))
    assert torch.equal(_drawn(pipe, labels=[1, 2], guidance=1.0), _drawn(pipe, labels=[1, 2]))


def test_mistakes_are_named(pipe: sfd_scale.Pipeline, folder: Path) -> None:
    with pytest.raises(ValueError, match="labels: 10; allowed: 0 to 9"):
        pipe(labels=[10], **QUIET)
    with pytest.raises(ValueError, match="count: 3, with 2 labels"):
        pipe(labels=[1, 2], count=3, **QUIET)
    with pytest.raises(ValueError, match="not a file of `sfd export`"):
        sfd_scale.load(folder / "nothing.safetensors")


@pytest.mark.parametrize("labels", [[], ["cat"], [1.5], [[1, 2]], "cat", {"a": 1}])
def test_labels_that_are_no_classes_are_named(pipe: sfd_scale.Pipeline, labels: Any) -> None:
    with pytest.raises(ValueError, match="labels: .*; allowed: a class index, or a list of them"):
        pipe(labels=labels, **QUIET)


def test_numbers_of_numpy_and_lists_are_taken_as_numbers(pipe: sfd_scale.Pipeline) -> None:
    """diffusers#6233 asks what a seed means; here numbers of any library give the same bits."""
    expected = _drawn(pipe, labels=[3, 3], guidance=(1.5, 2.5))
    assert torch.equal(_drawn(pipe, labels=np.int64(3), count=2, guidance=[1.5, 2.5]), expected)
    assert torch.equal(_drawn(pipe, labels=np.array([3, 3], np.int32), guidance=(np.float32(1.5), 2.5)), expected)
    same = _drawn(pipe, labels=torch.tensor([3, 3]), guidance=np.float32(1.5))
    assert torch.equal(same, _drawn(pipe, labels=[3, 3], guidance=1.5))
    for guidance in ("strong", (1.0, 2.0, 3.0), [None, 1.0], None):
        with pytest.raises(ValueError, match=r"guidance: .*; allowed: a number, two as in \(1\.5, 2\.5\)"):
            pipe(labels=[1], guidance=guidance, **QUIET)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="count: 0; allowed: 1 and up"):
        pipe(count=0, **QUIET)


def test_a_picture_that_cannot_be_written_is_refused_before_it_is_drawn(folder: Path, tmp_path: Path) -> None:
    """Pillow names an unknown suffix only when it saves, after all images are drawn."""
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    cases = {
        "grid": r"--out: .*grid; allowed: a name that ends in \.bmp, .*\.png",
        "grid.tiff": r"allowed: a name that ends in \.bmp",
        "folder.png": "folder.png is a folder; allowed: a file in it",
        "file/x.png": "file is no folder; allowed: a path through folders",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message):
            sample_grid(folder / "not read", tmp_path / name, count=1, label=None, steps=1, seed=0)


def test_the_hub_class_refuses_a_file_without_some_weights(folder: Path, tmp_path: Path) -> None:
    """They had random values, in silence."""
    metadata = safetensors_metadata(folder / "model.safetensors")
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if name.endswith("weight"))
    del tensors[lost]
    (tmp_path / "hub").mkdir()
    save_weights(tensors, tmp_path / "hub" / "model.safetensors", metadata)
    with pytest.raises(ValueError, match=rf"missing weights \['{lost}'\], unexpected \[\]"):
        sfd_scale.SFDModel.from_pretrained(str(tmp_path / "hub"))


def test_diffusers_draws_the_same_bits(pipe: sfd_scale.Pipeline, folder: Path) -> None:
    other = DiffusionPipeline.from_pretrained(str(folder), custom_pipeline=str(folder), trust_remote_code=True)
    found = other(labels=[7, 3], guidance=2.0, output="tensor", **QUIET).images
    assert torch.equal(found, _drawn(pipe, labels=[7, 3], guidance=2.0))


def test_the_command_writes_the_same_images(pipe: sfd_scale.Pipeline, folder: Path, tmp_path: Path) -> None:
    out = sample_grid(folder, tmp_path / "x.png", count=3, label=None, steps=3, seed=0, guidance=2.0, columns=3)
    size = _drawn(pipe, count=3, guidance=2.0).shape[-1]
    grid = pil_to_tensor(Image.open(out))
    cut = torch.stack([grid[:, 2 : 2 + size, 2 + i * (size + 2) : 2 + i * (size + 2) + size] for i in range(3)])
    assert torch.equal(cut, _drawn(pipe, count=3, guidance=2.0, batch=3))


def test_the_hub_mixin_saves_and_loads_the_model(pipe: sfd_scale.Pipeline, folder: Path, tmp_path: Path) -> None:
    model = sfd_scale.SFDModel.from_pretrained(str(folder))
    model.save_pretrained(tmp_path / "saved")  # the note holds the codec
    assert torch.equal(_drawn(sfd_scale.load(tmp_path / "saved"), labels=[4]), _drawn(pipe, labels=[4]))


def test_every_public_name_exists() -> None:
    assert all(getattr(sfd_scale, name) is not None for name in sfd_scale.__all__)


def test_the_command_knows_every_solver() -> None:
    solvers = {name for part in get_args(Solver) for name in get_args(part)}
    assert set(get_args(SolverName)) == solvers
    for name in solvers:
        assert solver_settings(name, 3).kind == name
