"""The identity of images to score: their bytes, wherever they lie, read once."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from eval.images.npz import read_statistics
from eval.images.sources import FlatSource, NpzSource, open_images, source_for
from sfd_scale.data.sources import FolderConfig
from sfd_scale.runtime.files import file_sha256
from tests.helpers.png import write_png


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    return tmp_path / "images"


def fingerprint(path: Path, cache: Path | None = None) -> str:
    return open_images(FlatSource(path=path), cache).fingerprint


def test_a_folder_is_known_by_its_bytes(folder: Path, tmp_path: Path) -> None:
    before = fingerprint(folder)
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    os.utime(moved / "1.png", (0, 0))
    assert fingerprint(moved) == before, "neither place nor times matter"
    shutil.copy(moved / "1.png", moved / "2.png")
    assert fingerprint(moved) != before
    shutil.rmtree(moved)
    shutil.copytree(folder, moved)
    (moved / "0.png").rename(moved / "4.png")
    assert fingerprint(moved) != before, "the order of names is the order of images"


def test_a_second_start_reads_no_files(folder: Path, tmp_path: Path) -> None:
    before = fingerprint(folder, tmp_path / "cache")
    (kept,) = (tmp_path / "cache").glob("content-*.txt")
    kept.write_text("not read again")
    assert fingerprint(folder, tmp_path / "cache") not in (before, fingerprint(folder))
    os.utime(folder / "1.png")
    assert fingerprint(folder, tmp_path / "cache") == before, "a new time, and it is read again"


def test_another_file_of_the_same_size_and_time_is_read_again(folder: Path, tmp_path: Path) -> None:
    """`tar -x` and `cp -p` set the time: two sets of BMP files of one size had one score."""
    before, image = fingerprint(folder, tmp_path / "cache"), folder / "1.png"
    hashed, times, data = file_sha256(image), image.stat(), bytearray(image.read_bytes())
    data[len(data) // 2] ^= 1
    image.write_bytes(data)
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fingerprint(folder, tmp_path / "cache") == fingerprint(folder) != before
    assert file_sha256(image) != hashed


def test_a_damaged_npz_is_refused(tmp_path: Path) -> None:
    """TeLoGraF#2: a download with a gap. np.savez does not compress, and mapped bytes are not checked by zipfile."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", pixels, np.arange(9))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    for start, name in ((2000, "arr_0"), (data.index(b"arr_1.npy") + 200, "arr_1")):
        (tmp_path / "b.npz").write_bytes(data[:start] + bytes(8) + data[start + 8 :])
        with pytest.raises(
            ValueError, match=rf"b\.npz: {name}\.npy cannot be read: its bytes do not match their check"
        ):
            open_images(NpzSource(path=tmp_path / "b.npz"))
    assert open_images(NpzSource(path=tmp_path / "a.npz")).count == 9
    cov = np.cov(np.random.default_rng(1).normal(size=(4, 20)))
    np.savez(tmp_path / "s.npz", mu=np.zeros(4), sigma=cov)
    data = bytearray((tmp_path / "s.npz").read_bytes())
    at = data.index(cov.tobytes())
    (tmp_path / "s.npz").write_bytes(data[: at + 8] + bytes(8) + data[at + 16 :])
    with pytest.raises(ValueError, match=r"sigma\.npy cannot be read: its bytes do not match"):
        read_statistics(tmp_path / "s.npz")


def test_samples_in_class_folders_are_of_one_size_and_never_resized(tmp_path: Path) -> None:
    """clean-fid#2: images of 64 pixels were cropped to the 32 of the first one, and scored in silence."""
    for number, side in enumerate((32, 32, 64)):
        (tmp_path / str(number)).mkdir()
        write_png(tmp_path / str(number) / "0.png", side, side, 8, 0, bytes([number]) * side * side)
    images = open_images(source_for(tmp_path), one_size=True)
    assert images.rows(range(2))[0].shape == (2, 3, 32, 32)
    with pytest.raises(
        ValueError, match=rf"2/0\.png: 64x64 pixels, {tmp_path}/0/0\.png has 32x32; allowed: images of one"
    ):
        images.rows(range(2, 3))
    assert open_images(source_for(tmp_path, 16)).rows(range(3))[0].shape == (3, 3, 16, 16), "a size that is given crops"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ([np.zeros((0, 8, 8, 3), np.uint8)], r"arr_0 has the shape \(0, 8, 8, 3\), so there are no images"),
        ([np.zeros((2, 8, 8, 3), np.uint8), np.array(["cat", "dog"])], r"labels \(arr_1\) of <U3; allowed: whole numb"),
        (
            [np.zeros((2, 8, 8, 3), np.uint8), np.array([0.5, 1])],
            r"labels \(arr_1\) of float64; allowed: whole numbers",
        ),
    ],
)
def test_an_npz_without_images_or_with_other_labels(tmp_path: Path, arrays: list[Any], message: str) -> None:
    np.savez(tmp_path / "a.npz", *arrays)
    with pytest.raises(ValueError, match=message):
        open_images(NpzSource(path=tmp_path / "a.npz"))


