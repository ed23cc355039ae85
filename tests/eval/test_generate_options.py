"""Settings of generation that decide its speed and its last bits: batch, portions of decoding, graphs, kernel; and
guidance that would do nothing."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eval import generate
from eval.images import npz, outputs
from eval.images.outputs import OutputsConfig
from eval.recipe import EvalRecipe
from eval.work.auto_batch import MOST, auto_batch, fitting_batch
from eval.work.cuda_graphs import GraphedModel, check_graphs
from eval.work.side_stream import SideStream
from sfd_scale import config
from sfd_scale.diffusion.adaptive import Dopri5Config
from sfd_scale.diffusion.fixed_step import FixedStepConfig
from sfd_scale.diffusion.guidance import AutoGuidance, ClassifierFreeGuidance
from sfd_scale.runtime import files
from sfd_scale.tokenizers.protocols import to_uint8
from tests.helpers import eval_tiny
from tests.helpers.eval_tiny import CLASSES, CPU, SCHEDULE

GIB = 2**30
needs_gpu = pytest.mark.gpu


# ------------------------------------------------------------------------------------------------- batch


@pytest.mark.parametrize("bend", [0, 300 * 2**20])
def test_the_largest_batch_that_fits(bend: int) -> None:
    """Memory of 2 GiB and 100 MiB an image, also where it grows faster than two small batches let expect."""
    tried = []

    def peak(batch: int) -> int:
        tried.append(batch)
        return 2 * GIB + batch * 100 * 2**20 + max(0, batch - 100) * bend

    found = fitting_batch(peak, 40 * GIB)
    assert found % 8 == 0 and peak(found) <= 40 * GIB
    assert found == 384 if bend == 0 else 150 < found < 384
    assert fitting_batch(lambda batch: GIB, 40 * GIB) == MOST
    with pytest.raises(ValueError, match="batch: 8 images take 2.8 GiB of 1.0"):
        fitting_batch(peak, GIB)


def test_auto_needs_a_gpu_and_is_settled_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch: auto measures the memory of a GPU"):
        auto_batch(lambda batch: iter(()), CPU)
    (tmp_path / "eval.yaml").write_text("kind: eval\nbatch: auto\n")
    recipe = config.load(tmp_path / "eval.yaml", EvalRecipe)
    assert recipe.batch == "auto" and generate.with_recorded_batch(recipe, tmp_path) is recipe
    # What the first start found is in the folder, and stays.
    (tmp_path / "config.json").write_text(json.dumps({"batch": 96}))
    assert generate.with_recorded_batch(recipe, tmp_path / "none", tmp_path).batch == 96
    assert generate.with_recorded_batch(EvalRecipe(batch=8), tmp_path).batch == 8
    for bad, message in (("all", "'all'; allowed: a whole number or auto"), ("0", "0; allowed: 1 and up")):
        with pytest.raises(ValueError, match=f"^batch: {message}"):
            config.load(tmp_path / "eval.yaml", EvalRecipe, [f"batch={bad}"])


# ------------------------------------------------------------------------------------------------- decoding


def test_decoding_in_portions(tmp_path: Path) -> None:
    portions = []

    def decode(latents: Tensor) -> Tensor:
        portions.append(len(latents))
        return eval_tiny.decode(latents)

    labels = torch.zeros(5, dtype=torch.int64)
    whole = eval_tiny.sampler(8).images(range(5), labels).images
    found = eval_tiny.sampler(8, decode=decode, decode_batch=3).images(range(5), labels).images
    assert portions == [3, 3, 2] and torch.equal(found, whole)  # 8 rows, whatever is asked for
    settings = eval_tiny.recipe(tmp_path, decode_batch=3)
    assert settings.decode_batch == 3
    with pytest.raises(ValueError, match="^decode_batch: 0"):
        eval_tiny.recipe(tmp_path, decode_batch=0)


def test_pixels_that_are_not_finite_are_refused() -> None:
    images = torch.zeros(2, 3, 4, 4)
    images[1, 0, 2, 2] = torch.nan
    with pytest.raises(FloatingPointError, match="decoded images are not finite"):
        to_uint8(images)


def test_decoding_overlaps_with_the_next_batch(tmp_path: Path) -> None:
    """Sampling and decoding have a thread each, and the second batch is drawn while the first is decoded."""
    second = threading.Event()
    decoded: list[bool] = []
    threads: list[int] = []

    def velocity(x: Tensor, t: Any, y: Tensor) -> Tensor:
        threads.append(threading.get_ident())
        if len(threads) > 1:
            second.set()
        return x

    def decode(latents: Tensor) -> Tensor:
        assert threading.get_ident() not in threads
        decoded.append(second.wait(30))
        return eval_tiny.decode(latents)

    settings = eval_tiny.recipe(tmp_path, num_samples=16, outputs=OutputsConfig(grid=0))
    euler = FixedStepConfig(num_steps=1)
    job = eval_tiny.job(settings, velocity=velocity, decode=decode, config=euler)
    generate.generate(settings, tmp_path / "out", job)
    assert decoded == [True, True] and len(threads) == 2


# ------------------------------------------------------------------------------------------------- devices


def test_what_a_cpu_does_not_have_is_refused(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    for change, message in (
        ({"cuda_graphs": True}, "cuda_graphs: true needs a CUDA device"),
        ({"attention": "flash3"}, "attention: flash3 cannot run here"),
    ):
        with pytest.raises(ValueError, match=message):
            generate.prepare(eval_tiny.recipe(tmp_path, checkpoint=weights, **change), CPU)


def test_sizes_that_are_not_graphed_run_as_they_are() -> None:
    model = eval_tiny.model()
    graphed = GraphedModel(model, (8, 16))
    x, t, y = torch.randn(3, *eval_tiny.LAYOUT.shape), torch.full((3,), 0.5), torch.zeros(3, dtype=torch.int64)
    assert torch.equal(graphed(x, t, t, y)[0], model(x, t, t, y)[0])


@needs_gpu
def test_graphs_replay_the_same_velocity() -> None:
    device = torch.device("cuda")
    check_graphs(device)
    model = eval_tiny.model().to(device)
    graphed = GraphedModel(model, (4,))
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        x, t = torch.randn(4, *eval_tiny.LAYOUT.shape, generator=draw).to(device), torch.rand(4, generator=draw)
        y = torch.randint(CLASSES, (4,), generator=draw).to(device)
        with torch.no_grad():
            expected = model(x, t.to(device), t.to(device), y)[0]
        assert torch.allclose(graphed(x, t.to(device), t.to(device), y)[0], expected, atol=1e-5)


@needs_gpu
def test_auto_batch_and_side_stream_on_a_gpu() -> None:
    device = torch.device("cuda")

    def work(batch: int) -> Iterator[None]:
        for _ in range(2):  # two parts of 32 MiB an image
            torch.empty(batch, 2**25, dtype=torch.uint8, device=device)
            yield

    found = auto_batch(work, device)
    free, _ = torch.cuda.mem_get_info(device)
    assert found == min(MOST, int(0.85 * free) // 2**26 // 8 * 8)
    side = SideStream(device)
    x = torch.randn(2048, 2048, device=device)
    product = x @ x
    sampled = side.mark()
    with side.after(sampled):
        doubled = product * 2
    assert torch.equal(doubled, 2 * product)


# ------------------------------------------------------------------------------------------------- guidance


def test_guidance_that_begins_after_the_last_step_is_refused() -> None:
    late = ClassifierFreeGuidance(scale_texture=2.0, scale_semantic=1.0, interval_start=0.9, interval_mode="both")
    # 10 steps of 0.13: the last begins at 1.17, where texture is at 0.87.
    with pytest.raises(
        ValueError, match=r"interval_start: 0.9 is after the last step.* allowed: up to 0.87, or more steps"
    ):
        generate.check_guidance_interval(late, FixedStepConfig(num_steps=10), SCHEDULE)
    generate.check_guidance_interval(late, FixedStepConfig(num_steps=20), SCHEDULE)
    heun = FixedStepConfig(kind="heun2", num_steps=10)  # evaluates the velocity at the end of a step too
    generate.check_guidance_interval(late, heun, SCHEDULE)
    # With a jump, a step starts there.
    generate.check_guidance_interval(late, FixedStepConfig(num_steps=10, jump=True), SCHEDULE)
    generate.check_guidance_interval(late, Dopri5Config(), SCHEDULE)


def test_a_guide_that_is_the_checkpoint_is_refused(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"the same")
    (tmp_path / "copy.safetensors").write_bytes(b"the same")
    settings = eval_tiny.recipe(
        tmp_path, checkpoint=weights, guide=tmp_path / "copy.safetensors", guidance=AutoGuidance()
    )
    with pytest.raises(ValueError, match="is the checkpoint itself, so guidance has no effect"):
        generate.prepare(settings, CPU)


# ------------------------------------------------------------------------------------------------- a full disk


@pytest.mark.parametrize("what", ["npz", "png", "grid"])
def test_a_full_disk_leaves_no_half_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """The device /dev/full says so for real: every write fails."""
    settings = eval_tiny.recipe(
        tmp_path, num_samples=16, outputs=OutputsConfig(npz=what == "npz", png=what == "png", grid=2 * (what == "grid"))
    )
    out, write = tmp_path / "out", outputs.write
    monkeypatch.setattr(outputs, "write", lambda *given: None)
    folder = generate.generate(settings, out, eval_tiny.job(settings))
    monkeypatch.setattr(outputs, "write", write)

    with monkeypatch.context() as full:
        full.setattr(files, "temporary_path", lambda path: path.with_name(f".full{path.suffix}"))
        names = {"npz": out / "samples.npz", "png": out / "png" / "000000.png", "grid": out / "grid.png"}
        path = names[what]
        path.parent.mkdir(exist_ok=True)
        path.with_name(f".full{path.suffix}").symlink_to("/dev/full")
        with pytest.raises(ValueError, match=f"{path.name}: the disk is full"):
            generate.generate(settings, out, eval_tiny.job(settings))
        assert not path.exists() and not list(path.parent.glob(".*"))
    generate.generate(settings, out, eval_tiny.job(settings))
    assert path.stat().st_size > 0 and folder.count == 2
    if what == "npz":
        assert len(npz.NpzImages(path)) == 16
