"""Files are hostile until shown otherwise: a parser answers any bytes but its own with an error of the user's kind.
`python -m faults.fuzz` does the same for longer."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from eval.images import npz
from eval.images.sources import FlatSource, open_images, source_for
from eval.recipes import load_any
from sfd_scale import build, config, export
from sfd_scale.checkpoint import load_weights
from sfd_scale.checkpoint.folder import read_metadata
from sfd_scale.checkpoint.official_checkpoint import infer_architecture
from sfd_scale.data import manifest as schema
from sfd_scale.data.image_io import UnreadableImage, read_image, read_whole_image
from sfd_scale.data.parquet import ParquetConfig, ParquetImages
from sfd_scale.data.tars import TarConfig, TarImages
from sfd_scale.recipe import TrainRecipe
from sfd_scale.runtime import memory
from sfd_scale.runtime.torch_file import TorchFile, plain
from sfd_scale.sample import load_for_sampling
from tests.faults.fuzz import TARGETS, Allowed, Target, mutated

# ---------------------------------------------------------------------------------------------- fuzzing


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each parser's folder with a file that it reads."""
    folders = {name: tmp_path_factory.mktemp(name) for name in TARGETS}
    for name, target in TARGETS.items():
        target.write(folders[name])
        target.read(folders[name])
    return folders


def read_or_refused(target: Target, folder: Path, changed: bytes) -> None:
    """The parser meets `changed` in place of its file, and ends well or in an error of the user's kind."""
    file = folder / target.file
    good = file.read_bytes()
    try:
        file.write_bytes(changed)
        target.read(folder)
    except Allowed as error:
        assert str(error)
    finally:
        file.write_bytes(good)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_bytes_are_read_or_refused(name: str, corpora: dict[str, Path], data: st.DataObject) -> None:
    target, folder = TARGETS[name], corpora[name]
    good = (folder / target.file).read_bytes()
    read_or_refused(target, folder, mutated(good, data.draw(st.integers(0, 2**32)), target.tokens))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if target.file.endswith(".json")])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_anywhere_in_a_json_file_is_read_or_refused(
    name: str, corpora: dict[str, Path], data: st.DataObject
) -> None:
    target, folder = TARGETS[name], corpora[name]
    tree = json.loads((folder / target.file).read_bytes())
    node, path = tree, []
    while isinstance(node, dict | list) and node and (not path or data.draw(st.booleans())):
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else list(range(len(node)))))
        path.append((node, key))
        node = node[key]
    owner, key = path[-1]
    owner[key] = data.draw(json_values)
    read_or_refused(target, folder, json.dumps(tree).encode())


# ------------------------------------------------------------------------------------------- crafted files


def _recipe(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!python/object/apply:os.mkdir [trapped]\n", "could not determine a constructor"),
        ("a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
            f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(8)
        ), "values once its aliases are followed"),
        ("a: &a\n  b: *a\n", "aliases are followed"),
        ("[" * 100_000, "not readable as settings"),
        ("kind: train\nname: ${oc.env:WANDB_API_KEY}\n", "reads a secret from the environment"),
        ("kind: train\nextends: ../../../etc/passwd\n", "allowed: a recipe name, or a file in the same folder"),
        ("kind: train\nextends: /etc/passwd\n", "allowed: a recipe name"),
        ("x: " + "y" * (2 << 20), "allowed: up to"),
    ],
    ids=["python", "billion laughs", "own parent", "deep", "secret", "outside", "absolute", "large"],
)  # fmt: skip
def test_hostile_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(config.ConfigError, match=message):
        load_any(str(_recipe(tmp_path / "x.yaml", text)))
    assert not (tmp_path / "trapped").exists()


def test_index_names_stay_in_the_folder_and_pickles_stay_closed(tmp_path: Path) -> None:
    TARGETS["index"].write(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    for change, message in (
        ({"raw_data": {**index["shards"][0]["raw_data"], "basename": "../secret.mds"}}, "points outside the folder"),
        ({"raw_data": {**index["shards"][0]["raw_data"], "basename": "a/b.mds"}}, "lies in another folder"),
        ({"column_encodings": ["pkl", "int", "int", "int"]}, "encoding 'pkl'; allowed"),
        ({"column_encodings": ["list[pil]", "int", "int", "int"]}, "allowed"),
        ({"samples": 10**15}, "do not fit"),
        ({"compression": "zstd"}, "compressed shard"),
    ):
        hostile = {**index, "shards": [{**index["shards"][0], **change}]}
        (tmp_path / "index.json").write_text(json.dumps(hostile))
        with pytest.raises(ValueError, match=message):
            schema.read_index(tmp_path)


def test_a_safetensors_header_that_claims_a_terabyte(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}}).encode()
    for name, data in (("claim", struct.pack("<Q", len(header)) + header), ("length", struct.pack("<Q", 1 << 40))):
        file = tmp_path / f"{name}.safetensors"
        file.write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}.safetensors is (truncated: 92 of|not a safetensors file)"):
            load_weights(file)


