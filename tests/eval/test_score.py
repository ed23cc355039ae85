"""Scores of files and features against references, and what is refused on the way."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from eval import generate
from eval.features.config import ConvNetConfig, InceptionConfig
from eval.features.extract import open_features
from eval.images import npz
from eval.images.outputs import OutputsConfig, to_image
from eval.images.sources import NpzSource
from eval.metrics.config import MetricsConfig
from eval.metrics.frechet import frechet_distance
from eval.metrics.inception_score import inception_score
from eval.metrics.moments import moments
from eval.metrics.precision_recall import precision_recall
from eval.recipe import EvalRecipe
from eval.reference import check_spatial_order, load_reference, read_reference
from eval.results import Results
from eval.score import default_out, score
from eval.search.sweep import cells, varying
from eval.validation import measure
from sfd_scale import checkpoint, export
from sfd_scale.diffusion.latents import LatentStats
from sfd_scale.runtime import seeding
from sfd_scale.runtime.weight_files import safetensors_bytes
from sfd_scale.sample import check_guidance_model, load_for_sampling
from tests.helpers import eval_tiny
from tests.helpers.eval_export import pixels, run_eval, write_eval_recipe, write_export, write_npz
from tests.helpers.eval_tiny import CPU, TinyExtractor


@pytest.fixture
def reference(tmp_path: Path) -> NpzSource:
    return NpzSource(path=write_npz(tmp_path / "reference.npz", pixels(60, 0)))


# ------------------------------------------------------------------------------------------------- scores


def test_scores_of_an_npz_are_those_of_its_features(tmp_path: Path, reference: NpzSource) -> None:
    settings = eval_tiny.recipe(tmp_path, reference=reference)
    images, real = pixels(50, 1), pixels(60, 0)
    results = score(settings, write_npz(tmp_path / "samples.npz", images), tmp_path / "r.json", eval_tiny.lazy())
    ours, theirs = TinyExtractor()(images), TinyExtractor()(real)
    assert ours.spatial is not None and theirs.spatial is not None and ours.logits is not None
    scores = results.scores
    assert scores.fid == pytest.approx(frechet_distance(moments(ours.pool), moments(theirs.pool)), abs=1e-9)
    assert scores.sfid == pytest.approx(frechet_distance(moments(ours.spatial), moments(theirs.spatial)), abs=1e-7)
    assert scores.is_mean == pytest.approx(inception_score(ours.logits, 20).mean)
    chosen = seeding.permutation(0, "reference_images", 60)[:40].sort().values
    expected = precision_recall(ours.pool, theirs.pool[chosen], 3)
    assert (scores.precision, scores.recall) == (expected.precision, expected.recall)
    assert results.reference["features_count"] == 40 and results.reference["count"] == 60
    assert Results.read(tmp_path / "r.json") == results
    assert (tmp_path / "r.reference.png").is_file()


def test_a_second_score_takes_everything_from_the_cache(tmp_path: Path, reference: NpzSource) -> None:
    settings = eval_tiny.recipe(tmp_path, reference=reference)
    samples, tiny = write_npz(tmp_path / "samples.npz", pixels(50, 1)), TinyExtractor()
    first = score(settings, samples, tmp_path / "r.json", eval_tiny.lazy())
    second = score(settings, samples, tmp_path / "r.json", eval_tiny.lazy(tiny))
    assert tiny.calls == [] and second.scores == first.scores and second.id == first.id
    # Another reference under the same name is seen.
    write_npz(reference.path, pixels(60, 2))
    third = score(settings, samples, tmp_path / "r.json", eval_tiny.lazy(tiny))
    assert tiny.calls and third.scores.fid != first.scores.fid and third.id != first.id


def test_low_memory_moments(tmp_path: Path, reference: NpzSource) -> None:
    samples = write_npz(tmp_path / "samples.npz", pixels(50, 1))
    fids = []
    for mode in ("exact", "low_memory"):
        settings = eval_tiny.recipe(
            tmp_path, reference=reference, metrics=MetricsConfig(is_split=20, kid_subsets=0, mode=mode)
        )
        results = score(settings, samples, tmp_path / "r.json", eval_tiny.lazy())
        assert results.scores.kid_mean is None
        fids.append((results.scores.fid, results.scores.sfid))
    assert fids[0] == pytest.approx(fids[1], rel=1e-9)


def test_warnings_are_in_the_results(tmp_path: Path, reference: NpzSource) -> None:
    settings = eval_tiny.recipe(tmp_path, reference=reference, metrics=MetricsConfig(is_split=12, kid_subsets=0))
    labels = torch.arange(50) // 10
    samples = write_npz(tmp_path / "samples.npz", pixels(50, 1), arr_1=labels.numpy())
    found = " ".join(score(settings, samples, tmp_path / "r.json", eval_tiny.lazy()).warnings)
    assert "labels are in class order" in found and "not a multiple of the split of 12" in found
    few = write_npz(tmp_path / "few.npz", pixels(10, 1))
    found = " ".join(score(settings, few, tmp_path / "few.json", eval_tiny.lazy()).warnings)
    assert "10 samples for 12 features: the covariance is singular and FID is biased upwards" in found
    assert "pixels" not in found
    larger = write_npz(tmp_path / "larger.npz", pixels(24, 1).repeat_interleave(2, 2).repeat_interleave(2, 3))
    found = " ".join(score(settings, larger, tmp_path / "larger.json", eval_tiny.lazy()).warnings)
    assert "samples of 32 pixels, a reference of 16" in found
    assert "the same as an earlier one" not in found
    twice = write_npz(tmp_path / "twice.npz", pixels(40, 1).repeat(2, 1, 1, 1))
    found = " ".join(score(settings, twice, tmp_path / "twice.json", eval_tiny.lazy()).warnings)
    assert "40 of 80 samples are the same as an earlier one, as where several processes draw with one seed" in found


def test_samples_that_are_jpeg_files_are_said(
    tmp_path: Path, reference: NpzSource, caplog: pytest.LogCaptureFixture
) -> None:
    """pytorch-fid#74 asks whether PNG and JPEG may be mixed. The reference may be JPEG, as ImageNet is."""
    settings = eval_tiny.recipe(tmp_path, reference=reference)
    for name, suffix in (("png", ".png"), ("jpeg", ".JPG")):
        for number, image in enumerate(pixels(20, 1)):
            path = tmp_path / name / f"{number:02d}{suffix}"
            path.parent.mkdir(exist_ok=True)
            to_image(image).save(path, "JPEG" if suffix == ".JPG" else "PNG")
        score(settings, tmp_path / name, tmp_path / f"{name}.json", eval_tiny.lazy())
        told = f"{tmp_path / name}: 20 of 20 samples are JPEG files, whose compression moves every score"
        assert (told in caplog.text) == (name == "jpeg")


