"""Whole commands on odd contents: every kind of file in place of another, and odd folders, are read or one sentence."""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import eval.__main__
import sfd_scale.__main__
from eval.images import npz
from sfd_scale import checkpoint
from sfd_scale.toy.convnet import SmallConvNet, SmallConvNetConfig
from tests.helpers import small_run
from tests.sfd_scale.runtime.test_file_kind import FILES
from tests.sfd_scale.test_odd_inputs import RAW

EVAL = """
kind: eval
extractor: {{kind: convnet, weights: {folder}/classifier.safetensors}}
reference: {{kind: npz, path: {folder}/reference.npz}}
cache: {folder}/cache
metrics: {{is_split: 4, kid_subsets: 0, reference_images: 8}}
"""


pytestmark = pytest.mark.usefixtures("keep_logging")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier, a reference, encoded data, and recipes."""
    folder = tmp_path_factory.mktemp("place")
    net = SmallConvNet(SmallConvNetConfig())
    net.init_weights(0)
    checkpoint.save_weights(net.state_dict(), folder / "classifier.safetensors", {})
    images = torch.randint(0, 256, (8, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    npz.write_images(folder / "reference.npz", [images], 8, (32, 32), torch.zeros(8, dtype=torch.int64))
    (folder / "eval.yaml").write_text(EVAL.format(folder=folder))
    small_run.write_recipe(folder / "train.yaml", small_run.encode(folder / "data"))
    return folder


class Said:
    """Runs a command in this process; it must end with code 0, or with code 2 and one sentence about `about`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, words: list[str], about: Path | str) -> str | None:
        """The sentence; None if the command succeeded."""
        self.monkeypatch.setattr(sys, "argv", ["sfd", *words])
        with pytest.raises(SystemExit) as end:
            (eval.__main__ if words[0] == "score" else sfd_scale.__main__).main()
        text = self.capsys.readouterr().err
        said = [line for line in text.splitlines() if line.startswith("error: ")]
        if end.value.code in (0, None):
            assert not said, text
            return None
        assert end.value.code == 2 and len(said) == 1, text
        assert str(about) in said[0] and not RAW.search(said[0]) and len(said[0]) < 900, said[0]
        return said[0]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Said:
    monkeypatch.delenv("RANK", raising=False)
    return Said(monkeypatch, capsys)


def in_tar(path: Path, data: bytes) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in (("0.png", data), ("0.cls", b"0")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def in_parquet(path: Path, data: bytes) -> None:
    pq.write_table(pa.table({"image": [data], "label": [0]}), path)


def score(place: Path, tmp_path: Path, *words: str, samples: Path) -> list[str]:
    return ["score", str(place / "eval.yaml"), *words, "--samples", str(samples), "--out", str(tmp_path / "out.json")]


def encode(tmp_path: Path, kind: str, path: Path) -> list[str]:
    size = "" if kind == "mds" else ", size: 16"
    source = f"source={{kind: {kind}, path: '{path}'{size}}}"
    return ["encode", "quickstart/images", source, f"out={tmp_path / 'encoded'}", "store.num_workers=0"]


# --------------------------------------------------------------------------------------------- kinds of files


@pytest.mark.parametrize("kind", FILES)
def test_any_file_in_the_place_of_samples_or_of_a_reference(place: Path, tmp_path: Path, said: Said, kind: str) -> None:
    file = tmp_path / "file.npz"
    file.write_bytes(FILES[kind])
    assert said(score(place, tmp_path, samples=file), file), "no kind holds images to score"
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "0.png").write_bytes(FILES[kind])
    refused = said(score(place, tmp_path, samples=folder), "have (8, 8)" if kind == "png" else folder)
    assert refused is not None, "one image has no FID"
    samples = place / "reference.npz"
    refused = said(score(place, tmp_path, f"reference.path={file}", samples=samples), file)
    assert refused is not None, "statistics of two features are not those of the classifier"
    shutil.rmtree(place / "reference.npz.features", ignore_errors=True)


