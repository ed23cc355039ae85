"""Shards that are lost or damaged while they are read, killed readers, full disks: named, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfd_scale.data.dataloader import DataConfig, LatentLoader
from sfd_scale.data.manifest import read_index
from sfd_scale.data.mds_reader import MDSReader
from sfd_scale.data.mosaic import streaming
from sfd_scale.data.shards import open_shards
from sfd_scale.runtime.batch_split import BatchSplit
from tests.helpers.encoded import encode_digits, files

COUNT = 32  # four shards of eight


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    encode_digits(out, COUNT, image=True, features="shards")
    return out


@pytest.fixture
def data(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "data"))


def reader(path: Path, **settings: Any) -> LatentLoader:
    config = DataConfig(path=path, shuffle=False, **settings)
    return LatentLoader(config, seed=0, split=BatchSplit(8, 1, 1), rank=0)


def test_rows_are_what_the_library_reads(whole: Path) -> None:
    """Its own reader decodes the same bytes, column by column."""
    own, number = open_shards(whole), 0
    for entry in read_index(whole)["shards"]:
        library = streaming("streaming.base.format").reader_from_json(str(whole), None, entry)
        for row in range(entry["samples"]):
            expected, found = library[row], own[number]
            assert expected.keys() == found.keys()
            assert all(np.array_equal(expected[name], found[name]) for name in expected)
            number += 1
    assert number == COUNT
    labels, mixed = own.gather([3, 30, 9], [["label"] * 3, ["latents", "latents_flip", "latents"]])
    assert labels.tolist() == [own[i]["label"] for i in (3, 30, 9)]
    assert np.array_equal(mixed[1], own[30]["latents_flip"]) and mixed.shape == (3, 9, 8, 8)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_disappears_ends_the_run_with_its_name(data: Path, workers: int) -> None:
    """StreamingDataset would end the epoch early without a word; here every batch is whole, or there is an error."""
    (data / "shard.000002.00000.mds").rename(data / "away")
    rows = MDSReader(data)
    assert rows[15]["id"] == 15
    with pytest.raises(ValueError, match=r"shard\.000002\.00000\.mds: missing"):
        rows[16]
    (data / "away").rename(data / "shard.000002.00000.mds")
    own = reader(data, num_workers=workers)
    (data / "shard.000003.00000.mds").unlink()
    batches: Iterator[Any] = own.batches(0)
    assert [len(next(batches)) for _ in range(3)] == [8, 8, 8]
    with pytest.raises(ValueError, match=r"shard\.000003\.00000\.mds: missing"):
        next(batches)


def test_a_shard_that_is_cut_off_while_it_is_read(data: Path) -> None:
    rows, shard = open_shards(data), data / "shard.000001.00000.mds"
    assert rows[8]["id"] == 8  # now it is open
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(ValueError, match=rf"{shard.name}: truncated while it was read"):
        rows[15]
    with pytest.raises(ValueError, match=rf"{shard.name}: \d+ bytes, expected \d+"):
        MDSReader(data)[8]


def test_a_shard_of_other_data_in_its_place(data: Path, tmp_path: Path) -> None:
    shard = data / "shard.000001.00000.mds"
    content = bytearray(shard.read_bytes())
    content[4] ^= 1  # where its first sample starts
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{shard.name}: its header does not match index\.json"):
        open_shards(data)[8]


def test_labels_that_are_no_classes_are_noticed(data: Path) -> None:
    """A shard that is damaged inside, with the right size and head, is found by `sfd check-data`; labels are checked
    as they are read."""
    shard = MDSReader(data).shards[0]
    content = bytearray(shard.path.read_bytes())
    content[shard.start + shard.columns["label"].offset + 7] = 1  # the highest byte of the first label
    shard.path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"labels from \d+ to \d+, but 10 classes; a shard is damaged: run `sfd check-data"
    ):
        next(reader(data).batches(0))


def test_many_shards_take_few_descriptors(data: Path) -> None:
    rows = MDSReader(data, max_open_files=2)
    before = len(os.listdir("/proc/self/fd"))
    for index in (0, 8, 16, 24, 1, 9, 17, 25):
        assert rows[index]["id"] == index
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    rows.close()
    assert len(os.listdir("/proc/self/fd")) == before


READ_FOR_EVER = """
import multiprocessing, sys
from pathlib import Path
from sfd_scale.data.dataloader import DataConfig, LatentLoader
from sfd_scale.runtime.batch_split import BatchSplit
config = DataConfig(path=Path(sys.argv[1]), remote=sys.argv[2], num_workers=2)
batches = LatentLoader(config, seed=0, split=BatchSplit(8, 1, 1), rank=0).batches(0)
for number, _ in enumerate(batches):
    if number == 20:
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
"""


def test_a_killed_reader_leaves_a_tensor_of_a_worker_at_most_and_its_cache_serves_the_next(
    whole: Path, tmp_path: Path
) -> None:
    """SIGKILL of the whole process group, as a scheduler kills; twice on one cache, at once and after each other."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", READ_FOR_EVER, str(tmp_path / "cache"), str(whole)]
    for _ in range(2):
        running = [
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
            for _ in range(2)
        ]
        pids: list[str] = []
        for process in running:
            assert process.stdout is not None
            children = process.stdout.readline().split()
            assert len(children) == 2
            pids += [str(process.pid), *children]
        for process in running:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        # A worker creates a file for each tensor and unlinks it at once. A kill between the two leaves that one.
        owners = {path: path.name.split("_")[1] for path in Path("/dev/shm").glob("torch_*")}
        left = [path for path, pid in owners.items() if pid in pids]
        sizes = [path.stat().st_size for path in left]
        for path in left:
            path.unlink()
        assert len({owners[path] for path in left}) == len(left) and sum(sizes) < 1 << 20, sizes
    cached = reader(tmp_path / "cache", remote=str(whole))
    assert next(cached.batches(0)).labels.tolist() == next(reader(whole).batches(0)).labels.tolist()


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """On a file system of half a megabyte; then it grows, and the same command goes on."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        with pytest.raises(ValueError, match="the disk is full; free some space and give the same command again"):
            encode_digits(small / "out", COUNT, image=True, features="shards")
        committed = [path for path in (small / "out" / "chunks").glob("00000?") if (path / "note.json").is_file()]
        assert 1 <= len(committed) < COUNT // 8
        subprocess.run(["mount", "-o", "remount,size=8m", str(small)], check=True)
        encode_digits(small / "out", COUNT, image=True, features="shards")
        encode_digits(tmp_path / "straight", COUNT, image=True, features="shards")
        assert files(small / "out") == files(tmp_path / "straight")
    finally:
        subprocess.run(["umount", str(small)], check=True)