def test_a_damaged_folder_of_features_is_named(tmp_path: Path, reference: NpzSource) -> None:
    """piq#102: a value that is not finite ended in an error of linear algebra, a number as text in a TypeError."""
    settings = eval_tiny.recipe(tmp_path, reference=reference)
    samples, out = write_npz(tmp_path / "samples.npz", pixels(50, 1)), tmp_path / "r.json"
    score(settings, samples, out, eval_tiny.lazy())
    folder = Path(Results.read(out).run.features)
    chunk = folder / "chunks" / "chunk-000001.safetensors"
    tensors = load_file(chunk)
    tensors["pool"][3, 0] = torch.nan
    save_file(tensors, chunk)
    with pytest.raises(
        ValueError, match=r"pool of image 19 is not finite, so .*chunk-000001\.safetensors is damaged; rem"
    ):
        score(settings, samples, out, eval_tiny.lazy())
    chunk.unlink()
    assert score(settings, samples, out, eval_tiny.lazy()).scores.fid is not None
    for wrong in ({"num_samples": "50"}, {"batch": 0}, {"extractor": None}):
        kept = json.loads((folder / "config.json").read_text()) | wrong
        (tmp_path / "config.json").write_text(
            json.dumps({key: value for key, value in kept.items() if value is not None})
        )
        with pytest.raises(ValueError, match=r"config\.json: not of a folder of features; allowed"):
            open_features(tmp_path)


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path, reference: NpzSource) -> None:
    settings = eval_tiny.recipe(tmp_path, reference=reference)
    samples, tiny = write_npz(tmp_path / "samples.npz", pixels(50, 1)), TinyExtractor()
    score(settings, samples, tmp_path / "folder" / "results.json", eval_tiny.lazy())
    for out, message in (
        (tmp_path / "folder", "folder is a folder; allowed: a file in it"),
        (samples / "r", "no folder"),
    ):
        with pytest.raises(ValueError, match=rf"--out: .*{message}"):
            score(dataclasses.replace(settings, cache=tmp_path / "new"), samples, out, eval_tiny.lazy(tiny))
        with pytest.raises(ValueError, match=rf"--out: .*{message}"):
            measure(settings, samples, out)
    assert tiny.calls == []


