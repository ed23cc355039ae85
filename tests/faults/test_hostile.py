"""Files are hostile until shown otherwise: a parser answers any bytes but its own with an error of the user's kind.
`python -m faults.fuzz` does the same for longer."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
import zlib
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from eval.images import npz
from eval.recipes import load_any
from sfd_scale import config
from sfd_scale.checkpoint import load_weights
from sfd_scale.checkpoint.folder import read_metadata
from sfd_scale.data import manifest as schema
from sfd_scale.data.image_io import UnreadableImage, read_image, read_whole_image
from sfd_scale.runtime.torch_file import TorchFile, plain
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
        ({"raw_data": {**index["shards"][0]["raw_data"], "basename": "a/b.mds"}}, "points outside the folder"),
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
        (tmp_path / ".metadata").write_bytes(raw.replace(old, new))
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
