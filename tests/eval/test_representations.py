"""Several representations of one generation: features and statistics apart, FD of each, FDr, and the protocol."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from eval import generate
from eval import score as scoring
from eval.__main__ import app
from eval.comparison.groups import read_group
from eval.features.config import ConvNetConfig, InceptionConfig, PresetConfig, TimmExtractorConfig
from eval.features.extract import open_features, read_features
from eval.features.presets import PUBLISHED_VALIDATION_FD
from eval.images.sources import NpzSource, open_images
from eval.metrics.frechet import frechet_distance
from eval.metrics.moments import moments
from eval.metrics.scores import Scores
from eval.recipe import EvalRecipe
from eval.reference import Judge, load_judges, load_reference
from eval.results import Results, ScoreRow, ValidationFD, read_table
from eval.validation import measure
from eval.watch import _report_epochs, epochs_to_fid
from sfd_scale import checkpoint, config
from sfd_scale.data.sources import FolderConfig
from sfd_scale.runtime.run_paths import EvaluationPaths
from sfd_scale.toy.convnet import SmallConvNet, SmallConvNetConfig
from tests.helpers import eval_tiny, small_run
from tests.helpers.eval_tiny import SmallerExtractor, TinyExtractor, lazy, lazy_further, without_run
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.usefixtures("one_thread")


def chunk_times(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in (folder / "chunks").glob("chunk-*")}


# ------------------------------------------------------------------------------------------------- one generation


def test_a_further_extractor_gets_the_same_images_and_changes_no_main_score(
    tmp_path: Path, reference: NpzSource
) -> None:
    settings = eval_tiny.recipe(tmp_path, reference=reference)
    alone = eval_tiny.whole_run(settings, tmp_path / "alone")
    both = eval_tiny.with_further(settings, tmp_path / "both")
    assert both.scores == alone.scores and both.samples == alone.samples and both.reference == alone.reference
    main = [read_features(open_features(tmp_path / name)) for name in ("alone", "both")]
    assert torch.equal(main[0].pool, main[1].pool)
    found = both.representations["smaller"]
    own = read_features(open_features(tmp_path / "both" / "representations" / "smaller"))
    assert own.pool.shape == (53, 6) and own.labels is not None and torch.equal(own.labels, main[1].labels)
    with np.load(reference.path) as file:
        real = SmallerExtractor()(torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)).pool
    assert found.scores.fid == pytest.approx(frechet_distance(moments(own.pool), moments(real)), rel=1e-6)
    assert both.fd == {"inception": both.scores.fid, "smaller": found.scores.fid}
    assert found.scores.sfid is None and not any("sFID" in text for text in found.warnings)
    for score in ("precision", "recall", "kid_mean", "mind", "density", "coverage"):
        assert found.scores.by_key()[score] is not None
    assert Results.read(tmp_path / "both") == both


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.full), 2, *(
    pytest.param(count, marks=pytest.mark.full) for count in (3, 4)
)])  # fmt: skip
def test_any_number_of_ranks_gives_the_same_bits(tmp_path: Path, reference: NpzSource, ranks: int) -> None:
    settings = eval_tiny.recipe(tmp_path, reference=reference)
    alone = eval_tiny.with_further(settings, tmp_path / "alone")
    for results in run_ranks(eval_tiny.with_further, ranks, settings, tmp_path / "many", timeout=400.0):
        assert without_run(results) == without_run(alone)
    for part in (".", "representations/smaller"):
        one, many = (read_features(open_features(tmp_path / name / part)).pool for name in ("alone", "many"))
        assert torch.equal(one, many)


def test_an_extractor_that_is_added_later_draws_for_itself_alone(tmp_path: Path, reference: NpzSource) -> None:
    settings = eval_tiny.recipe(tmp_path, reference=reference)
    out, further = tmp_path / "out", tmp_path / "out" / "representations" / "smaller"
    generate.generate(settings, out, eval_tiny.job(settings))
    judges = {name: Judge(own, load_reference(settings, own, name)) for name, own in lazy_further().items()}
    with pytest.raises(ValueError, match="smaller: no features of this extractor yet; `eval generate` .* adds them"):
        scoring.score(settings, out, out / "r.json", lazy(), judges=judges)
    before, tiny, smaller = chunk_times(out), TinyExtractor(), SmallerExtractor()
    generate.generate(settings, out, eval_tiny.job(settings, tiny, lazy_further(smaller)))
    assert chunk_times(out) == before and tiny.calls == [] and smaller.calls == [8] * 7
    # Each folder continues for itself.
    (further / "chunks" / "chunk-000003.safetensors").unlink()
    (out / "chunks" / "chunk-000005.safetensors").unlink()
    kept = chunk_times(further)
    generate.generate(settings, out, eval_tiny.job(settings, tiny, lazy_further(smaller)))
    assert tiny.calls == [8] and smaller.calls == [8] * 8
    assert chunk_times(further).items() >= kept.items()
    once = eval_tiny.with_further(settings, tmp_path / "once")
    assert without_run(scoring.score(settings, out, out / "r.json", lazy(), judges=judges)) == without_run(once)
    # A folder of another network is refused.
    changed = json.loads((further / "config.json").read_text()) | {"extractor": "smaller:0"}
    (further / "config.json").write_text(json.dumps(changed))
    with pytest.raises(
        ValueError, match=r"smaller: its features are of smaller:0, the recipe's extractor is smaller:1"
    ):
        scoring.score(settings, out, out / "r.json", lazy(), judges=judges)


def test_given_images_are_read_once_for_all_extractors(
    tmp_path: Path, reference: NpzSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eval.images import npz

    read: list[range] = []
    rows = npz.NpzImages.rows

    def counted(self: npz.NpzImages, numbers: range) -> tuple[Tensor, Tensor | None]:
        read.append(numbers)
        return rows(self, numbers)

    settings = eval_tiny.recipe(tmp_path, reference=reference)
    judges = {name: Judge(own, load_reference(settings, own, name)) for name, own in lazy_further().items()}
    main = load_reference(settings, lazy())
    monkeypatch.setattr(npz.NpzImages, "rows", counted)
    np.savez(tmp_path / "samples.npz", np.random.default_rng(1).integers(0, 256, (50, 16, 16, 3), dtype=np.uint8))
    found = scoring.score(settings, tmp_path / "samples.npz", tmp_path / "r.json", lazy(), main, judges)
    assert [len(numbers) for numbers in read] == [16, 16, 16, 2] and found.representations["smaller"].scores.fid


# ------------------------------------------------------------------------------------------------- FDr


def test_fdr_is_the_mean_ratio_to_the_validation_set(tmp_path: Path, reference: NpzSource) -> None:
    numbers = {"inception": 2.0, "smaller": 0.05}
    settings = eval_tiny.recipe(tmp_path, reference=reference)
    out = tmp_path / "out"
    plain = eval_tiny.with_further(settings, out)
    assert plain.scores.fdr is None and "fdr" not in plain.as_json()["scores"]
    judges = {name: Judge(own, load_reference(settings, own, name)) for name, own in lazy_further().items()}
    made = {
        name: {"fd": numbers[name], "reference": {key: used[key] for key in ("data", "extractor", "batch")}}
        for name, used in (("inception", plain.reference), ("smaller", plain.representations["smaller"].reference))
    }
    file = tmp_path / "validation.json"
    file.write_text(json.dumps({"format": 1, "images": "npz:x", "count": 50, "extractors": made}))
    measured = dataclasses.replace(settings, validation=file)
    found = scoring.score(measured, out, out / "r.json", lazy(), judges=judges)
    assert plain.scores.fid is not None and plain.representations["smaller"].scores.fid is not None
    ratios = {"inception": plain.scores.fid / 2, "smaller": plain.representations["smaller"].scores.fid / 0.05}
    assert found.fd_ratios == pytest.approx(ratios, rel=1e-12)
    assert found.scores.fdr == pytest.approx(sum(ratios.values()) / 2, rel=1e-12)
    assert found.validation == ValidationFD(source="npz:x, 50 images", fd=numbers) and found.id != plain.id
    # Published numbers know no network of ours.
    published = dataclasses.replace(settings, validation="published")
    found = scoring.score(published, out, out / "r.json", lazy(), judges=judges)
    assert found.scores.fdr is None and any(
        text == "no FDr: validation has no number for smaller" for text in found.warnings
    )
    assert found.fd_ratios == pytest.approx({"inception": plain.scores.fid / 1.68})
    made["smaller"]["reference"] = {**made["smaller"]["reference"], "data": "npz:other"}
    file.write_text(json.dumps({"format": 1, "images": "npz:x", "count": 50, "extractors": made}))
    with pytest.raises(ValueError, match=r"validation.json has smaller with data npz:other, the recipe has npz:"):
        scoring.score(measured, out, out / "r.json", lazy(), judges=judges)


def test_validation_images_in_class_folders_have_the_size_of_the_reference(tmp_path: Path) -> None:
    """ImageNet's validation images have many sizes. They were cropped to the size of the first one."""
    net = SmallConvNet(SmallConvNetConfig())
    net.init_weights(0)
    checkpoint.save_weights(net.state_dict(), tmp_path / "net.safetensors", {})
    draw = np.random.default_rng(0)
    np.savez(tmp_path / "reference.npz", draw.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8))
    for number in range(12):
        side = 33 + number
        (tmp_path / "val" / str(number % 2)).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(draw.integers(0, 256, (side, side + 4, 3), dtype=np.uint8))
        image.save(tmp_path / "val" / str(number % 2) / f"{number}.png")
    settings = eval_tiny.recipe(
        tmp_path, reference=NpzSource(path=tmp_path / "reference.npz"),
        extractor=ConvNetConfig(weights=tmp_path / "net.safetensors"),
    )  # fmt: skip
    found = measure(settings, tmp_path / "val", tmp_path / "v.json")
    cropped = open_images(FolderConfig(path=tmp_path / "val", size=32))
    assert json.loads((tmp_path / "v.json").read_text())["images"] == cropped.fingerprint
    real = moments(net(open_images(NpzSource(path=tmp_path / "reference.npz")).rows(range(20))[0]).pooled)
    expected = frechet_distance(moments(net(cropped.rows(range(12))[0]).pooled), real)
    assert list(found.values()) == [pytest.approx(expected, rel=1e-5)]


