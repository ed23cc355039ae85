"""Images of Parquet files in the hub's layout: order, pixels, laziness, processes, and files that will not do."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from sfd_scale.data import parquet
from sfd_scale.data.image_io import UnreadableImage, read_image
from sfd_scale.data.parquet import ParquetConfig, ParquetImages
from sfd_scale.data.sources import make_source
from tests.helpers.encoded import encode_digits, files

HUB = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(seed: int) -> bytes:
    out = io.BytesIO()
    values = np.random.Generator(np.random.PCG64(seed)).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(values).save(out, "png")
    return out.getvalue()


def pixels(seed: int) -> torch.Tensor:
    return read_image(io.BytesIO(png(seed)), 16, name="image")


def write(path: Path, seeds: range, group: int = 2, kind: Any = HUB) -> None:
    images: list[Any] = [png(seed) for seed in seeds]
    if kind == HUB:
        images = [{"bytes": image, "path": f"{seed}.png"} for seed, image in zip(seeds, images, strict=True)]
    columns = {"image": pa.array(images, kind), "label": [9 - seed for seed in seeds], "caption": ["x"] * len(seeds)}
    pq.write_table(pa.table(columns), path, row_group_size=group)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files, the later written first; row groups that do not divide them."""
    write(tmp_path / "train-00001-of-00002.parquet", range(5, 8), group=2)
    write(tmp_path / "train-00000-of-00002.parquet", range(5), group=3)
    return tmp_path


@pytest.mark.parametrize("kind", [HUB, pa.binary(), pa.large_binary()])
def test_images_come_in_the_order_of_files_and_rows(tmp_path: Path, kind: Any) -> None:
    write(tmp_path / "b.parquet", range(4, 7), kind=kind)
    write(tmp_path / "a.parquet", range(4), group=3, kind=kind)
    source = make_source(ParquetConfig(path=tmp_path, size=16))
    assert len(source) == 7 and source.num_classes == 10
    for index in (6, 0, 3, 4, 2, 5, 1):
        image, label = source[index]
        assert torch.equal(image, pixels(index)) and label == 9 - index
    with pytest.raises(IndexError):
        source[7]
    one = make_source(ParquetConfig(path=tmp_path / "b.parquet", size=16))
    assert len(one) == 3 and torch.equal(one[0][0], pixels(4))


def test_row_groups_are_read_when_they_are_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, read, whole = ParquetImages(ParquetConfig(path=folder, size=16)), [], pq.ParquetFile.read_row_group

    def counted(self: Any, number: int, columns: list[str], **options: Any) -> Any:
        read.append((number, columns))
        return whole(self, number, columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    for index in (0, 1, 2, 1, 3):
        source[index]
    assert read == [(0, ["image"]), (1, ["image"])]


def test_worker_processes_read_the_same(folder: Path) -> None:
    source = ParquetImages(ParquetConfig(path=folder, size=16))
    source[0]  # a row group that the forked workers must not take over
    loader = DataLoader(source, batch_size=2, num_workers=2)  # type: ignore[arg-type]
    images = torch.cat([images for images, _ in loader])
    assert torch.equal(images, torch.stack([pixels(seed) for seed in range(8)]))


def test_shards_are_those_of_the_same_images(folder: Path, tmp_path: Path) -> None:
    """`sfd encode` of the files: all images, in order, and an unreadable one is named."""
    source = ParquetImages(ParquetConfig(path=folder, size=16))
    manifest = encode_digits(tmp_path / "out", source=source, image=True, latents="none")
    assert manifest.num_samples == 8 and manifest.num_classes == 10
    again = encode_digits(tmp_path / "again", source=source, image=True, latents="none", num_workers=1)
    assert again.num_samples == 8
    shards = [{n: b for n, b in files(tmp_path / name).items() if n.endswith(".mds")} for name in ("out", "again")]
    assert shards[0] == shards[1] and shards[0]


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    images = [{"bytes": png(0), "path": None}, {"bytes": None, "path": "1.png"}, {"bytes": b"no image", "path": None}]
    pq.write_table(pa.table({"image": pa.array(images, HUB), "label": [0, 1, 2]}), tmp_path / "a.parquet")
    source = ParquetImages(ParquetConfig(path=tmp_path, size=16))
    assert torch.equal(source[0][0], pixels(0))
    with pytest.raises(UnreadableImage, match=r"row 1: the image is null, with the path '1\.png' alone; write"):
        source[1]
    with pytest.raises(UnreadableImage, match=r"a\.parquet, row 2 is a text file \('no image'\), not a JPEG"):
        source[2]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    columns = [pa.array([png(0)]), pa.array([png(1)]), pa.array([0])]
    pq.write_table(pa.table(columns, names=["image", "image", "label"]), tmp_path / "a.parquet")
    with pytest.raises(
        ValueError, match=r"source\.image: .*a\.parquet has 2 columns of the name 'image'; allowed: one"
    ):
        ParquetImages(ParquetConfig(path=tmp_path, size=16))


def test_a_file_damaged_later_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", range(6))
    source = ParquetImages(ParquetConfig(path=tmp_path, size=16))
    with (tmp_path / "a.parquet").open("r+b") as file:
        file.truncate(os.path.getsize(tmp_path / "a.parquet") // 2)
    with pytest.raises(UnreadableImage, match=r"a\.parquet, row 4: "):
        source[4]


def test_files_that_will_not_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(match: str, **settings: Any) -> None:
        with pytest.raises(ValueError, match=match):
            make_source(ParquetConfig(**{"path": tmp_path, "size": 16, **settings}))

    refused(r"source\.path: .* is neither a Parquet file nor a folder with \*\.parquet")
    (tmp_path / "text.parquet").write_bytes(b"PAR1 no table at all PAR1")
    refused(r"text\.parquet is truncated or damaged \(Parquet file size is 25")
    (tmp_path / "text.parquet").unlink()
    write(tmp_path / "train-0.parquet", range(2))
    write(tmp_path / "test-0.parquet", range(2))
    refused(r"source\.files: \*\.parquet matches files of test and train; choose one, such as test-\*\.parquet")
    train = {"files": "train-*.parquet"}
    refused(
        r"source\.image: 'jpg' is not a column of .*train-0\.parquet; it has: image, label, caption",
        image="jpg",
        **train,
    )
    refused(r"source\.label: the column has type string in .*; allowed: integers", label="caption", **train)
    refused(r"source\.image: the column has type int64 in .*; allowed: binary", image="label", **train)
    monkeypatch.setattr(parquet, "MAX_ROW_GROUP_BYTES", 100)
    source = make_source(ParquetConfig(path=tmp_path, size=16, files="train-*.parquet"))
    with pytest.raises(ValueError, match=r"train-0\.parquet: row group 0 has .* write it with fewer rows per group"):
        source[0]
    for labels, told in (([0, -1], "-1"), ([0, None], "None")):
        pq.write_table(pa.table({"image": [b"", b""], "label": pa.array(labels, pa.int64())}), tmp_path / "c.parquet")
        refused(rf"c\.parquet, row 1: label {told} is not a class index", files="c.parquet")
    pq.write_table(pa.table({"image": pa.array([], HUB), "label": pa.array([], pa.int64())}), tmp_path / "c.parquet")
    refused("have no rows", files="c.parquet")
