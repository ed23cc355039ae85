"""What lies in the place of a file, for every reader of files from outside (pytorch-fid#106 and its kind)."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from eval.features.downloads import fetch
from eval.images.npz import NpzImages, read_statistics
from eval.results import Results
from sfd_scale import config, export
from sfd_scale.checkpoint import load_weights
from sfd_scale.checkpoint.official_checkpoint import read_official
from sfd_scale.data.image_io import read_image
from sfd_scale.data.manifest import Manifest, read_index
from sfd_scale.data.parquet import ParquetConfig, ParquetImages
from sfd_scale.data.tars import TarConfig, TarImages
from sfd_scale.diffusion.latents import LatentStats
from sfd_scale.runtime.file_kind import file_error, kind_of_bytes, require_kind
from sfd_scale.runtime.weight_files import read_weights
from sfd_scale.tokenizers.pca import load_components


def _saved(write: Callable[[io.BytesIO], object]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def _png() -> bytes:
    return _saved(lambda buffer: Image.new("RGB", (8, 8), (9, 8, 7)).save(buffer, "png"))


def _tar(buffer: io.BytesIO) -> None:
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("0.png")
        member.size = len(_png())
        archive.addfile(member, io.BytesIO(_png()))


def _zip(buffer: io.BytesIO) -> None:
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("images/0.png", _png())


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 3951\n"
TABLE = pa.table({"image": [_png()], "label": [0]})
FILES = {
    "lfs": POINTER,
    "annex": b"/annex/objects/MD5E-s3951--abc.npz\n",
    "html": b"<!DOCTYPE html>\n<html><head><title>404: not here</title></head>" + b" " * 5000,
    "xml": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "json": b'{"error": "Repository not found", "weight_map": {}}',
    "text": b"not what was wanted\n",
    "utf16": "0 1 2".encode("utf-16"),
    "npz": _saved(lambda buffer: np.savez(buffer, mu=np.ones(2), sigma=np.eye(2))),
    "npy": _saved(lambda buffer: np.save(buffer, np.ones(2))),
    "pickle": pickle.dumps({"mu": [1.0]}),
    "torch": _saved(lambda buffer: torch.save({"a": torch.ones(2)}, buffer)),
    "old torch": _saved(lambda b: torch.save({"a": torch.ones(2)}, b, _use_new_zipfile_serialization=False)),
    "safetensors": save({"a": torch.ones(2)}),
    "zip": _saved(_zip),
    "tar": _saved(_tar),
    "gzip": gzip.compress(b"x"),
    "parquet": _saved(lambda buffer: pq.write_table(TABLE, buffer)),
    "png": _png(),
    "gif": _saved(lambda buffer: Image.new("L", (8, 8)).save(buffer, "gif")),
    "pdf": b"%PDF-1.4\n",
    "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(64),
    "zeros": bytes(10_000),
    "empty": b"",
    "unknown": bytes(range(128, 256)),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_kind_is_known_by_its_first_bytes(kind: str) -> None:
    assert kind_of_bytes(FILES[kind][:4096]) == kind
    whole = FILES[kind][:64]
    if len(whole) > 40:
        assert kind_of_bytes(whole[:40]) in (kind, "text", "unknown", "zip"), "also cut off"


def _folder_with(name: str, read: Callable[[Path], object]) -> Callable[[Path], object]:
    """A reader of a folder that has the file under a name of its own."""

    def in_folder(file: Path) -> object:
        folder = file.parent / "folder"
        folder.mkdir(exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        os.link(file, folder / name)
        return read(folder)

    return in_folder


# Each reader of files from outside, and the kinds that it reads, or refuses for another reason.
READERS: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    "statistics of FID": (read_statistics, {"npz", "zip", "torch"}),
    "images to score": (NpzImages, {"npz", "zip", "torch"}),
    "weights": (read_weights, {"safetensors", "torch", "zip", "npz", "old torch"}),
    "official checkpoint": (read_official, {"torch", "zip", "npz"}),
    "exported weights": (load_weights, {"safetensors"}),
    "note of an export": (export.read_note, {"safetensors"}),
    "latent statistics": (LatentStats.load, {"safetensors"}),
    "a PCA": (lambda file: load_components(file, "a PCA"), {"safetensors"}),
    "weights of an extractor": (
        lambda file: fetch(file, None, "0" * 64),
        {"safetensors", "torch", "zip", "old torch", "pickle", "hdf5", "unknown", "npz"},
    ),
    "results": (Results.read, {"json", "text"}),
    "manifest": (_folder_with("manifest.json", Manifest.read), {"json", "text"}),
    "index": (_folder_with("index.json", read_index), {"json", "text"}),
    "recipe": (lambda file: config.kind_of(file), {"json", "text", "empty"}),
    "tar": (lambda file: TarImages(TarConfig(path=file)), {"tar", "zeros"}),  # zeros are an empty tar file
    "parquet": (lambda file: ParquetImages(ParquetConfig(path=file)), {"parquet"}),
    "image": (lambda file: read_image(file, 8), {"png"}),
}
WORDS = {
    "lfs": "is a Git-LFS pointer, .*git lfs pull",
    "annex": "is a git-annex pointer, .*git annex get",
    "html": r"is an HTML page \('404: not here'\), .*download it again",
    "xml": "is an XML document .*AccessDenied.*download it again",
    "json": "is JSON text .*Repository not found",
    "empty": "is empty",
    "zeros": "is nothing but zero bytes, .*not finished",
    "old torch": "before PyTorch 1.6|not a",
    "pickle": "is a Python pickle, .*can run code|not a",
    "unknown": "first bytes are 80 81 82",
    "utf16": "is a text file in UTF-16, .*save it in UTF-8",
}


def test_no_length_of_a_header_hides_a_safetensors_file() -> None:
    """The first bytes are the length of the header: 640 has those of a pickle."""
    for length in (0x0280, 0x0380, 0x0480, 0x0580):
        padded = next(
            data
            for count in range(length)
            if int.from_bytes((data := save({"x": torch.zeros(1)}, {"note": "a" * count}))[:8], "little") >= length
        )
        assert int.from_bytes(padded[:8], "little") == length and kind_of_bytes(padded[:600]) == "safetensors"


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_says_what_lies_in_the_place_of_its_file(reader: str, tmp_path: Path) -> None:
    read, own = READERS[reader]
    for kind, data in FILES.items():
        file = tmp_path / f"{kind.replace(' ', '-')}.npz"
        file.write_bytes(data)
        if kind in own:
            continue
        with pytest.raises(ValueError, match=WORDS.get(kind, "is an? .*, not ")) as error:
            read(file)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_statistics_in_other_files_say_how_to_write_npz(tmp_path: Path) -> None:
    """pytorch-fid#106: .npy or .pkl where .npz is wanted, whatever the file's name says."""
    for kind, message in (
        (
            "npy",
            r"stats is a \.npy file, one NumPy array, not an \.npz file; save all arrays in one file, with np\.sav",
        ),
        ("pickle", r"stats is a Python pickle, not an \.npz file; a pickle can run code, .* np\.savez\(path, mu="),
    ):
        (tmp_path / "stats").write_bytes(FILES[kind])
        with pytest.raises(ValueError, match=message):
            read_statistics(tmp_path / "stats")