# ------------------------------------------------------------------------------------------------- results.json


def test_results_carry_the_whole_name_of_their_samples(tmp_path: Path) -> None:
    for name in ("cfg-1.25", "cfg-1.5"):
        (tmp_path / name).mkdir()
    names = [default_out(tmp_path / name).name for name in ("cfg-1.25", "cfg-1.5", "cfg-1.25.npz")]
    assert names == ["cfg-1.25.results.json", "cfg-1.5.results.json", "cfg-1.25.npz.results.json"]
    (tmp_path / "cfg-1.5" / "config.json").write_text("{}")  # a folder of `generate`
    assert default_out(tmp_path / "cfg-1.5") == tmp_path / "cfg-1.5" / "results.json"


def test_pictures_of_the_reference_carry_the_whole_name_too(tmp_path: Path, reference: NpzSource) -> None:
    settings = eval_tiny.recipe(tmp_path, reference=reference)
    samples = write_npz(tmp_path / "samples.npz", pixels(50, 1))
    results = score(settings, samples, tmp_path / "cfg-1.25", eval_tiny.lazy())
    assert results.run.reference_grid == str(tmp_path / "cfg-1.25.reference.png")
    assert (tmp_path / "cfg-1.25.reference.png").is_file()


def test_results_of_other_samples_are_not_replaced(tmp_path: Path, reference: NpzSource) -> None:
    settings = eval_tiny.recipe(tmp_path, reference=reference)
    first, other = (write_npz(tmp_path / f"{seed}.npz", pixels(50, seed)) for seed in (1, 2))
    out = tmp_path / "r.json"
    score(settings, first, out, eval_tiny.lazy())
    before = out.read_bytes()
    with pytest.raises(ValueError, match=r"r\.json holds the results of other samples \(images differ\); allowed"):
        score(settings, other, out, eval_tiny.lazy())
    assert out.read_bytes() == before
    # Other settings of the score, and the same images in another file: the same samples.
    again = eval_tiny.recipe(tmp_path, reference=reference, metrics=MetricsConfig(is_split=10, kid_subsets=0))
    assert score(again, shutil.copy(first, tmp_path / "copy.npz"), out, eval_tiny.lazy()).metrics.is_split == 10
    out.write_text("my notes")
    with pytest.raises(ValueError, match=r"r\.json exists and holds no results"):
        score(settings, first, out, eval_tiny.lazy())
    assert out.read_text() == "my notes"


# ------------------------------------------------------------------------------------------------- bad input