def test_the_published_numbers_are_those_of_fd_loss() -> None:
    assert PUBLISHED_VALIDATION_FD == {
        "inception": 1.68, "convnextv2_b": 56.87, "dinov2_l": 14.19, "mae_l": 0.04, "siglip2": 0.60, "clip_l": 5.60,
    }  # fmt: skip


def test_statistics_of_a_file_may_be_of_a_further_network(tmp_path: Path, reference: NpzSource) -> None:
    rows = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    stored = moments(rows)
    np.savez(tmp_path / "smaller.npz", mu=stored.mean.numpy(), sigma=stored.cov.numpy(), avg_mu=np.zeros(6))
    own = NpzSource(path=tmp_path / "smaller.npz")
    settings = eval_tiny.recipe(tmp_path, reference=reference, references={"smaller": own})
    found = load_reference(settings, lazy_further()["smaller"], "smaller")
    assert torch.allclose(found.pool.cov, stored.cov) and found.features is None
    with pytest.raises(ValueError, match=r"references\.smaller with statistics of that network"):
        load_reference(
            dataclasses.replace(settings, reference=own, references={}), lazy_further()["smaller"], "smaller"
        )
    with pytest.raises(ValueError, match=r"references: smaller; allowed: an extractor beside the main one"):
        load_judges(settings, eval_tiny.CPU)


