"""Encoding: the same bytes at any number of ranks and starts, both flips, moments, and images that cannot be read."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from sfd_scale.data.encode import StoreConfig, encode
from sfd_scale.data.manifest import Manifest, restored
from sfd_scale.data.parquet import ParquetConfig
from sfd_scale.data.shards import open_shards
from sfd_scale.data.sources import (
    DigitsConfig,
    FolderConfig,
    ImageFolder,
    MDSConfig,
    ToyImages,
    listing_sha256,
    make_source,
)
from sfd_scale.data.tars import TarConfig
from sfd_scale.diffusion.latents import LatentStats
from sfd_scale.tokenizers.protocols import psnr
from tests.helpers.encoded import LAYOUT, digits, encode_digits, files, tokenizer
from tests.helpers.ranks import run_ranks

COUNT = 44  # five chunks of 8 and one of 4


class Killed(RuntimeError):
    pass


class Failing:
    """Digits that a power cut ends at image `last`."""

    def __init__(self, last: int) -> None:
        self.source, self.last = digits(COUNT), last
        self.num_classes, self.size, self.classes, self.read = 10, 32, (), [0]

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index > self.last:
            raise Killed(str(index))
        self.read[0] += 1
        return self.source[index]


def on_ranks(folders: list[Path]) -> list[int]:
    return [encode_digits(out, COUNT, features="shards", latents="moments").num_samples for out in folders]


def test_two_ranks_one_rank_and_a_restart_write_the_same_bytes(tmp_path: Path) -> None:
    options: dict[str, Any] = {"features": "shards", "latents": "moments"}
    one = encode_digits(tmp_path / "one", COUNT, **options)
    assert one.num_samples == COUNT

    with pytest.raises(Killed, match="16"):
        encode_digits(tmp_path / "cut", COUNT, Failing(15), **options)
    with pytest.raises(ValueError, match=r"no manifest\.json; encode the data first, or complete an interrupted"):
        open_shards(tmp_path / "cut")
    # The rest of the one, and all of the other, on two ranks.
    assert run_ranks(on_ranks, 2, [tmp_path / "cut", tmp_path / "two"]) == [[COUNT, COUNT]] * 2
    bytes_of_one = files(tmp_path / "one")
    assert len(bytes_of_one) > 10
    assert files(tmp_path / "two") == bytes_of_one
    assert files(tmp_path / "cut") == bytes_of_one


def test_a_second_start_repeats_no_chunk(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        encode_digits(tmp_path, COUNT, Failing(20))  # in the middle of the third chunk
    rest = Failing(COUNT)
    encode_digits(tmp_path, COUNT, rest)
    assert rest.read == [COUNT - 16]
    again = Failing(COUNT)
    encode_digits(tmp_path, COUNT, again)
    assert again.read == [0]
    (tmp_path / "shard.000003.00000.mds").unlink()
    before = files(tmp_path)
    encode_digits(tmp_path, COUNT, again)
    assert again.read == [8]
    after = files(tmp_path)
    assert len(after) == len(before) + 1 and all(after[name] == data for name, data in before.items())


def test_two_starts_at_once_do_not_take_each_others_chunks(tmp_path: Path) -> None:
    encode_digits(tmp_path, 8)
    (tmp_path / "manifest.json").unlink()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    hold = "import sys; from pathlib import Path; from sfd_scale.data.writer import writing\n"
    hold += "with writing(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as first:
        assert first.stdout is not None and first.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=f"in use by process {first.pid} on .*or give another out="):
            encode_digits(tmp_path, 8)
        first.kill()
    assert encode_digits(tmp_path, 8).num_samples == 8


def test_what_is_stored_is_what_the_tokenizer_gives(tmp_path: Path) -> None:
    manifest = encode_digits(tmp_path, 12, image=True, features="shards")
    assert manifest.columns == {
        "id": "int", "label": "int", "image": "ndarray:uint8:3,32,32",
        "latents": "ndarray:float16:9,8,8", "features": "ndarray:float16:6,8,8",
        "latents_flip": "ndarray:float16:9,8,8", "features_flip": "ndarray:float16:6,8,8",
    }  # fmt: skip
    assert manifest.tokenizers == tokenizer().fingerprints and manifest.num_classes == 10 and manifest.image_size == 32
    rows = open_shards(tmp_path)
    images = torch.stack([digits(12)[i][0] for i in range(12)])
    both = []
    for suffix, turned in (("", images), ("_flip", images.flip(3))):
        encoded = tokenizer().encode(turned)
        assert encoded.features is not None
        latents = restored([rows[i][f"latents{suffix}"] for i in range(12)], "float16")
        features = restored([rows[i][f"features{suffix}"] for i in range(12)], "float16")
        # Batches of four there and twelve here: a last bit of fp32 may turn one of fp16.
        assert (latents - encoded.latents).abs().max() <= 2**-11 * encoded.latents.abs().max()
        assert (features - encoded.features).abs().max() <= 2**-11
        # 6 of 48 numbers a patch lose far more than 16 bits do.
        exact, read = (psnr(turned, tokenizer().decode(x)).mean() for x in (encoded.latents, latents))
        assert abs(exact - read) < 0.02
        both.append(encoded.latents)
    assert not torch.equal(both[0], both[1])
    for i in range(12):
        assert rows[i]["id"] == i and rows[i]["label"] == i % 10
        assert torch.equal(torch.from_numpy(rows[i]["image"].copy()), images[i])
    stats = LatentStats.load(tmp_path / "stats.safetensors")
    everything = torch.cat(both).double().transpose(0, 1).flatten(1)
    assert stats.hash == manifest.stats_hash
    assert (stats.mean - everything.mean(1)).abs().max() < 1e-6
    assert (stats.std - everything.std(1, correction=0)).abs().max() < 1e-6


def test_moments_and_bfloat16(tmp_path: Path) -> None:
    manifest = encode_digits(tmp_path, 8, latents="moments", dtype="bfloat16", flip=False)
    assert manifest.columns["logvar"] == "ndarray:uint16:9,8,8" and "latents_flip" not in manifest.columns
    logvar = restored([open_shards(tmp_path)[0]["logvar"]], "bfloat16")[0]
    texture, semantic = LAYOUT.split(logvar, dim=0)
    assert texture[:, 0, 0].tolist() == [-8, -7, -6, -5, -4, -3]
    assert semantic.unique().tolist() == [-30]  # the semantic codec has no variance
    with pytest.raises(ValueError, match=r"store\.latents: moments, but these codecs have no posterior variance"):
        encode(digits(4), tokenizer(), StoreConfig(latents="moments"), tmp_path / "b", {"store": {}})


def test_unreadable_images_are_listed_and_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for label in ("a", "b"):
        (tmp_path / "in" / label).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (32, 32), (i * 20, 0, 0)).save(tmp_path / "in" / label / f"{i}.png")
    (tmp_path / "in" / "a" / "3.png").write_bytes(b"")
    for i in range(8):  # a whole chunk
        (tmp_path / "in" / "b" / f"{i}.png").write_bytes(b"x")
    source = ImageFolder(FolderConfig(path=tmp_path / "in", size=32))
    options: dict[str, Any] = {"image": True, "latents": "none", "chunk": 4, "num_workers": 0}
    out = tmp_path / "out"
    for _ in range(2):  # the second start finds it complete, and says it again
        with pytest.raises(ValueError, match=r"9 images could not be read.*a/3\.png.*skip_unreadable=true"):
            encode_digits(out, 20, source, **options)
    manifest = encode_digits(out, 20, source, skip_unreadable=True, **options)
    assert manifest.num_samples == 11 and len(manifest.unreadable) == 9
    assert [line.split(" is ")[0][-7:] for line in manifest.unreadable[:2]] == ["a/3.png", "b/0.png"]
    assert "9 images could not be read and are left out" in caplog.text, "a warning, if they may be left out"
    rows = open_shards(out)
    assert [rows[i]["id"] for i in range(11)] == [0, 1, 2, 4, 5, 6, 7, 8, 9, 18, 19]
    assert [rows[i]["label"] for i in range(11)] == [0] * 9 + [1] * 2


def test_worker_processes_change_nothing(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    encode_digits(tmp_path / "a", 16, latents="none", image=True)
    encode_digits(tmp_path / "b", 16, latents="none", image=True, num_workers=2)
    a, b = (files(tmp_path / name) for name in "ab")
    assert a.keys() == b.keys() and [name for name in a if a[name] != b[name]] == ["manifest.json"]  # holds the recipe
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_folder_of_another_recipe_is_refused(tmp_path: Path) -> None:
    encode_digits(tmp_path, 8)
    with pytest.raises(ValueError, match="holds data of another recipe"):
        encode_digits(tmp_path, 8, flip=False)
    with pytest.raises(ValueError, match="holds data of another recipe"):
        encode_digits(tmp_path, 16)
    assert Manifest.read(tmp_path).num_samples == 8


def red_images(folder: Path, classes: str, each: int = 6) -> Path:
    """A folder of images per class, whose red is the class."""
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            Image.new("RGB", (16, 16), (ord(name), number, 0)).save(folder / name / f"{number}.png")
    return folder


def test_a_source_that_changed_since_the_first_start_is_refused(tmp_path: Path) -> None:
    """lora-scripts-next#347: images that were added later were left out, and with a new class labels were wrong."""
    options: dict[str, Any] = {"image": True, "latents": "none"}
    folder, out = red_images(tmp_path / "in", "bc"), tmp_path / "out"

    def again(place: Path = folder) -> Manifest:
        return encode_digits(out, 0, ImageFolder(FolderConfig(path=place, size=16)), **options)

    assert again().num_samples == 12
    assert again(red_images(tmp_path / "copy", "bc")).num_samples == 12, "the place of the images does not matter"
    (out / "shard.000001.00000.mds").unlink()
    red_images(folder, "a")  # now b and c have other class indices
    with pytest.raises(ValueError, match="was begun with 12 other images; the source has 18 now"):
        again()
    shutil.rmtree(folder / "a")
    (folder / "b" / "0.png").write_bytes((tmp_path / "copy" / "b" / "0.png").read_bytes() + b"more")
    with pytest.raises(ValueError, match="begun with 12 other images; the source has 12 now"):
        again()
    red_images(folder, "b")
    manifest = again()
    rows = open_shards(out)
    assert [rows[i]["label"] for i in range(manifest.num_samples)] == [0] * 6 + [1] * 6
    assert [rows[i]["image"][0, 0, 0] for i in (0, 5, 6, 11)] == [98, 98, 99, 99]
    # A folder of an earlier release does not record its images.
    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe.pop("images")["count"] == 12
    (out / "recipe.json").write_text(json.dumps(recipe))
    (folder / "b" / "0.png").write_bytes(b"other")
    assert again().num_samples == 12