def test_an_npz_bomb_is_not_unpacked(tmp_path: Path) -> None:
    header = np.lib.format  # an array of 2 GB of zeros, 2 MB in the archive
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, claim in (("mu", (1 << 25,)), ("sigma", (4, 4)), ("arr_0", (1 << 20, 8, 8, 3))):
            with archive.open(f"{name}.npy", "w") as file:
                dtype = np.dtype(np.uint8 if name == "arr_0" else np.float64)
                header.write_array_header_1_0(  # type: ignore[no-untyped-call]
                    file, {"descr": header.dtype_to_descr(dtype), "fortran_order": False, "shape": claim}
                )
                for _ in range(int(np.prod(claim)) * dtype.itemsize // (1 << 20)):
                    file.write(bytes(1 << 20))
    with pytest.raises(ValueError, match=r"mu\.npy cannot be read: .* not an honest file"):
        npz.read_statistics(tmp_path / "bomb.npz")
    with pytest.raises(ValueError, match="not an honest file"):
        npz.NpzImages(tmp_path / "bomb.npz")


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "x.npz", mu=np.array([_Trap()], dtype=object), sigma=np.eye(1), arr_0=np.array([_Trap()], object)
    )
    with pytest.raises(ValueError, match="could run code"):
        npz.read_statistics(tmp_path / "x.npz")
    with pytest.raises(ValueError, match="could run code"):
        npz.NpzImages(tmp_path / "x.npz")
    assert not Path("trapped").exists()


class _Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("trapped",))


def test_a_png_bomb_and_a_decoder_of_another_format(tmp_path: Path) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    claim = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", claim) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    (tmp_path / "bomb.png").write_bytes(png)
    # PostScript under the name of a JPEG: Pillow would run Ghostscript on it.
    (tmp_path / "script.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nquit\n")
    for name, message in (("bomb.png", "decompression bomb"), ("script.jpg", "is a PostScript file")):
        with pytest.raises(UnreadableImage, match=message):
            read_image(tmp_path / name, 32)
        with pytest.raises(ValueError, match=message):
            read_whole_image(tmp_path / name)
    assert Image.MAX_IMAGE_PIXELS


def test_a_checkpoint_that_points_out_of_its_folder_or_claims_too_much(tmp_path: Path) -> None:
    TARGETS["metadata"].write(tmp_path)
    raw = (tmp_path / ".metadata").read_bytes()
    for old, new, message in (
        (b"__0_0.distcp", b"../../secret", "no tensor file of this folder"),
        (b"K\x03K\x05\x86", b"K\x7fJ\xff\xff\xff\x7f\x86", "bytes in files of"),
    ):
        assert old in raw
        changed = raw.replace(old, new)
        frame = struct.pack("<Q", len(changed) - 11)  # after \x80, the protocol and \x95 comes the length of the frame
        (tmp_path / ".metadata").write_bytes(changed[:3] + frame + changed[11:])
        with pytest.raises(OSError, match=message):
            TARGETS["metadata"].read(tmp_path)


class EarlyPython311(pickle.Pickler):
    """Members of enumerations as Python 3.11.2 stores them."""

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


def test_checkpoints_of_every_python_are_read_and_getattr_reaches_nothing_else(tmp_path: Path) -> None:
    TARGETS["metadata"].write(tmp_path)
    path, stored = tmp_path / ".metadata", read_metadata(tmp_path)
    with path.open("wb") as file:
        EarlyPython311(file).dump(stored)
    assert b"getattr" in path.read_bytes() and read_metadata(tmp_path) == stored
    for kind, name in ((type(stored), "__init__"), (_MEM_FORMAT_ENCODING, "__class__"), ("text", "format")):

        class Reaching:
            def __reduce__(self, kind: Any = kind, name: str = name) -> Any:
                return getattr, (kind, name)

        path.write_bytes(pickle.dumps(Reaching()))
        with pytest.raises(OSError, match=f"asks for '{name}' of"):
            read_metadata(tmp_path)


def test_tensors_of_a_torch_file_stay_in_their_storage(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(1 << 20, 1 << 20)}, tmp_path / "wide.pt")
    with pytest.raises(ValueError, match=r"a tensor of shape \(1048576, 1048576\)"):
        TorchFile(tmp_path / "wide.pt")
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))
    with pytest.raises(ValueError, match="records are compressed"):
        TorchFile(tmp_path / "packed.pt")
    laughs: list[Any] = [1]
    for _ in range(40):
        laughs = [laughs, laughs]
    with pytest.raises(ValueError, match="settings of more than"):
        plain(laughs)