def test_samples_that_cannot_be_scored(tmp_path: Path, reference: NpzSource) -> None:
    settings = eval_tiny.recipe(tmp_path, reference=reference)

    def refused(path: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            score(settings, path, tmp_path / "r.json", eval_tiny.lazy())

    stored = write_npz(tmp_path / "mu.npz", pixels(5, 1), mu=np.zeros(3), sigma=np.eye(3))
    refused(stored, "holds mu, sigma beside the images; ADM's evaluator would score these")
    floats = tmp_path / "floats.npz"
    np.savez(floats, np.full((4, 16, 16, 3), np.nan, dtype=np.float32))
    refused(floats, "float32 .* with NaN in it; allowed: uint8")
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    refused(tmp_path / "other.npz", "holds images; images have to be named arr_0")
    (tmp_path / "torn.npz").write_bytes(stored.read_bytes()[:100])
    refused(tmp_path / "torn.npz", "torn.npz is truncated: the list of its contents")
    refused(tmp_path / "none", "there is nothing at this path")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no images in it")


def test_features_of_another_extractor_are_refused(tmp_path: Path, reference: NpzSource) -> None:
    settings = eval_tiny.recipe(tmp_path, reference=reference)
    generate.generate(settings, tmp_path / "out", eval_tiny.job(settings))
    with pytest.raises(ValueError, match="features are of tiny:1, the recipe's extractor is inception"):
        score(settings, tmp_path / "out", tmp_path / "r.json")


# ------------------------------------------------------------------------------------------------- ADM's reference


def inception_statistics(swapped: bool = False) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    maps = draw.random((1, 1, 7)) * 2 + 0.1 * draw.random((17, 17, 7))
    flat = (maps.transpose(2, 0, 1) if swapped else maps).reshape(-1)
    return {
        "mu": draw.random(2048).astype(np.float32), "sigma": np.eye(2048, dtype=np.float64),
        "mu_s": flat.astype(np.float32), "sigma_s": np.eye(2023, dtype=np.float32), "what": np.array(["?"]),
    }  # fmt: skip


def test_a_reference_of_statistics(tmp_path: Path) -> None:
    stored = inception_statistics()
    np.savez(tmp_path / "adm.npz", **stored)
    settings = eval_tiny.recipe(tmp_path, reference=NpzSource(path=tmp_path / "adm.npz"))
    found = load_reference(settings, eval_tiny.lazy())
    assert found.features is None and found.spatial is not None
    assert found.pool.mean.dtype == torch.float64
    assert np.array_equal(found.pool.mean.numpy(), stored["mu"].astype(np.float64))
    wrong = eval_tiny.recipe(tmp_path, reference=settings.reference, extractor=ConvNetConfig(weights=tmp_path / "x"))
    with pytest.raises(ValueError, match="statistics are of Inception features, but the extractor is convnet"):
        load_reference(wrong, eval_tiny.lazy())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu": np.zeros(64), "sigma": np.eye(64)}, "mu has 64 entries; Inception has 2048"),
        ({"sigma": np.eye(64)}, r"mu has 2048 entries and sigma the shape \(64, 64\)"),
        ({"sigma": None}, "has mu without its partner"),
        ({"mu_s": np.full(2023, np.nan)}, "mu_s or sigma_s is not finite"),
    ],
)
def test_wrong_statistics_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    stored = {key: value for key, value in (inception_statistics() | change).items() if value is not None}
    np.savez(tmp_path / "adm.npz", **stored)
    settings = eval_tiny.recipe(tmp_path, reference=NpzSource(path=tmp_path / "adm.npz"))
    with pytest.raises(ValueError, match=message):
        load_reference(settings, eval_tiny.lazy())


def test_a_reference_with_swapped_layout_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "adm.npz", **inception_statistics(swapped=True))
    settings = eval_tiny.recipe(tmp_path, reference=NpzSource(path=tmp_path / "adm.npz"))
    with pytest.raises(ValueError, match="in \\(channel, row, column\\) order"):
        load_reference(settings, eval_tiny.lazy())
    spatial = TinyExtractor()(pixels(50, 0)).spatial
    assert spatial is not None
    check_spatial_order(spatial.mean(0), (4, 4, 7), "here")
    turned = spatial.reshape(-1, 16, 7).transpose(1, 2).reshape(-1, 112)
    with pytest.raises(ValueError, match="here: the spatial statistics"):
        check_spatial_order(turned.mean(0), (4, 4, 7), "here")
    # And what it would do to sFID: orders of magnitude.
    right = frechet_distance(moments(spatial[:25]), moments(spatial[25:]))
    assert frechet_distance(moments(turned[:25]), moments(spatial[25:])) > 10 * right