@pytest.mark.parametrize("reader", ["weights", "exported weights", "latent statistics", "statistics of FID"])
def test_what_is_no_file_is_said(reader: str, tmp_path: Path) -> None:
    read = READERS[reader][0]
    (tmp_path / "link").symlink_to("../.git/annex/objects/ab/cd")
    (tmp_path / "dead").symlink_to("absent")
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    for name, message in (
        ("absent", "absent: no such file|absent: neither"),
        ("link", "is a link to .*does not exist; .*git annex get|neither"),
        ("dead", "dead is a link to absent, which does not exist|neither"),
        ("pipe", "is a device, pipe or socket|neither"),
        (".", "is a folder, .*give a file in it|neither"),
    ):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / name)


@pytest.mark.parametrize("kind", ["safetensors", "npz", "torch", "parquet"])
def test_a_file_that_is_cut_off_is_said_to_be(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "cut"
    file.write_bytes(FILES[kind][:-1])
    wanted = {"safetensors": "weights", "torch": "weights", "npz": "npz", "parquet": "parquet"}[kind]
    size = len(FILES[kind])
    assert f"cut is truncated: {size - 1} of {size} bytes" in file_error(file, wanted) or (  # type: ignore[arg-type]
        kind != "safetensors" and "cut is truncated: " in file_error(file, wanted)  # type: ignore[arg-type]
    )


def test_weights_are_read_by_their_content_and_not_by_their_name(tmp_path: Path) -> None:
    for kind, name in (("safetensors", "a.ckpt"), ("torch", "a.safetensors")):
        (tmp_path / name).write_bytes(FILES[kind])
        assert torch.equal(read_weights(tmp_path / name)["a"], torch.ones(2))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "b"}}))
    with pytest.raises(ValueError, match="index of weights in several files, merge them"):
        read_weights(tmp_path / "model.safetensors.index.json")


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=600), st.sampled_from([*FILES, ""]))
def test_any_bytes_give_a_sentence(tail: bytes, kind: str) -> None:
    head = FILES.get(kind, b"")[:40] + tail
    assert isinstance(kind_of_bytes(head), str)


def test_an_unreadable_file_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(b"x")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match="x cannot be opened: Permission denied"):
        require_kind(tmp_path / "x", "json")
