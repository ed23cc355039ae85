"""The identity of images to score: their bytes, wherever they lie, read once."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.images import sources
from eval.images.sources import FlatSource, open_images


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
    before, image = fingerprint(folder, tmp_path / "cache"), folder / "1.png"
    times, data = image.stat(), bytearray(image.read_bytes())
    data[len(data) // 2] ^= 1
    image.write_bytes(data)
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fingerprint(folder, tmp_path / "cache") == before, "as name, size and time are the same"
    assert fingerprint(folder) != before
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert fingerprint(folder, tmp_path / "cache") == fingerprint(folder), "a new time, and it is read again"


def test_one_byte_in_one_file_is_another_folder(folder: Path) -> None:
    before = sources._files_hash(folder, None)
    with (folder / "3.png").open("ab") as file:
        file.write(b"\0")
    assert sources._files_hash(folder, None) != before


@pytest.mark.parametrize("name", ["index.json", "manifest.json"])
def test_a_file_named_as_those_of_shards_does_not_stand_for_the_images(folder: Path, name: str) -> None:
    (folder / name).write_text("{}")
    before = fingerprint(folder)
    shutil.copy(folder / "1.png", folder / "2.png")
    assert fingerprint(folder) != before