def test_statistics_and_images_together(tmp_path: Path) -> None:
    """ADM's reference: FID against the stored moments, precision and recall against the images."""
    images = pixels(30, 0)
    write_npz(tmp_path / "adm.npz", images, **inception_statistics())
    settings = eval_tiny.recipe(tmp_path, reference=NpzSource(path=tmp_path / "adm.npz"), extractor=InceptionConfig())
    found = load_reference(settings, eval_tiny.lazy())
    assert found.pool.mean.shape == (2048,) and found.features is not None
    assert torch.equal(found.features, TinyExtractor()(images).pool)


# ------------------------------------------------------------------------------------------------- npz


def test_npz_round_trip(tmp_path: Path) -> None:
    images, labels = pixels(37, 3), torch.arange(37) % 4
    npz.write_images(tmp_path / "a.npz", images.split(10), 37, (16, 16), labels)
    np.savez(tmp_path / "plain.npz", arr_0=images.permute(0, 2, 3, 1).numpy(), arr_1=labels.numpy())
    np.savez_compressed(tmp_path / "small.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    for name in ("a", "plain", "small"):
        opened = npz.NpzImages(tmp_path / f"{name}.npz")
        assert len(opened) == 37 and torch.equal(opened.rows(range(5, 37))[0], images[5:])
    assert abs((tmp_path / "a.npz").stat().st_size - (tmp_path / "plain.npz").stat().st_size) < 200
    with pytest.raises(ValueError, match="20 images and 37 labels, expected 37"):
        npz.write_images(tmp_path / "b.npz", images[:20].split(10), 37, (16, 16), labels)
    assert not (tmp_path / "b.npz").exists()


# ------------------------------------------------------------------------------------------------- by command


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    return write_export(tmp_path)


@pytest.fixture
def recipe(tmp_path: Path, exported: Path) -> Path:
    return write_eval_recipe(tmp_path, exported)


def test_the_commands(tmp_path: Path, recipe: Path) -> None:
    out = tmp_path / "out"
    run_eval("generate", recipe, "seed=3", "--out", out)
    shown = run_eval("score", recipe, "--samples", out)
    assert "precision" in shown
    results = Results.read(out / "results.json")
    assert [key for key, value in results.scores.by_key().items() if value is None] == ["fdr"]
    assert results.samples["seed"] == 3 and results.samples["checkpoint"]["step"] == 0
    assert results.samples["guidance"]["scale_texture"] == 1.5 and results.nfe == 2
    run_eval("report", "--result", out / "results.json", "--out", tmp_path / "report")
    assert "tiny, untrained" in (tmp_path / "report" / "index.html").read_text()
    run_eval("reference", recipe)
    with pytest.raises(ValueError, match="num_smaples: unknown key"):
        run_eval("generate", recipe, "num_smaples=3", "--out", out)
    # A guide that is another model than its file says, and one that is none.
    with pytest.raises(ValueError, match="not a file of `sfd export`"):
        run_eval(
            "generate", recipe, "guidance={kind: autoguidance}", "--guide", tmp_path / "no", "--out", tmp_path / "o2"
        )


def test_sweep_and_compare(tmp_path: Path, recipe: Path) -> None:
    grid = ("guidance.scale_texture=1.5,3.0", "sampler.num_steps=1,2", "seed=1")
    words = ("sweep", recipe, *grid, "--out", tmp_path / "s")
    run_eval(*words)
    rows = json.loads((tmp_path / "s" / "sweep.json").read_text())["done"]
    assert [list(row["settings"].values()) for row in rows] == [["1.5", "1"], ["1.5", "2"], ["3.0", "1"], ["3.0", "2"]]
    assert rows[0]["scores"]["fid"] != rows[1]["scores"]["fid"] and [row["nfe"] for row in rows] == [1, 2, 1, 2]
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "s" / "cells").rglob("*.*")}
    assert len(list((tmp_path / "s").rglob("chunk-*"))) == 12
    run_eval(*words)
    assert times == {file: file.stat().st_mtime_ns for file in (tmp_path / "s" / "cells").rglob("*.*")}
    # The same noise in every cell, so that comparing two is paired.
    a, b = rows[0]["folder"], rows[1]["folder"]
    run_eval("compare", a, b, "--out", tmp_path / "c.json", "--rounds", 50)
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["paired"] and [row["score"] for row in found["scores"]][0] == "fid"
    assert found["scores"][0]["difference"] == pytest.approx(
        rows[1]["scores"]["fid"] - rows[0]["scores"]["fid"], abs=1e-6
    )
    assert found["settings"] == {"samples.sampler.num_steps": ["1", "2"]}
    with pytest.raises(ValueError, match="metrics: varies; the scores of a sweep have to share it"):
        run_eval("sweep", recipe, "metrics.is_split=6,12", "--out", tmp_path / "s")
    with pytest.raises(ValueError, match="nothing varies"):
        run_eval("sweep", recipe, "seed=1", "--out", tmp_path / "s")
    with pytest.raises(ValueError, match="sampler.num_steps: 0"):
        run_eval("sweep", recipe, "sampler.num_steps=2,0", "--out", tmp_path / "s")