@pytest.mark.parametrize("kind", FILES)
def test_any_file_in_the_place_of_an_image_or_an_archive_to_encode(tmp_path: Path, said: Said, kind: str) -> None:
    data = FILES[kind]
    (tmp_path / "in" / "c0").mkdir(parents=True)
    (tmp_path / "in" / "c0" / "0.png").write_bytes(data)
    in_tar(tmp_path / "in.tar", data)
    in_parquet(tmp_path / "in.parquet", data)
    (tmp_path / "x.tar").write_bytes(data)
    (tmp_path / "x.parquet").write_bytes(data)
    readable = {"in": {"png"}, "in.tar": {"png"}, "in.parquet": {"png"}, "x.tar": {"tar"}, "x.parquet": {"parquet"}}
    for name, kinds in readable.items():
        source = "folder" if name == "in" else name.partition(".")[2]
        refused = said(encode(tmp_path, source, tmp_path / name), tmp_path)
        assert (refused is None) == (kind in kinds), f"{name}: {refused}"
        shutil.rmtree(tmp_path / "encoded", ignore_errors=True)


@pytest.mark.parametrize("kind", FILES)
def test_any_file_in_the_data_of_a_training(place: Path, tmp_path: Path, said: Said, kind: str) -> None:
    for name in ("manifest.json", "index.json", "stats.safetensors", "shard.000000.00000.mds"):
        data = tmp_path / f"data {name}"
        shutil.copytree(place / "data", data)
        assert (data / name).is_file()
        (data / name).write_bytes(FILES[kind])
        words = ["train", str(place / "train.yaml"), f"data.path={data}", "--run", str(tmp_path / "run")]
        assert said(words, data), name


# ------------------------------------------------------------------------------------------------ odd folders


def _nested(path: Path) -> None:
    (path / "a" / "b" / "c").mkdir(parents=True)


def _cycle(path: Path) -> None:
    path.mkdir()
    (path / "up").symlink_to(path)


def _hidden(path: Path) -> None:
    path.mkdir()
    (path / ".0.png").write_bytes(FILES["png"])
    (path / "Thumbs.db").write_bytes(b"x")


def _dead_link(path: Path) -> None:
    path.mkdir()
    (path / "0.png").symlink_to("../gone.png")


def _loop(path: Path) -> None:
    path.symlink_to(path)


def _folder_as_image(path: Path) -> None:
    (path / "0.png").mkdir(parents=True)


FOLDERS: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "empty": lambda path: path.mkdir(),
    "nested and empty": _nested,
    "a cycle": _cycle,
    "hidden and other files": _hidden,
    "a link to nothing": _dead_link,
    "a loop": _loop,
    "a folder with the name of an image": _folder_as_image,
    "a file": lambda path: path.write_bytes(b"x"),
    "a pipe": lambda path: os.mkfifo(path),
}


@pytest.mark.parametrize("folder", FOLDERS)
def test_odd_folders_are_one_sentence_for_every_command(place: Path, tmp_path: Path, said: Said, folder: str) -> None:
    path = tmp_path / "odd folder"
    FOLDERS[folder](path)
    assert said(score(place, tmp_path, samples=path), path)
    reference = f"reference={{kind: folder, path: '{path}', size: 32}}"
    assert said(score(place, tmp_path, reference, samples=place / "reference.npz"), path)
    for kind in ("folder", "tar", "parquet", "mds"):
        assert said(encode(tmp_path, kind, path), path), kind
    assert said(["train", str(place / "train.yaml"), f"data.path={path}", "--run", str(tmp_path / "run")], path)


def test_the_sweep_finds_what_passes_silently(place: Path, tmp_path: Path, said: Said) -> None:
    """Whole inputs are read by the same command lines."""
    samples = np.load(place / "reference.npz")["arr_0"]
    np.savez(tmp_path / "samples.npz", arr_0=samples[::-1])
    assert said(score(place, tmp_path, samples=tmp_path / "samples.npz"), tmp_path) is None
    assert re.search('"fid"', (tmp_path / "out.json").read_text())
