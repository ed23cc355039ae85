"""Chunks: atomic, joined in order, written again when lost; the manifest and the index are checked."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sfd_scale.data.manifest import Manifest, encoding, read_index, restored, stored
from sfd_scale.data.shards import MDSReader, check_data, open_shards
from sfd_scale.data.writer import (
    ChunkNote,
    Description,
    finish,
    is_committed,
    require_recipe,
    write_chunk,
)
from sfd_scale.diffusion.latents import LatentStats, StatsAccumulator

COLUMNS = {"id": "int", "label": "int", "latents": "ndarray:float16:2,3,3"}


def rows(chunk: int, count: int = 4, note: ChunkNote | None = None) -> Iterator[dict[str, Any]]:
    for i in range(count):
        index = chunk * 4 + i
        latents = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(index))
        if note is not None and note.stats is not None:
            note.stats.update(latents)
        yield {"id": index, "label": index % 3, "latents": latents[0].half().numpy()}


def write(out: Path, chunks: list[int], count: int = 4) -> None:
    (out / "chunks").mkdir(parents=True, exist_ok=True)
    for chunk in chunks:
        note = ChunkNote([], StatsAccumulator(2))
        write_chunk(out, chunk, COLUMNS, rows(chunk, count, note), note)


def join(out: Path, count: int) -> Manifest:
    return finish(out, count, Description(num_classes=3, image_size=3, columns=COLUMNS, dtype="float16"))


def test_joined_rows_are_those_written_whatever_the_order(tmp_path: Path) -> None:
    write(tmp_path / "a", [2, 0, 1])
    write(tmp_path / "b", [0, 1, 2])
    manifests = [join(tmp_path / name, 3) for name in "ab"]
    assert manifests[0] == manifests[1] and manifests[0].num_samples == 12
    opened = open_shards(tmp_path / "a")
    wanted = [row for chunk in range(3) for row in rows(chunk)]
    for index, row in enumerate(wanted):
        got = opened[index]
        assert got["id"] == index == row["id"] and got["label"] == row["label"]
        assert np.array_equal(got["latents"], row["latents"])
    assert [s["raw_data"]["basename"] for s in read_index(tmp_path / "a")["shards"]] == [
        f"shard.00000{chunk}.00000.mds" for chunk in range(3)
    ]
    everything = torch.cat([torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(i)) for i in range(12)])
    whole = StatsAccumulator(2)
    whole.update(everything)
    found = LatentStats.load(tmp_path / "a" / "stats.safetensors")
    assert (found.mean - whole.finish().mean).abs().max() < 1e-12
    assert (found.std - everything.double().transpose(0, 1).flatten(1).std(1, correction=0)).abs().max() < 1e-12


def test_a_chunk_that_fails_is_not_committed(tmp_path: Path) -> None:
    def torn() -> Iterator[dict[str, Any]]:
        yield from rows(0, 2)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_chunk(tmp_path, 0, COLUMNS, torn(), ChunkNote([], None))
    assert not is_committed(tmp_path, 0)

    def refuse(folder: Path) -> None:
        raise ValueError("reads back differently")

    with pytest.raises(ValueError, match="reads back"):
        write_chunk(tmp_path, 0, COLUMNS, rows(0), ChunkNote([], None), refuse)
    assert not is_committed(tmp_path, 0)
    write(tmp_path, [0])
    assert is_committed(tmp_path, 0)


def test_a_full_disk_says_so_and_leaves_no_half_written_chunk(tmp_path: Path) -> None:
    def full() -> Iterator[dict[str, Any]]:
        yield from rows(0, 2)
        raise OSError(errno.ENOSPC, "No space left on device")

    write(tmp_path, [1])
    with pytest.raises(ValueError, match="the disk is full; free some space"):
        write_chunk(tmp_path, 0, COLUMNS, full(), ChunkNote([], None))
    assert [path.name for path in (tmp_path / "chunks").iterdir()] == ["000001"]


def test_a_lost_or_cut_shard_makes_its_chunk_missing(tmp_path: Path) -> None:
    write(tmp_path, [0, 1, 2])
    first = join(tmp_path, 3)
    index = (tmp_path / "index.json").read_bytes()
    (tmp_path / "shard.000001.00000.mds").unlink()
    shard = tmp_path / "shard.000002.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert [is_committed(tmp_path, chunk) for chunk in range(3)] == [True, False, False]
    with pytest.raises(ValueError, match=r"shard\.000001.*missing; encode into this folder again"):
        open_shards(tmp_path)
    write(tmp_path, [1, 2])
    assert join(tmp_path, 3) == first and (tmp_path / "index.json").read_bytes() == index
    assert check_data(tmp_path) == []


def test_chunks_without_samples(tmp_path: Path) -> None:
    write(tmp_path, [0, 2])
    write(tmp_path, [1], count=0)
    assert is_committed(tmp_path, 1) and join(tmp_path, 3).num_samples == 8
    write(tmp_path / "none", [0], count=0)
    with pytest.raises(ValueError, match="not one sample was written"):
        join(tmp_path / "none", 1)


def test_a_folder_belongs_to_one_recipe(tmp_path: Path) -> None:
    require_recipe(tmp_path / "a", {"size": 2})
    require_recipe(tmp_path / "a", {"size": 3})  # the first start ended before it had anything
    write(tmp_path / "a", [0])
    require_recipe(tmp_path / "a", {"size": 3})
    with pytest.raises(ValueError, match=r"out: .* holds data of another recipe"):
        require_recipe(tmp_path / "a", {"size": 4})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no recipe\.json"):
        require_recipe(tmp_path / "b", {"size": 3})


@pytest.mark.parametrize("name", ["../outside.mds", "/etc/passwd", "..", "sub/shard.mds"])
def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    write(tmp_path, [0])
    join(tmp_path, 1)
    index = json.loads((tmp_path / "index.json").read_text())
    index["shards"][0]["raw_data"]["basename"] = name
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="points outside the folder|'sub/shard.mds' lies in another folder"):
        read_index(tmp_path)
    with pytest.raises(ValueError, match=r"index\.json does not match manifest\.json"):
        open_shards(tmp_path)


def test_pickled_columns_are_refused(tmp_path: Path) -> None:
    write(tmp_path, [0])
    join(tmp_path, 1)
    index = json.loads((tmp_path / "index.json").read_text())
    index["shards"][0]["column_encodings"][0] = "pkl"
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="encoding .pkl."):
        MDSReader(tmp_path)


def test_check_data_finds_one_flipped_bit(tmp_path: Path) -> None:
    write(tmp_path, [0, 1])
    join(tmp_path, 2)
    assert check_data(tmp_path) == []
    shard = tmp_path / "shard.000001.00000.mds"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert [line.split(": ")[0] for line in check_data(tmp_path)] == [str(shard)]
    open_shards(tmp_path)  # its size is right: only check-data reads every byte
    shard.write_bytes(data[:-3])
    assert check_data(tmp_path) == [f"{shard}: {len(data) - 3} bytes, expected {len(data)}"]
    shard.unlink()
    (tmp_path / "stats.safetensors").write_bytes(b"torn")
    assert [line.rpartition("/")[2].split(":")[0] for line in check_data(tmp_path)] == ["stats.safetensors", shard.name]


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="encode the data first"):
        Manifest.read(tmp_path)
    (tmp_path / "manifest.json").write_text('{"num_samples": 3')
    with pytest.raises(ValueError, match=r"manifest\.json is truncated or damaged .* or encode into this folder again"):
        Manifest.read(tmp_path)
    write(tmp_path, [0])
    join(tmp_path, 1)
    (tmp_path / "manifest.json").write_text(
        (tmp_path / "manifest.json").read_text().replace('"format": 1', '"format": 9')
    )
    with pytest.raises(ValueError, match="format 9; this release reads up to 1"):
        Manifest.read(tmp_path)


def test_stored_values_come_back_within_half_a_unit_of_16_bits() -> None:
    values = torch.randn(50, 2, 3, 3, generator=torch.Generator().manual_seed(0)) * 8
    for dtype, bits in (("float16", 11), ("bfloat16", 8)):
        back = restored(list(stored(values, dtype)), dtype)  # type: ignore[arg-type]
        assert ((back - values).abs() / values.abs()).max() <= 2.0**-bits
        assert (back != values).float().mean() > 0.9
    assert encoding("float16", (2, 3)) == "ndarray:float16:2,3" and encoding("bfloat16", (4,)) == "ndarray:uint16:4"
    with pytest.raises(ValueError, match=r"beyond the range of float16; set store\.dtype=bfloat16"):
        stored(torch.tensor([7e4]), "float16")
    assert restored([stored(torch.tensor([7e4]), "bfloat16")], "bfloat16").item() == pytest.approx(7e4, rel=2**-8)
    with pytest.raises(ValueError, match="not finite"):
        stored(torch.tensor([torch.nan]), "bfloat16")