def test_a_sweep_notices_another_file_of_labels(tmp_path: Path, recipe: Path) -> None:
    labels = tmp_path / "labels.txt"
    words = ("sweep", recipe, "sampler.num_steps=1,2", "labels.kind=file", f"labels.path={labels}", "num_samples=12",
             "--out", tmp_path / "s")  # fmt: skip
    labels.write_text("0\n" * 12)
    run_eval(*words)
    labels.write_text("1\n" * 12)
    with pytest.raises(ValueError, match="labels"):
        run_eval(*words)


def test_cells_that_do_not_share_noise_are_said_to(recipe: Path) -> None:
    todo = cells(str(recipe), ["seed=1,2", "num_samples=24"])
    assert varying(todo, ("seed", "labels", "num_samples")) == ["seed"] and not varying(todo, ("reference",))


def test_a_checkpoint_whose_weights_have_another_layout(tmp_path: Path, exported: Path) -> None:
    weights, note = checkpoint.load_weights(exported), export.read_note(exported)
    note["recipe"]["latents"]["semantic_channels"] = 2
    other = tmp_path / "other.safetensors"
    checkpoint.save_weights(weights, other, {export.EXPORT_KEY: json.dumps(note)})
    with pytest.raises(ValueError, match="other.safetensors: its weights do not fit the model"):
        load_for_sampling(other, CPU)


def test_a_checkpoint_of_another_layout_is_refused_as_guide(tmp_path: Path, exported: Path) -> None:
    loaded = load_for_sampling(exported, CPU)
    shutil.copy(exported, tmp_path / "guide.safetensors")
    guide = load_for_sampling(tmp_path / "guide.safetensors", CPU)
    check_guidance_model(loaded, guide)
    other = LatentStats(loaded.stats.mean + 1, loaded.stats.std)
    object.__setattr__(guide, "stats", other)
    with pytest.raises(ValueError, match="hash of the latent statistics"):
        check_guidance_model(loaded, guide)


def test_outputs_config_and_recipe_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="^grid: -1"):
        OutputsConfig(grid=-1)
    with pytest.raises(ValueError, match="^num_samples: 1"):
        EvalRecipe(num_samples=1)


def test_a_bit_that_flips_in_a_cached_reference_is_named(tmp_path: Path) -> None:
    file = tmp_path / "reference.safetensors"
    tensors = {"mu": torch.arange(4.0).double(), "sigma": torch.eye(4).double(), "count": torch.tensor(9)}
    file.write_bytes(safetensors_bytes(tensors))
    assert read_reference(file, {}).provenance["count"] == 9
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"reference.safetensors is damaged: sigma has another checksum .* anew"):
        read_reference(file, {})