def test_a_matrix_that_is_no_covariance_is_refused(tmp_path: Path) -> None:
    """The Fréchet distance reads the lower half of a symmetric matrix, and counts negative parts as 0."""
    cov = np.cov(np.random.default_rng(1).normal(size=(4, 20)))
    for kind in (np.float16, np.float32, np.float64):
        np.savez(tmp_path / "s.npz", mu=np.zeros(4), sigma=cov.astype(kind))
        assert read_statistics(tmp_path / "s.npz")["sigma"].shape == (4, 4)
    for wrong, message in ((np.tril(cov), "sigma is not symmetric"), (-cov, "sigma has negative variances, down to -")):
        np.savez(tmp_path / "s.npz", mu=np.zeros(4), sigma=wrong)
        with pytest.raises(ValueError, match=message):
            read_statistics(tmp_path / "s.npz")


def test_one_byte_in_one_file_is_another_folder(folder: Path) -> None:
    before = fingerprint(folder)
    with (folder / "3.png").open("ab") as file:
        file.write(b"\0")
    assert fingerprint(folder) != before


def test_a_folder_keeps_the_fingerprint_of_the_rule_in_its_docstring(folder: Path) -> None:
    (folder / "labels.txt").write_text("0 1 2 3")
    content = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        content.update(f"{file.name}\0{file.stat().st_size}\n".encode() + file.read_bytes())
    settings = hashlib.sha256(b'{"kind": "flat"}')
    settings.update(content.hexdigest().encode())
    assert fingerprint(folder) == f"flat:{settings.hexdigest()}"


@pytest.mark.parametrize("linked", ["classes", "files", "deeper"])
def test_linked_class_folders_are_known_by_their_images(folder: Path, tmp_path: Path, linked: str) -> None:
    """pytorch-image-models#334: class folders that are links. Each had the hash of an empty folder."""
    prints = []
    for change in (False, True):
        if change:
            shutil.copy(folder / "1.png", folder / "2.png")
        root = tmp_path / f"{linked}-{change}"
        for name in ("c0", "c1"):
            if linked == "classes":
                root.mkdir(exist_ok=True)
                (root / name).symlink_to(folder)
            elif linked == "deeper":
                (root / name).mkdir(parents=True)
                (root / name / "part").symlink_to(folder)
            else:
                (root / name).mkdir(parents=True)
                for file in folder.iterdir():
                    (root / name / file.name).symlink_to(file)
        images = open_images(FolderConfig(path=root, size=8), tmp_path / "cache")
        assert images.count == 8
        prints.append(images.fingerprint)
        plain = Path(shutil.copytree(root, tmp_path / f"plain-{linked}-{change}"))
        assert open_images(FolderConfig(path=plain, size=8)).fingerprint == images.fingerprint
    assert prints[0] != prints[1]


def test_files_that_are_not_read_do_not_change_the_fingerprint(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = fingerprint(folder)
    (folder / "notes.md").write_text("x")
    (folder / ".hidden.png").write_text("x")
    (folder / "more").mkdir()
    assert fingerprint(folder) == before
    assert "1 .md" in caplog.text and "1 folders" in caplog.text


def test_a_link_to_a_missing_image_is_named(folder: Path) -> None:
    (folder / "9.png").symlink_to(folder / "absent.png")
    with pytest.raises(ValueError, match=r"9\.png is a link to \S+, which does not exist"):
        fingerprint(folder)


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("alpha", [False, True])
def test_grey_images_of_any_depth_are_the_same_images(tmp_path: Path, depth: int, alpha: bool) -> None:
    """unslothai/unsloth#10094: 16-bit grey PNG were white."""
    grey = np.random.default_rng(0).integers(0, 256, (8, 8))
    values = (grey * 257).astype(">u2") if depth == 16 else grey.astype(np.uint8)
    opaque = np.full_like(values, 2**depth - 1)
    raw = np.stack([values, opaque], -1) if alpha else values[..., None]
    write_png(tmp_path / "a.png", 8, 8, depth, 4 if alpha else 0, raw.tobytes())
    images, labels = open_images(source_for(tmp_path)).rows(range(1))
    assert labels is None and torch.equal(images[0, 1], torch.from_numpy(grey.astype(np.uint8)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cat dog cat dog", r"word 1 is 'cat'; allowed: class indices"),
        (b"0 1 2 -3", r"word 4 is '-3'"),
        (b"0 1.5 2 3", r"word 2 is '1\.5'"),
        ("0 1 2 \u0663".encode(), "word 4 is"),
        (b"0 1 2 99999999999999999999", "word 4 is"),
        (b"\xff\xfe0\x00", "save it in UTF-8"),
        (b"0 1", "2 labels for 4 images"),
    ],
)
def test_labels_that_are_no_class_indices_are_named(folder: Path, content: bytes, message: str) -> None:
    (folder / "labels.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"labels\.txt.*{message}"):
        fingerprint(folder)


def test_labels_with_a_byte_order_mark_and_crlf(folder: Path) -> None:
    (folder / "labels.txt").write_bytes(b"\xef\xbb\xbf3\r\n2\r\n1\r\n0\r\n")
    labels = open_images(FlatSource(path=folder)).rows(range(1, 4))[1]
    assert labels is not None and labels.tolist() == [2, 1, 0]


@pytest.mark.parametrize("name", ["index.json", "manifest.json"])
def test_a_file_named_as_those_of_shards_does_not_stand_for_the_images(folder: Path, name: str) -> None:
    (folder / name).write_text("{}")
    before = fingerprint(folder)
    shutil.copy(folder / "1.png", folder / "2.png")
    assert fingerprint(folder) != before