def test_a_listing_knows_names_classes_and_sizes_of_every_kind_of_source(tmp_path: Path) -> None:
    image = red_images(tmp_path / "in", "a", each=1) / "a" / "0.png"

    def tar(*members: tuple[str, bytes]) -> str | None:
        with tarfile.open(tmp_path / "0.tar", "w") as archive:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return listing_sha256(make_source(TarConfig(path=tmp_path / "0.tar", size=16)))

    def parquet(labels: list[int]) -> str | None:
        pq.write_table(pa.table({"image": [image.read_bytes()] * len(labels), "label": labels}), tmp_path / "0.parquet")
        return listing_sha256(make_source(ParquetConfig(path=tmp_path / "0.parquet", size=16)))

    def mds(count: int) -> str | None:
        out = tmp_path / f"mds{count}"
        encode_digits(out, count, image=True, latents="none")
        return listing_sha256(make_source(MDSConfig(path=out)))

    png = image.read_bytes()
    tars = [
        tar(("a.png", png)), tar(("b.png", png)), tar(("a.png", png), ("a.cls", b"3")), tar(("a.png", png + b"x")),
        tar(("a.png", png), ("b.png", png)),
    ]  # fmt: skip
    found = [*tars, parquet([0]), parquet([1]), parquet([0, 0]), mds(8), mds(9)]
    assert None not in found and len(set(found)) == len(found)
    assert tar(("a.png", png)) == tars[0] and parquet([0]) == found[5]
    assert listing_sha256(digits(3)) is None, "generated images follow from the recipe"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"latents": "none"}, "latents: none, but image and features are off"),
        ({"chunk": 0}, "chunk: 0; allowed: 1 and up"),
        ({"num_workers": -1}, "num_workers: -1; allowed: 0 and up"),
    ],
)
def test_settings_that_make_no_sense(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StoreConfig(**setting)


class Black(ToyImages):
    """Equal images: every channel of their latents is constant."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = super().__getitem__(index)
        return torch.zeros_like(image), label


def test_constant_channels_are_named_after_the_first_chunk_and_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """ComfyUI-LTXVideo#540: the folder, the channels and the usual causes; a warning after the first chunk."""
    named = "latent channels 0-8 of 9: constant, .* a source of equal images"
    with pytest.raises(ValueError, match=f"{tmp_path}/out: {named}"):
        encode_digits(tmp_path / "out", 16, Black(DigitsConfig(num_images=16)), flip=False)
    (record,) = [record for record in caplog.records if "constant" in record.getMessage()]
    assert re.search(f"out: after the first chunk: {named}", record.getMessage())
    assert not (tmp_path / "out" / "manifest.json").exists()
    caplog.clear()
    encode_digits(tmp_path / "good", 16)
    assert "constant" not in caplog.text