# ------------------------------------------------------------------------------------------------- the recipe


def test_extractors_of_a_recipe(tmp_path: Path) -> None:
    for name in ("dinov2_l.safetensors", "mae_l.pth"):
        (tmp_path / name).touch()
    file = tmp_path / "eval.yaml"
    file.write_text("kind: eval\nextractor: {kind: inception}\n")
    words = [f"extractor_weights={tmp_path}", "extractors=[inception,dinov2_l,{kind: clip_l, weights: a.pth},mae_l]"]
    recipe = config.load(file, EvalRecipe, words)
    assert recipe.further_extractors() == {
        "dinov2_l": PresetConfig(kind="dinov2_l", weights=tmp_path / "dinov2_l.safetensors"),
        "clip_l": PresetConfig(kind="clip_l", weights=Path("a.pth")),
        "mae_l": PresetConfig(kind="mae_l", weights=tmp_path / "mae_l.pth"),
    }
    with pytest.raises(ValueError, match=r"extractor_weights: .* has no siglip2\.\*; allowed: a folder with siglip2"):
        dataclasses.replace(recipe, extractors=("siglip2",)).further_extractors()
    with pytest.raises(config.ConfigError, match="extractors.0: 'dinov9'; allowed: .*dinov2_l"):
        config.load(file, EvalRecipe, ["extractors=[dinov9]"])
    two = [TimmExtractorConfig(model="a", weights=Path("a"), pooling=pooling) for pooling in ("token", "avg")]
    assert list(EvalRecipe(extractors=(*two, InceptionConfig())).further_extractors()) == ["a", "a-2"]
    other = EvalRecipe(extractor=ConvNetConfig(weights=Path("c")), extractors=("inception",))
    assert other.further_extractors() == {"inception": InceptionConfig()}


