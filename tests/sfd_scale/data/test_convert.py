"""The authors' feature files become shards: every number, in order, and nothing that does not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sfd_scale.data import convert as module
from sfd_scale.data.convert import ConvertConfig, convert
from sfd_scale.data.dataloader import DataConfig, FeatureLoader, LatentLoader
from sfd_scale.data.manifest import restored
from sfd_scale.data.shards import check_data, open_shards
from sfd_scale.diffusion.latents import LatentLayout, LatentStats
from sfd_scale.runtime.batch_split import BatchSplit
from tests.helpers.encoded import files

COUNTS = (5, 3, 4)  # rows of three files
LAYOUT = LatentLayout(texture_channels=4, semantic_channels=2, size=3)


def tensors(number: int, count: int) -> dict[str, Tensor]:
    """A file as the authors write it, but smaller."""
    draw = torch.Generator().manual_seed(number)
    out = {"labels": torch.randint(0, 10, (count,), generator=draw)}
    for suffix in ("", "_flip"):
        out[f"latents{suffix}"] = torch.randn(count, 4, 3, 3, generator=draw) * 3
        out[f"latents_sv{suffix}"] = torch.randn(count, 2, 3, 3, generator=draw)
        out[f"feats_dino{suffix}"] = torch.randn(count, 7, 3, 3, generator=draw).half()
    return out


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "authors"
    folder.mkdir()
    for number, count in enumerate(COUNTS):
        save_file(tensors(number, count), folder / f"latents_rank00_shard{number:03d}.safetensors")
    return folder


def config(source: Path, **changes: Any) -> ConvertConfig:
    return replace(ConvertConfig(source=source, layout=LAYOUT, feature_dim=7, num_classes=10), **changes)


def whole(name: str) -> Tensor:
    return torch.cat([tensors(number, count)[name] for number, count in enumerate(COUNTS)])


def test_every_number_comes_over(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = convert(config(source, tokenizers={"texture": "autoencoder_kl:1"}), out)
    assert manifest.num_samples == 12 and manifest.num_classes == 10 and manifest.tokenizers["texture"].endswith(":1")
    rows = open_shards(out)
    assert [rows[i]["id"] for i in range(12)] == list(range(12))
    assert [rows[i]["label"] for i in range(12)] == whole("labels").tolist()
    for suffix in ("", "_flip"):
        latents = torch.cat([whole(f"latents{suffix}"), whole(f"latents_sv{suffix}")], dim=1)  # texture first
        assert torch.equal(
            restored([rows[i][f"latents{suffix}"] for i in range(12)], "float16"), latents.half().float()
        )
        features = restored([rows[i][f"features{suffix}"] for i in range(12)], "float16")
        assert torch.equal(features, whole(f"feats_dino{suffix}").float())
    everything = torch.cat([torch.cat([whole(f"latents{s}"), whole(f"latents_sv{s}")], 1) for s in ("", "_flip")])
    flat = everything.double().transpose(0, 1).flatten(1)
    stats = LatentStats.load(out / "stats.safetensors")
    assert (stats.mean - flat.mean(1)).abs().max() < 1e-12 and (
        stats.std - flat.std(1, correction=0)
    ).abs().max() < 1e-12
    assert check_data(out) == []


def test_the_reader_takes_them_with_the_authors_statistics(source: Path, tmp_path: Path) -> None:
    parts = []
    for name, channels in (("latents_stats.pt", 4), ("latents_sv_stats.pt", 2)):
        mean = torch.arange(float(channels)).view(1, channels, 1, 1)
        torch.save({"mean": mean, "std": mean + 2}, tmp_path / name)
        parts.append(tmp_path / name)
    convert(config(source, stats=tuple(parts)), tmp_path / "out")
    data = DataConfig(path=tmp_path / "out", shuffle=False, stats=tmp_path / "out" / "stats_authors.safetensors")
    reader = LatentLoader(data, seed=0, split=BatchSplit(4, 1, 1), rank=0)
    batch = next(reader.batches(0))
    assert batch.features is not None and batch.features.shape == (4, 7, 3, 3) and reader.shape == LAYOUT.shape
    mean = torch.tensor([0.0, 1, 2, 3, 0, 1]).view(6, 1, 1)
    candidates = [
        (torch.cat([whole(f"latents{s}"), whole(f"latents_sv{s}")], 1)[:4].half().float() - mean) / (mean + 2)
        for s in ("", "_flip")
    ]
    for row in range(4):
        errors = [(batch.latents[row] - candidate[row]).abs().max() for candidate in candidates]
        assert min(errors) < 1e-6 < max(errors)
    # The folder with their two files will do as well.
    named = replace(data, stats=tmp_path)
    again = next(LatentLoader(named, seed=0, split=BatchSplit(4, 1, 1), rank=0).batches(0))
    assert torch.equal(again.latents, batch.latents)
    with pytest.raises(ValueError, match=r"data\.stats: .*absent; allowed: a stats\.safetensors, or a folder"):
        LatentLoader(replace(data, stats=tmp_path / "absent"), seed=0, split=BatchSplit(4, 1, 1), rank=0)
    with pytest.raises(ValueError, match=r"stats: 1 files; allowed: latents_stats\.pt and latents_sv_stats\.pt"):
        config(source, stats=(parts[0],))


def test_a_part_of_the_columns(source: Path, tmp_path: Path) -> None:
    manifest = convert(config(source, features=False, flip=False, dtype="bfloat16"), tmp_path / "out")
    assert manifest.columns == {"id": "int", "label": "int", "latents": "ndarray:uint16:6,3,3"}
    # What is not asked for need not be there.
    for number, count in enumerate(COUNTS):
        kept = {k: v for k, v in tensors(number, count).items() if k in ("labels", "latents", "latents_sv")}
        save_file(kept, source / f"latents_rank00_shard{number:03d}.safetensors")
    convert(config(source, features=False, flip=False, dtype="bfloat16"), tmp_path / "again")
    assert (tmp_path / "again" / "index.json").read_bytes() == (tmp_path / "out" / "index.json").read_bytes()


def test_features_alone_for_a_semantic_vae(source: Path, tmp_path: Path) -> None:
    for number, count in enumerate(COUNTS):
        kept = {k: v for k, v in tensors(number, count).items() if not k.startswith("latents")}
        save_file(kept, source / f"latents_rank00_shard{number:03d}.safetensors")
    manifest = convert(config(source, latents=False), tmp_path / "out")
    assert set(manifest.columns) == {"id", "label", "features", "features_flip"} and manifest.stats_hash is None
    assert check_data(tmp_path / "out") == [] and manifest.num_samples == 12
    data = DataConfig(path=tmp_path / "out", flip=False, shuffle=False)
    reader = FeatureLoader(data, seed=0, split=BatchSplit(12, 1, 1), rank=0)
    assert torch.equal(next(reader.batches(0)).features, whole("feats_dino"))
    with pytest.raises(ValueError, match="latents: false, but features is false too"):
        config(source, latents=False, features=False)


def test_an_interrupted_conversion_resumes_with_the_files_that_are_missing(source: Path, tmp_path: Path) -> None:
    convert(config(source), tmp_path / "straight")
    second = source / "latents_rank00_shard001.safetensors"
    whole_file, broken = second.read_bytes(), tensors(1, COUNTS[1])
    label(broken)
    save_file(broken, second)
    with pytest.raises(ValueError, match="labels of"):
        convert(config(source), tmp_path / "out")
    (first,) = (tmp_path / "out").glob("chunks/*/note.json")
    written = first.stat().st_mtime_ns
    second.write_bytes(whole_file)
    convert(config(source), tmp_path / "out")
    assert first.stat().st_mtime_ns == written
    assert files(tmp_path / "out") == files(tmp_path / "straight")
    save_file(tensors(9, 6), source / "latents_rank00_shard003.safetensors")
    with pytest.raises(ValueError, match="holds data of another recipe"):
        convert(config(source), tmp_path / "out")


def test_bytes_that_do_not_come_back_are_not_committed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Faulty(module.MDSReader):
        def __getitem__(self, index: int) -> dict[str, Any]:
            row = super().__getitem__(index)
            return {**row, "latents": row["latents"] + 2.0**-8} if index == 4 else row

    with monkeypatch.context() as patch:
        patch.setattr(module, "MDSReader", Faulty)
        with pytest.raises(ValueError, match=r"shard000\.safetensors: the data written to .* reads back differently"):
            convert(config(source), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.mds")) and not (tmp_path / "out" / "chunks" / "000000").exists()
    assert convert(config(source), tmp_path / "out").num_samples == 12


def bad_shape(t: dict[str, Tensor]) -> None:
    t["latents"] = t["latents"][:, :3].contiguous()


def short(t: dict[str, Tensor]) -> None:
    t["feats_dino_flip"] = t["feats_dino_flip"][:2].contiguous()


def label(t: dict[str, Tensor]) -> None:
    t["labels"][1] = 10


def infinite(t: dict[str, Tensor]) -> None:
    t["latents_sv_flip"][0, 0, 0, 0] = torch.inf


def huge(t: dict[str, Tensor]) -> None:
    t["latents"][0, 0, 0, 0] = 1e5


def lost(t: dict[str, Tensor]) -> None:
    del t["latents_sv"]


def empty(t: dict[str, Tensor]) -> None:
    t.update({name: value[:0].contiguous() for name, value in t.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (empty, "no images in it; remove this file, or extract its features again"),
        (bad_shape, r"latents is \(3, 3, 3, 3\); allowed: \(N, 4, 3, 3\)"),
        (short, r"feats_dino_flip is \(2, 7, 3, 3\); allowed: \(N, 7, 3, 3\), with one N per file"),
        (label, "labels of torch.int64 from . to 10; allowed: integers from 0 to 9"),
        (infinite, "values up to inf: not finite"),
        (huge, r"values up to 100000.0: beyond the range of float16; set store\.dtype=bfloat16"),
        (lost, "no tensor latents_sv; it has"),
    ],
)
def test_a_file_that_does_not_fit_is_named(
    source: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    content = tensors(1, 3)
    change(content)
    save_file(content, source / "latents_rank00_shard001.safetensors")
    with pytest.raises(ValueError, match=rf"shard001\.safetensors: {message}"):
        convert(config(source), tmp_path / "out")


def test_damaged_and_absent_files(source: Path, tmp_path: Path) -> None:
    path = source / "latents_rank00_shard002.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"shard002\.safetensors is truncated: 3,281 of 3,288 bytes"):
        convert(config(source), tmp_path / "out")
    with pytest.raises(ValueError, match=r"convert\.source: .*absent is not a folder"):
        convert(config(tmp_path / "absent"), tmp_path / "out")
