"""Generated images and their scores: the same for any number of ranks, any interruption, any order."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from eval import generate
from eval import score as scoring
from eval.features.extract import open_features, read_features
from eval.generate import make_labels, prepare_model
from eval.images import outputs
from eval.images.npz import NpzImages
from eval.images.outputs import OutputsConfig
from eval.images.sources import NpzSource
from eval.recipe import EvalRecipe, FixedLabel, IidLabels, LabelFile
from eval.results import Results
from sfd_scale.diffusion.conditioning import ClassLabels
from sfd_scale.diffusion.guidance import AutoGuidance, ClassifierFreeGuidance
from sfd_scale.diffusion.latents import LatentLayout, LatentStats
from sfd_scale.sample import Loaded, check_guidance_model
from tests.helpers import eval_tiny
from tests.helpers.eval_tiny import CLASSES, CPU, LAYOUT, SCHEDULE, STATS, TinyExtractor, without_run
from tests.helpers.ranks import RankError, run_ranks

LABELS = ClassLabels(CLASSES)


pytestmark = pytest.mark.usefixtures("one_thread")


def rows(folder: Path) -> dict[str, Tensor]:
    found = read_features(open_features(folder))
    assert found.spatial is not None and found.logits is not None and found.labels is not None
    return {"pool": found.pool, "spatial": found.spatial, "logits": found.logits, "labels": found.labels}


# ------------------------------------------------------------------------------------------------- ranks


def test_any_number_of_ranks_and_a_killed_one(tmp_path: Path, reference: NpzSource) -> None:
    settings = eval_tiny.recipe(tmp_path, reference=reference)
    alone = eval_tiny.whole_run(settings, tmp_path / "alone")
    assert alone.scores.fid is not None and alone.scores.fid > 0.1
    assert [key for key, value in alone.scores.by_key().items() if value is None] == ["fdr"]

    with pytest.raises(RankError) as killed:
        run_ranks(eval_tiny.two_ranks, 2, settings, tmp_path, timeout=400.0)
    assert "still running" not in str(killed.value)
    two = Results.read(tmp_path / "two")
    assert without_run(two) == without_run(alone)
    assert two.run.world_size == 2

    ways, one = (
        json.loads((tmp_path / "two" / "ways.json").read_text()),
        eval_tiny.in_other_ways(settings, tmp_path / "two"),
    )
    assert ways["blocks"] == one["blocks"] and 0 < one["blocks"][0] < 1
    known = {key: value for key, value in alone.scores.by_key().items() if value is not None}
    for found in (ways["low_memory"], one["low_memory"]):
        assert {key: found[key] for key in known} == pytest.approx(known, rel=1e-9)

    # Ranks take work as they are done with theirs.
    assert sum(ways["made"]) == 7 and ways["made"][0] > ways["made"][1] > 0

    committed = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "killed" / "chunks").glob("chunk-*")}
    assert 2 <= len(committed) < 7
    for results in run_ranks(eval_tiny.whole_run, 3, settings, tmp_path / "killed", timeout=400.0):
        assert without_run(results) == without_run(alone)
    # What was there was not made again.
    assert all((tmp_path / "killed/chunks" / name).stat().st_mtime_ns == time for name, time in committed.items())

    for other in ("two", "killed", "slow"):
        for name, values in rows(tmp_path / other).items():
            assert torch.equal(values, rows(tmp_path / "alone")[name]), (other, name)
        assert (tmp_path / other / outputs.GRID).read_bytes() == (tmp_path / "alone" / outputs.GRID).read_bytes()


@pytest.mark.full
@pytest.mark.parametrize("ranks", [1, 4])
def test_one_and_four_ranks(tmp_path: Path, reference: NpzSource, ranks: int) -> None:
    settings = eval_tiny.recipe(tmp_path, reference=reference)
    alone = eval_tiny.whole_run(settings, tmp_path / "alone")
    for results in run_ranks(eval_tiny.whole_run, ranks, settings, tmp_path / "many"):
        assert without_run(results) == without_run(alone)


# ------------------------------------------------------------------------------------------------- images


def test_an_image_depends_on_its_number_alone() -> None:
    labels = LABELS.balanced(0, 20)
    sampler = eval_tiny.sampler(batch=8)
    together = sampler.images(range(4, 12), labels[4:12]).images
    others = [17, 6, 2]
    apart = sampler.images(others, labels[others]).images
    assert torch.equal(apart[1], together[2])
    assert not torch.equal(apart[0], apart[2])
    # Another seed, another label: another image.
    assert not torch.equal(eval_tiny.sampler(8, seed=1).images([6], labels[6:7]).images[0], together[2])
    assert not torch.equal(sampler.images([6], (labels[6:7] + 1) % CLASSES).images[0], together[2])


def test_latents_are_denormalised_before_they_are_decoded() -> None:
    seen: list[Tensor] = []

    def decode(latents: Tensor) -> Tensor:
        seen.append(latents)
        return eval_tiny.decode(latents)

    plain = LatentStats(torch.zeros(5).double(), torch.ones(5).double())
    labels = torch.zeros(2, dtype=torch.int64)
    for stats in (STATS, plain):
        eval_tiny.sampler(2, decode=decode, stats=stats).images([0, 1], labels)
    assert torch.allclose(seen[0], STATS.denormalize(seen[1]), atol=1e-6)


def test_latents_that_are_not_finite_are_refused() -> None:
    def broken(x: Tensor, t: Any, y: Tensor) -> Tensor:
        return torch.where((y == 3)[:, None, None, None], torch.nan, x)

    labels = torch.tensor([0, 3, 1])
    with pytest.raises(FloatingPointError, match="1 images .*first is image 11"):
        eval_tiny.sampler(4, velocity=broken).images([10, 11, 12], labels)


# ------------------------------------------------------------------------------------------------- labels


def test_labels(tmp_path: Path) -> None:
    balanced = LABELS.balanced(0, 52)
    assert set(balanced.bincount(minlength=CLASSES).tolist()) == {10, 11}
    assert balanced.tolist() not in (sorted(balanced.tolist()), [i % CLASSES for i in range(52)])
    assert not torch.equal(balanced, LABELS.balanced(1, 52))
    settings = eval_tiny.recipe(tmp_path)
    (tmp_path / "labels.txt").write_text("\n".join(map(str, [2] * 53)))
    for config, expected in ((FixedLabel(label=2), {2}), (LabelFile(path=tmp_path / "labels.txt"), {2})):
        given = eval_tiny.recipe(tmp_path, labels=config)
        assert set(make_labels(given, LABELS).tolist()) == expected and len(make_labels(given, LABELS)) == 53
    iid = make_labels(eval_tiny.recipe(tmp_path, labels=IidLabels()), LABELS)
    assert set(iid.tolist()) == set(range(CLASSES)) and len(set(iid.bincount().tolist())) > 2
    with pytest.raises(ValueError, match="allowed: 0 to 4"):
        make_labels(eval_tiny.recipe(tmp_path, labels=FixedLabel(label=5)), LABELS)
    with pytest.raises(ValueError, match="53 labels; allowed: num_samples, 9"):
        make_labels(eval_tiny.recipe(tmp_path, num_samples=9, labels=LabelFile(path=tmp_path / "labels.txt")), LABELS)
    assert settings.labels.kind == "balanced"
    for wrong in ("cat", "1.5", "9" * 19):
        (tmp_path / "labels.txt").write_text(f"3\n{wrong}\n")
        with pytest.raises(ValueError, match="holds more than class numbers"):
            make_labels(eval_tiny.recipe(tmp_path, labels=LabelFile(path=tmp_path / "labels.txt")), LABELS)


# ------------------------------------------------------------------------------------------------- the folder


def test_every_batch_has_the_same_size(tmp_path: Path) -> None:
    settings, tiny = eval_tiny.recipe(tmp_path), TinyExtractor()
    generate.generate(settings, tmp_path / "out", eval_tiny.job(settings, tiny))
    assert tiny.calls == [8] * 7  # 53 images
    assert len(rows(tmp_path / "out")["pool"]) == 53


def test_a_finished_folder_is_left_alone_and_another_configuration_refused(tmp_path: Path) -> None:
    settings, tiny = eval_tiny.recipe(tmp_path), TinyExtractor()
    generate.generate(settings, tmp_path / "out", eval_tiny.job(settings))
    generate.generate(settings, tmp_path / "out", eval_tiny.job(settings, tiny))
    assert tiny.calls == []
    other = eval_tiny.recipe(tmp_path, seed=1)
    with pytest.raises(ValueError, match=r"other settings \(seed: 0 there, 1 now\)"):
        generate.generate(other, tmp_path / "out", eval_tiny.job(other))


@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
def test_a_damaged_chunk_is_made_again(tmp_path: Path, damage: str) -> None:
    settings, tiny = eval_tiny.recipe(tmp_path), TinyExtractor()
    folder = generate.generate(settings, tmp_path / "out", eval_tiny.job(settings))
    before, file = rows(tmp_path / "out"), folder.file(3)
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-7] if damage == "cut" else b"")
    with pytest.raises(ValueError, match="1 of 7 chunks are missing"):
        open_features(tmp_path / "out")
    generate.generate(settings, tmp_path / "out", eval_tiny.job(settings, tiny))
    assert tiny.calls == [8]
    assert all(torch.equal(values, before[name]) for name, values in rows(tmp_path / "out").items())


def test_results_name_the_weights_that_drew_the_images(tmp_path: Path) -> None:
    settings = dataclasses.replace(eval_tiny.recipe(tmp_path), checkpoint=Path("untrained.safetensors"))
    folder = generate.generate(settings, tmp_path / "out", eval_tiny.job(settings))
    other = dataclasses.replace(settings, checkpoint=Path("trained.safetensors"))  # the recipe's own, at scoring
    assert scoring.checkpoint_of(folder, other) == "untrained.safetensors"


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = eval_tiny.recipe(tmp_path)
    sync, written = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal written
        written += 1
        if written > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="disk is full"):
        generate.generate(settings, tmp_path / "out", eval_tiny.job(settings))
    monkeypatch.setattr(os, "fsync", sync)
    left = sorted(path.name for path in (tmp_path / "out" / "chunks").iterdir())
    assert left == [f"chunk-{number:06d}.safetensors" for number in range(3)]  # and no half-written file
    tiny = TinyExtractor()
    generate.generate(settings, tmp_path / "out", eval_tiny.job(settings, tiny))
    assert len(tiny.calls) == 4


# ------------------------------------------------------------------------------------------------- outputs


def test_outputs(tmp_path: Path) -> None:
    settings = eval_tiny.recipe(tmp_path, outputs=OutputsConfig(npz=True, png=True, grid=2, grid_classes=3))
    generate.generate(settings, tmp_path / "out", eval_tiny.job(settings))
    file = tmp_path / "out" / outputs.NPZ
    images, labels = NpzImages(file).rows(range(53))
    with np.load(file) as plain:  # what ADM's evaluator does
        assert set(plain) == {"arr_0", "arr_1"} and plain["arr_0"].dtype == np.uint8
        assert np.array_equal(plain["arr_0"].transpose(0, 3, 1, 2), images.numpy())
        assert np.array_equal(np.sort(np.bincount(plain["arr_1"])), [10, 10, 11, 11, 11])
    assert labels is not None and torch.equal(labels, LABELS.balanced(0, 53))
    expected = eval_tiny.sampler(8).images([52], labels[52:])
    assert torch.equal(images[52], expected.images[0])
    assert len(list((tmp_path / "out" / outputs.PNG).glob("*.png"))) == 53
    png = scoring.open_images(scoring.source_for(tmp_path / "out" / outputs.PNG)).rows(range(53))
    assert torch.equal(png[0], images) and png[1] is not None and torch.equal(png[1], labels)


def test_the_grid_keeps_only_its_images(tmp_path: Path) -> None:
    settings = eval_tiny.recipe(tmp_path)
    folder = generate.generate(settings, tmp_path / "out", eval_tiny.job(settings))
    kept = torch.cat(list(folder.read("image_numbers"))).tolist()
    labels = LABELS.balanced(0, 53)
    chosen = outputs.grid_rows(settings.outputs, labels)
    assert sorted(kept) == sorted(number for row in chosen for number in row) and len(kept) == 6
    assert all(len(set(labels[row].tolist())) == 1 for row in chosen)
    assert sum(len(load_file(folder.file(chunk))["images"]) for chunk in range(folder.count)) == 6


# ------------------------------------------------------------------------------------------------- the guide


def loaded(**changes: Any) -> Loaded:
    settings: dict[str, Any] = {
        "model": eval_tiny.model(), "layout": LAYOUT, "schedule": SCHEDULE, "stats": STATS,
        "decode": eval_tiny.decode, "conditioning": LABELS, "null_trained": True, "provenance": {"step": 3},
    }  # fmt: skip
    return Loaded(**settings | changes)


def test_a_guide_that_does_not_belong_is_refused() -> None:
    check_guidance_model(loaded(), loaded())
    shifted = LatentStats(STATS.mean + 1, STATS.std)
    with pytest.raises(ValueError, match="hash of the latent statistics"):
        check_guidance_model(loaded(), loaded(stats=shifted))
    check_guidance_model(loaded(), loaded(stats=shifted), allow_stats_mismatch=True)
    with pytest.raises(ValueError, match="latent layout"):
        check_guidance_model(loaded(), loaded(layout=LatentLayout(texture_channels=2, semantic_channels=3, size=4)))


def test_recipes_that_contradict_themselves(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^guide: null"):
        EvalRecipe(guidance=AutoGuidance())
    with pytest.raises(ValueError, match="^guide: .*cfg ignores"):
        EvalRecipe(guide=Path("weak.safetensors"), guidance=ClassifierFreeGuidance(scale_texture=2.0))
    with pytest.raises(ValueError, match="no guidance"):
        ClassifierFreeGuidance(scale_texture=1.0, scale_semantic=1.0)
    with pytest.raises(ValueError, match="checkpoint: null"):
        generate.prepare(eval_tiny.recipe(tmp_path), CPU)


def test_cfg_needs_a_model_that_knows_the_null_label(tmp_path: Path) -> None:
    settings = eval_tiny.recipe(tmp_path, guidance=ClassifierFreeGuidance(scale_texture=2.0))
    with pytest.raises(ValueError, match="needs the null condition of a model trained with label dropout"):
        generate.make_sampler(settings, loaded(null_trained=False), None, CPU)


def test_chunks_of_two_machines_are_warned_about(tmp_path: Path, reference: NpzSource) -> None:
    settings = eval_tiny.recipe(tmp_path, reference=reference)
    folder = generate.generate(settings, tmp_path / "out", eval_tiny.job(settings))
    (machine,) = folder.made_on()
    assert "1 threads" in machine and torch.__version__ in machine
    torch.set_num_threads(2)
    folder.file(2).unlink()
    generate.generate(settings, tmp_path / "out", eval_tiny.job(settings))
    torch.set_num_threads(1)
    results = scoring.score(settings, tmp_path / "out", tmp_path / "results.json", eval_tiny.lazy())
    assert len(results.run.made_on) == 2
    assert any("made in parts on" in warning and "2 threads" in warning for warning in results.warnings)


def test_tf32_is_of_the_model_and_not_of_the_extractor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which float32 products are, holds for all threads: the next batch is not drawn before the last one's features are
    there. On a CPU the images are those of float32."""
    seen: list[tuple[str, str]] = []

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            seen.append((name, torch.backends.cuda.matmul.fp32_precision))
            return function(*args, **options)

        return call

    exact = eval_tiny.recipe(tmp_path, precision="fp32")
    features = {}
    for settings in (exact, dataclasses.replace(exact, precision="tf32")):
        job = eval_tiny.job(settings)
        if settings.precision == "tf32":
            monkeypatch.setattr(type(job.sampler), "draw", watched("draw", type(job.sampler).draw))
            monkeypatch.setattr(type(job.sampler), "pixels", watched("pixels", type(job.sampler).pixels))
        folder = generate.generate(settings, tmp_path / settings.precision, job)
        features[settings.precision] = read_features(folder)
    assert seen == [("draw", "tf32"), ("pixels", "tf32")] * (len(seen) // 2) and len(seen) > 2
    assert torch.backends.cuda.matmul.fp32_precision != "tf32"
    assert torch.equal(features["tf32"].pool, features["fp32"].pool)


def test_the_sampler_of_a_recipe(tmp_path: Path) -> None:
    """The recipe's guidance, precision and kinks reach the sampler; the guide changes the images."""
    guidance = AutoGuidance(scale_texture=2.0, scale_semantic=1.5, interval_start=0.25, interval_mode="both")
    settings = eval_tiny.recipe(tmp_path, guidance=guidance, guide=tmp_path / "weak")
    sampler = generate.make_sampler(settings, loaded(), loaded(model=eval_tiny.model(seed=5)), CPU)
    assert sampler.discontinuities and sampler.batch == 8
    labels = torch.zeros(1, dtype=torch.int64)
    settings_plain = eval_tiny.recipe(tmp_path)
    plain = generate.make_sampler(settings_plain, prepare_model(loaded(), "fp32", compiled=False), None, CPU)
    assert not torch.equal(sampler.images([0], labels).images, plain.images([0], labels).images)
    low = generate.make_sampler(settings_plain, prepare_model(loaded(), "bf16", compiled=False), None, CPU)
    difference = low.images([0], labels).images.float() - plain.images([0], labels).images.float()
    assert 0 < difference.abs().mean() < 4