def test_the_commands_with_networks_of_timm(tmp_path: Path, reference: NpzSource) -> None:
    for name, model in (("one", "test_vit"), ("two", "test_convnext")):
        save_file(timm.create_model(model, pretrained=False).state_dict(), tmp_path / f"{name}.safetensors")
    networks = [
        f"{{kind: timm, model: test_{model}, weights: {tmp_path}/{name}.safetensors}}"
        for name, model in (("one", "vit"), ("two", "convnext"))
    ]
    (tmp_path / "eval.yaml").write_text(
        f"kind: eval\nextractor: {networks[0]}\nextractors: [{', '.join(networks)}]\n"
        f"reference: {{kind: npz, path: {reference.path}}}\ncache: {tmp_path}/cache\n"
        "metrics: {kid_subsets: 2, kid_size: 20, mind_projections: 50}\n"
    )
    for name, seed in (("samples", 1), ("validation", 2)):
        np.savez(
            tmp_path / f"{name}.npz", np.random.default_rng(seed).integers(0, 256, (30, 16, 16, 3), dtype=np.uint8)
        )
    recipe, file = str(tmp_path / "eval.yaml"), str(tmp_path / "validation.json")
    run = CliRunner()
    measured = run.invoke(app, ["validation", recipe, "--images", str(tmp_path / "validation.npz"), "--out", file])
    assert measured.exit_code == 0, measured.output
    scored = run.invoke(app, ["score", recipe, "--samples", str(tmp_path / "samples.npz"), f"validation={file}"])
    assert scored.exit_code == 0 and "fd (test_convnext)" in scored.output, scored.output
    results = Results.read(tmp_path / "samples.npz.results.json")
    assert list(results.fd) == ["test_vit", "test_convnext"] and results.validation is not None
    assert results.scores.fdr == pytest.approx(np.mean([results.fd[n] / results.validation.fd[n] for n in results.fd]))
    # The validation set itself has FDr 1.
    words = ["score", recipe, "--samples", str(tmp_path / "validation.npz"), f"validation={file}"]
    assert run.invoke(app, words).exit_code == 0
    assert Results.read(tmp_path / "validation.npz.results.json").scores.fdr == pytest.approx(1.0, rel=1e-9)
    sides = [str(tmp_path / f"{name}.npz.results.json") for name in ("samples", "validation")]
    compared = run.invoke(app, ["compare", *sides, "--rounds", "20", "--out", str(tmp_path / "compared.json")])
    assert compared.exit_code == 0, compared.output
    rows = {row["score"]: row for row in json.loads((tmp_path / "compared.json").read_text())["scores"]}
    assert {"mind", "mind (test_convnext)", "recall (test_convnext)"} <= rows.keys()
    assert rows["fd (test_convnext)"]["a"] == pytest.approx(results.fd["test_convnext"])
    assert rows["fdr"]["a"] == results.scores.fdr and rows["fdr"]["b"] == pytest.approx(1.0, rel=1e-9)
    (group,) = read_group(sides[:1])
    shares = [0.5 / results.validation.fd[name] for name in results.fd]
    moves = [group.influences[key].per_image for key in ("fid", "fd (test_convnext)", "fdr")]
    assert torch.allclose(moves[2], shares[0] * moves[0] + shares[1] * moves[1], rtol=1e-9)