# ------------------------------------------------------------------- sizes that follow from a few bytes of a file


def test_interpolations_that_double_are_refused_before_they_are_followed(tmp_path: Path) -> None:
    doubling = "".join(f"a{i}: ${{a{i - 1}}}${{a{i - 1}}}\n" for i in range(1, 40))
    nodes = "".join(f"a{i}:\n  l: ${{a{i - 1}}}\n  r: ${{a{i - 1}}}\n" for i in range(1, 40))
    relative = "".join(f"  a{i}: ${{.a{i - 1}}}${{.a{i - 1}}}\n" for i in range(1, 40))
    select = "".join(f"a{i}: ${{oc.select:a{i - 1}}}${{oc.select:a{i - 1}}}\n" for i in range(1, 40))
    for text in (f"a0: x\n{doubling}", f"a0:\n  x: 1\n{nodes}", f"b:\n  a0: x\n{relative}", f"a0: x\n{select}"):
        with pytest.raises(config.ConfigError, match="once its interpolations are followed"):
            load_any(str(_recipe(tmp_path / "x.yaml", f"kind: train\n{text}")))
    with pytest.raises(config.ConfigError, match="no interpolation inside another"):
        load_any(str(_recipe(tmp_path / "x.yaml", "kind: train\na: b\nb: x\nname: ${${a}}\n")))
    recipe = config.tree(_recipe(tmp_path / "y.yaml", "name: n\nrun: runs/${name}/${.seed}\nseed: 3\n"))
    assert recipe["run"] == "runs/n/3"


def test_a_pickle_takes_no_memory_for_the_numbers_in_its_memo(tmp_path: Path) -> None:
    """LONG_BINPUT with a number of two billion: the unpickler in C has an array of 32 GB for it."""
    memo = b"\x80\x02}r" + struct.pack("<I", 0x7FFFFFFF) + b"."
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("a/data.pkl", memo)
    assert TorchFile(tmp_path / "x.pt").content == {}
    claims = b"\x80\x05\x96" + struct.pack("<Q", 1 << 45) + b"."
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("a/data.pkl", claims)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        TorchFile(tmp_path / "x.pt")
    for data in (memo, claims):
        (tmp_path / ".metadata").write_bytes(data)
        with pytest.raises(OSError, match="cannot be read"):
            read_metadata(tmp_path)


def test_lists_of_lists_in_a_torch_file_are_read_once(tmp_path: Path) -> None:
    laughs: list[Any] = [torch.ones(1)]
    for _ in range(60):
        laughs = [laughs, laughs]
    itself: dict[str, Any] = {"a": torch.ones(1)}
    itself["b"] = itself
    torch.save(laughs, tmp_path / "laughs.pt")
    torch.save(itself, tmp_path / "itself.pt")
    file = TorchFile(tmp_path / "laughs.pt")
    part = file.load(file.content)
    assert part[0] is part[1]
    file = TorchFile(tmp_path / "itself.pt")
    with pytest.raises(ValueError, match="contains itself"):
        file.load(file.content)