# ------------------------------------------------------------------------------------------------- the protocol


def test_every_row_names_labels_reference_and_evaluator(tmp_path: Path, reference: NpzSource) -> None:
    settings = eval_tiny.recipe(tmp_path, reference=reference)
    results = eval_tiny.with_further(settings, tmp_path / "out")
    samples = {**results.samples, "checkpoint": {"step": 3, "name": "x"}, "labels": {"kind": "balanced"}}
    row = ScoreRow.of(dataclasses.replace(results, samples=samples)).as_json()
    assert (row["labels"], row["evaluator"]) == ("balanced", "tiny:1") and row["reference"].startswith("npz:")
    assert row["fd"] == results.fd
    (tmp_path / "results.jsonl").write_text(json.dumps(row))
    assert read_table(tmp_path / "results.jsonl")[0].as_json() == row
    adm = dataclasses.replace(settings.metrics, frechet="sqrtm")
    assert dataclasses.replace(results, metrics=adm).evaluator == "tiny:1, frechet sqrtm"
    other = scoring.score(dataclasses.replace(settings, metrics=adm), tmp_path / "out", tmp_path / "r.json", lazy())
    assert len({results.id, other.id, eval_tiny.whole_run(settings, tmp_path / "alone").id}) == 3


def test_label_protocol_and_reference_are_in_the_hash(tmp_path: Path, reference: NpzSource) -> None:
    settings = eval_tiny.recipe(tmp_path, reference=reference)
    found = eval_tiny.whole_run(settings, tmp_path / "out")
    changed = json.loads((tmp_path / "out" / "config.json").read_text()) | {"labels": {"kind": "iid"}}
    (tmp_path / "out" / "config.json").write_text(json.dumps(changed))
    iid = scoring.score(settings, tmp_path / "out", tmp_path / "iid.json", lazy())
    assert iid.labels == "iid" and iid.id != found.id
    np.savez(tmp_path / "other.npz", np.random.default_rng(5).integers(0, 256, (60, 16, 16, 3), dtype=np.uint8))
    other = dataclasses.replace(settings, reference=NpzSource(path=tmp_path / "other.npz"))
    assert scoring.score(other, tmp_path / "out", tmp_path / "other.json", lazy()).id != iid.id


# ------------------------------------------------------------------------------------------------- EP_FID


def test_epochs_to_fid() -> None:
    rows = [
        ScoreRow(step=step, scores=Scores(fid=fid), count=9, nfe=1.0, name="x", id=str(step))
        for step, fid in ((400, 1.5), (100, 9.0), (200, 3.0), (300, 2.0))
    ]
    found = epochs_to_fid(rows, 2.0, steps_per_epoch=50)
    assert (found.epochs, found.step, found.fid, found.after) == (6.0, 300, 2.0, 4.0)
    assert epochs_to_fid(rows, 10.0, 50).epochs == 2.0 and epochs_to_fid(rows, 10.0, 50).after == 0
    never = epochs_to_fid(rows, 1.0, 50)
    assert (never.epochs, never.after) == (None, 8.0)


def test_an_epoch_is_all_images_of_the_data(tmp_path: Path) -> None:
    """40 images, 8 in a step: step 10 ends the second epoch."""
    training, out = small_run.recipe(small_run.encode(tmp_path / "data")), EvaluationPaths(tmp_path)
    row = ScoreRow(step=10, scores=Scores(fid=1.5), count=9, nfe=1.0, name="x", id="10")
    out.table.write_text(f"{json.dumps(row.as_json())}\n")
    _report_epochs(training, out, [2.0, 1.0])
    found = json.loads((tmp_path / "epochs_to_fid.json").read_text())
    assert [(part["target"], part["epochs"], part["after"]) for part in found] == [(2.0, 2.0, 0.0), (1.0, None, 2.0)]