def test_tar_members_that_claim_more_than_the_file_has(tmp_path: Path) -> None:
    def tar(claim: int, kind: bytes = tarfile.REGTYPE, name: str = "0.png") -> None:
        member = tarfile.TarInfo(name)
        member.size, member.type = claim, kind
        (tmp_path / "x.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))

    for claim in (1 << 20, 1 << 40, 1 << 62):
        tar(claim)
        with pytest.raises(ValueError, match=r"x\.tar is truncated|allowed: up to|x\.tar: "):
            TarImages(TarConfig(path=tmp_path / "x.tar"))
        tar(claim, tarfile.GNUTYPE_LONGNAME)
        with pytest.raises(ValueError, match=r"x\.tar"):
            TarImages(TarConfig(path=tmp_path / "x.tar"))
    for word in (b"10000000000000", b"9" * 30, b"-1", b"\xff", b"1.5"):
        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            for name, data in (("0.png", b"x"), ("0.cls", word)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        with pytest.raises(ValueError, match=r"x\.tar: 0\.cls holds .*; each image needs a \.cls member with a class"):
            TarImages(TarConfig(path=tmp_path / "x.tar"))


def test_parquet_rows_and_labels_are_bounded(tmp_path: Path) -> None:
    """A million rows of one value take a few hundred bytes in the file."""
    rows = 1_000_000
    many = pa.table({"image": pa.array([b""] * rows, pa.binary()), "label": pa.array(np.zeros(rows, np.int64))})
    pq.write_table(many, tmp_path / "x.parquet", compression="zstd")
    with pytest.raises(ValueError, match=r"x\.parquet: 1,000,000 rows in [\d,]+ bytes"):
        ParquetImages(ParquetConfig(path=tmp_path / "x.parquet"))
    for label in (1 << 40, -3):
        pq.write_table(pa.table({"image": [b"x"], "label": [label]}), tmp_path / "x.parquet")
        with pytest.raises(ValueError, match=rf"row 0: label {label} is not a class index; allowed: 0 to 1,048,575"):
            ParquetImages(ParquetConfig(path=tmp_path / "x.parquet"))


def test_images_to_score_are_bounded_in_pixels(tmp_path: Path) -> None:
    for shape in ((1 << 40, 0, 4, 3), (1 << 40, 4, 0, 3)):  # a billion images without pixels, in 128 bytes
        with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive, archive.open("arr_0.npy", "w") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)  # type: ignore[no-untyped-call]
        with pytest.raises(ValueError, match="allowed: 1 to 16,777,216 pixels"):
            npz.NpzImages(tmp_path / "x.npz")
    (tmp_path / "flat").mkdir()
    Image.new("L", (6000, 6000)).save(tmp_path / "flat" / "0.png")
    with pytest.raises(ValueError, match=r"0\.png: images of 6000x6000 pixels; allowed: 1 to 16,777,216"):
        open_images(FlatSource(path=tmp_path / "flat"))
    (tmp_path / "classes").mkdir()
    (tmp_path / "flat").rename(tmp_path / "classes" / "0")
    with pytest.raises(ValueError, match="allowed: 1 to 16,777,216 pixels"):
        source_for(tmp_path / "classes")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("model.width=20000", r"111\.1 GiB of memory"),  # 29.8e9 weights of 4 bytes
        ("model.num_classes=100000000000", "GiB of memory"),
        ("model.width=4000000000", "too large for any machine"),
        ("model.mlp_ratio=1e300", "too large for any machine"),
    ],
)
def test_a_model_that_no_memory_holds_is_refused_before_it_is_made(
    setting: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 64 << 30)
    with pytest.raises(ValueError, match=words):
        build.make_model(config.load("quickstart/sfd", TrainRecipe, [setting]))
    if "any machine" in words:
        with pytest.raises(ValueError, match=f"{words}.*; use a smaller one$"):
            build.footprint(config.load("quickstart/sfd", TrainRecipe, [setting]))


def test_a_compressed_npz_needs_the_memory_that_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    np.savez_compressed(tmp_path / "x.npz", arr_0=noise)
    assert len(npz.NpzImages(tmp_path / "x.npz")) == 8
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    with pytest.raises(ValueError, match=r"needs 0\.0 GiB of memory, .* write the file uncompressed"):
        npz.NpzImages(tmp_path / "x.npz")


def test_labels_of_many_bytes_or_of_another_encoding(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "0.png")
    for data, message in ((b"0" + b" " * 4096, "4,097 bytes for 1 labels"), ("0".encode("utf-16"), "save it in UTF-8")):
        (tmp_path / "labels.txt").write_bytes(data)
        with pytest.raises(ValueError, match=message):
            open_images(FlatSource(path=tmp_path))


def test_an_export_whose_recipe_claims_a_larger_model(tmp_path: Path) -> None:
    TARGETS["export"].write(tmp_path)
    note = export.read_note(tmp_path / "x.safetensors")
    for change, message in (
        ({"depth": 4, "width": 1 << 20, "heads": 1 << 14}, "missing weights, 3 values of [\\d,]{15}"),
        ({"depth": 1_000_000_000, "width": 64, "heads": 4}, "depth: 1000000000; allowed: 1 to 10,000"),
        ({"depth": 2, "width": 1 << 62, "heads": 1}, "too large for any machine"),
        ({"num_classes": 1 << 60}, "too large for any machine"),
        ({"mlp_ratio": 1e300}, "too large for any machine"),
        ({"mlp_ratio": math.inf}, "mlp_ratio: inf; allowed: above 0"),
    ):
        recipe = {**note["recipe"], "model": {**note["recipe"]["model"], "size": None, **change}}
        text = json.dumps({**note, "recipe": recipe})
        save_file({"w": torch.ones(3)}, tmp_path / "x.safetensors", metadata={export.EXPORT_KEY: text})
        with pytest.raises(ValueError, match=message):
            load_for_sampling(tmp_path / "x.safetensors", torch.device("cpu"))
    blocks = {f"blocks.{i}.x": torch.zeros(1) for i in (0, 999_999_999)}
    needed = ("pos_embed", "y_embedder.embedding_table.weight", "final_layer.linear.weight")
    named = ("blocks.0.adaLN_modulation.1.weight", "blocks.0.mlp.w3.weight", *needed)
    state = {**blocks, **{name: torch.zeros(2, 2) for name in named}, "x_embedder.proj.weight": torch.zeros(8, 2, 1, 1)}
    with pytest.raises(ValueError, match="these weights lack blocks: they have 2, with numbers up to 999999999"):
        infer_architecture(state)
