"""Reading from a real S3 server (moto) behind a proxy with faults: every fault ends in a retry, or in one sentence."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.object_store import ObjectStore, Traffic, object_store, variables
from benchmarks.remote import Size, write_shards
from sfd_scale.data.dataloader import DataConfig, LatentLoader
from sfd_scale.data.download import FetchError, FetchLimits
from sfd_scale.data.shards import check_data, open_shards
from sfd_scale.runtime.batch_split import BatchSplit
from tests.helpers import small_run
from tests.helpers.encoded import encode_digits

COUNT = 44
LIMITS = FetchLimits(timeout_s=30, min_rate=1000, attempts=3, backoff_s=0.02, wait_s=60)
# For faults that only a time limit ends. On a busy machine a healthy answer takes a second, too.
SHORT = dataclasses.replace(LIMITS, timeout_s=1.5, min_rate=100_000)
SLOW_FAULTS = ("silence", "trickle")
SHARD = "shard.000001.00000.mds"  # samples 8 to 15
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data")
    encode_digits(out, COUNT)
    return out


@pytest.fixture(scope="module")
def server(data: Path) -> Iterator[tuple[ObjectStore, str]]:
    with object_store() as store:
        yield store, store.upload(data, "digits")


@pytest.fixture
def remote(server: tuple[ObjectStore, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ObjectStore, str]]:
    store, address = server
    for name, value in variables(store.address).items():
        monkeypatch.setenv(name, value)
    store.traffic, store.latency_s = Traffic(), 0.0
    yield store, address
    store.fault, store.latency_s = lambda name, number: None, 0.0


def latents(path: Path, remote: str | None = None, steps: int = 6) -> list[torch.Tensor]:
    config = DataConfig(path=path, remote=remote, shuffle_block=20)
    loader = LatentLoader(config, seed=5, split=BatchSplit(4, 2, 1), rank=0)
    batches = [batch.latents for batch in itertools.islice(loader.batches(0), 2 * steps)]
    loader.close()
    return batches


def test_the_batches_from_s3_are_those_of_the_folder_and_no_shard_is_fetched_twice(
    remote: tuple[ObjectStore, str], data: Path, tmp_path: Path
) -> None:
    store, address = remote
    own = latents(tmp_path, address)
    assert all(torch.equal(a, b) for a, b in zip(own, latents(data), strict=True))
    assert check_data(tmp_path) == []
    shards = {name: count for name, count in store.traffic.requests.items() if name.endswith(".mds")}
    assert shards == dict.fromkeys((file.name for file in data.glob("*.mds")), 1)
    assert not list((tmp_path / ".incoming").iterdir())


def test_shards_are_fetched_ahead_while_the_step_computes(remote: tuple[ObjectStore, str], tmp_path: Path) -> None:
    store, address = remote
    store.latency_s = 0.2
    config = DataConfig(path=tmp_path, remote=address, order="blocks", shuffle_block=8)
    loader = LatentLoader(config, seed=5, split=BatchSplit(8, 1, 1), rank=0)
    batches = loader.batches(0)
    next(batches)
    end = time.monotonic() + 60
    while len(list(tmp_path.glob("*.mds"))) < len(loader.shard_sizes) and time.monotonic() < end:
        time.sleep(0.01)  # the step computes, and asks for nothing
    arrived = dict(store.traffic.requests)
    for _ in range(loader.steps_per_epoch - 1):
        next(batches)
    loader.close()
    assert store.traffic.requests == arrived and sum(name.endswith(".mds") for name in arrived) == 6


@pytest.mark.parametrize("fault", ["error-500", "slow-down", "reset", "silence", "trickle", "truncated", "wrong"])
def test_a_fault_that_passes_is_tried_again(remote: tuple[ObjectStore, str], tmp_path: Path, fault: str) -> None:
    store, address = remote
    store.fault = lambda name, number: fault if number == 0 and name in (SHARD, "index.json") else None
    own = open_shards(tmp_path, address, limits=SHORT if fault in SLOW_FAULTS else LIMITS)
    assert own[8]["id"] == 8
    assert store.traffic.requests[SHARD] == store.traffic.requests["index.json"] == 2
    assert check_data(tmp_path)[0].endswith("missing")  # the other shards; the one that was read is whole
    assert not any(SHARD in line for line in check_data(tmp_path))


@pytest.mark.parametrize(
    ("fault", "cause", "requests", "message"),
    [
        ("error-500", "network", 3, r"could not be read \(500 InternalError\)"),
        ("reset", "network", 3, "could not be read"),
        ("wrong", "damaged", 3, rf"the SHA-256 of .*{SHARD} does not match index\.json"),
        ("truncated", "network", 3, "could not be read"),
        ("denied", "denied", 1, r"no permission to read s3://.* \(403 AccessDenied\)"),
        ("expired", "expired", 1, r"have expired \(ExpiredToken\); renew them"),
        ("missing", "missing", 1, r"does not exist \(NoSuchKey\)"),
    ],
)
def test_a_fault_that_stays_is_one_sentence(
    remote: tuple[ObjectStore, str], tmp_path: Path, fault: str, cause: str, requests: int, message: str
) -> None:
    store, address = remote
    store.fault = lambda name, number: fault if name == SHARD else None
    own = open_shards(tmp_path, address, limits=LIMITS)
    with pytest.raises(FetchError, match=message) as raised:
        own[8]
    assert raised.value.cause == cause and "\n" not in str(raised.value)
    assert store.traffic.requests[SHARD] == requests
    assert own[0]["id"] == 0  # the others are read
    assert not list((tmp_path / ".incoming").iterdir())
    store.fault = lambda name, number: None
    assert own[8]["id"] == 8


def test_a_silent_store_holds_a_reader_for_the_timeout_only(remote: tuple[ObjectStore, str], tmp_path: Path) -> None:
    store, address = remote
    own = open_shards(tmp_path, address, limits=SHORT)
    store.fault = lambda name, number: "silence"
    started = time.monotonic()
    with pytest.raises(FetchError, match="could not be read"):
        own[8]
    assert time.monotonic() - started < 30


def test_the_error_of_a_fetch_ahead_reaches_the_step(remote: tuple[ObjectStore, str], tmp_path: Path) -> None:
    store, address = remote
    store.fault = lambda name, number: "expired" if name.endswith(".mds") else None
    with pytest.raises(FetchError, match=r"have expired \(ExpiredToken\)"):
        latents(tmp_path, address)


def test_without_credentials_a_public_bucket_is_read_and_a_private_one_says_what_to_set(
    remote: tuple[ObjectStore, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, address = remote
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    assert open_shards(tmp_path / "public", address, limits=LIMITS)[0]["id"] == 0
    store.fault = lambda name, number: "denied"
    with pytest.raises(FetchError, match=r"no credentials were found, and .* is not public .* set AWS_ACCESS_KEY_ID"):
        open_shards(tmp_path / "private", address, limits=LIMITS)


def test_a_missing_description_says_what_is_missing(remote: tuple[ObjectStore, str], tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"s3://data/absent has no manifest\.json; upload a complete encoded folder"):
        open_shards(tmp_path, "s3://data/absent", limits=LIMITS)
    with pytest.raises(FetchError, match="allowed: a folder, or an address that begins with s3, gs, azure, oci, hf"):
        open_shards(tmp_path, "az://account/data", limits=LIMITS)


def test_a_cache_limit_below_the_shards_in_use_is_refused_with_the_size(
    remote: tuple[ObjectStore, str], data: Path, tmp_path: Path
) -> None:
    _, address = remote
    size = (data / SHARD).stat().st_size

    def loader(limit: int) -> LatentLoader:
        config = DataConfig(path=tmp_path, remote=address, cache_limit=str(limit), order="blocks", shuffle_block=44)
        return LatentLoader(config, seed=5, split=BatchSplit(8, 1, 1), rank=0)

    with pytest.raises(ValueError, match=r"data\.cache_limit: \d+ bytes .*allowed: \d+ bytes and up .*in use"):
        loader(int(4.5 * size))
    assert len(next(loader(6 * size).batches(0))) == 8


@pytest.fixture(scope="module")
def many_shards(server: tuple[ObjectStore, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """64 shards of 4 samples."""
    folder = tmp_path_factory.mktemp("many")
    write_shards(folder, Size(shards=64, per_shard=4))
    return folder, server[0].upload(folder, "many")


def smallest_limit(config: DataConfig, split: BatchSplit) -> int:
    """The smallest allowed cache limit, as the error message says it."""
    with pytest.raises(ValueError, match=r"allowed: \d+ bytes and up") as refused:
        LatentLoader(dataclasses.replace(config, cache_limit="900kb"), seed=5, split=split, rank=0)
    found = re.search(r"allowed: (\d+) bytes", str(refused.value))
    assert found is not None
    return int(found[1])


def size_of(cache: Path) -> int:
    """Bytes of the shards in a cache, with the downloads in progress."""
    total = 0
    for file in [*cache.glob("*.mds"), *cache.glob(".incoming/*.mds")]:
        with contextlib.suppress(FileNotFoundError):  # a thread has just deleted or renamed it
            total += file.stat().st_size
    return total


@pytest.mark.parametrize("order", ["blocks", "window"])
def test_within_the_smallest_cache_limit_no_shard_is_fetched_twice_in_an_epoch(
    remote: tuple[ObjectStore, str], many_shards: tuple[Path, str], tmp_path: Path, order: Any
) -> None:
    """Two epochs. The blocks of an epoch follow one another in a cache that does not hold all shards."""
    (store, _), (folder, address) = remote, many_shards
    config = DataConfig(path=tmp_path, remote=address, order=order, shuffle_block=32, lanes=4)
    split, size = BatchSplit(4, 1, 1), max(file.stat().st_size for file in folder.glob("*.mds"))
    limit = smallest_limit(config, split)
    assert limit < 0.6 * 64 * size, "the cache holds a part of the data only"
    config = dataclasses.replace(config, cache_limit=str(limit))
    loader = LatentLoader(config, seed=5, split=split, rank=0)
    largest, counts = 0, []
    for step, _ in zip(range(2 * loader.steps_per_epoch), loader.batches(0), strict=False):
        largest = max(largest, size_of(tmp_path))
        if step in (loader.steps_per_epoch - 1, 2 * loader.steps_per_epoch - 1):
            counts.append({name: n for name, n in store.traffic.requests.items() if name.endswith(".mds")})
    loader.close()
    assert largest <= limit
    # Once in each epoch, and some for the beginning of the next one: as many as are downloaded ahead.
    ahead = limit / 4 / size + 2
    for epochs, found in enumerate(counts, start=1):
        assert len(found) == 64 and max(found.values()) <= epochs + 1
        assert sum(found.values()) <= epochs * 64 + ahead


@pytest.mark.parametrize("nodes", [2, 4])
def test_a_node_reads_its_own_part_of_the_data(
    remote: tuple[ObjectStore, str], many_shards: tuple[Path, str], tmp_path: Path, nodes: int
) -> None:
    """Two epochs of each node, with a cache of its own. A shard on the border of two parts is read by both."""
    (store, _), (folder, address) = remote, many_shards
    whole, read = sum(file.stat().st_size for file in folder.glob("*.mds")), []
    for node in range(nodes):
        store.traffic = Traffic()
        config = DataConfig(path=tmp_path / str(node), remote=address, order="window", shuffle_block=64, lanes=8)
        loader = LatentLoader(config, seed=5, split=BatchSplit(16 // nodes, 1, nodes), rank=node)
        for _ in zip(range(2 * loader.steps_per_epoch), loader.batches(0), strict=False):
            pass
        loader.close()
        read.append(store.traffic.bytes)
    assert max(read) <= 1.1 / nodes * whole
    assert sum(read) > 0.95 * whole


CAUSES = [
    ("denied", r"no permission to read s3://data/digits/\S+ \(403 AccessDenied\); check the credentials"),
    ("expired", r"the credentials for s3://data/digits/\S+ have expired \(ExpiredToken\); renew them"),
    ("missing", r"s3://data/digits/\S+ does not exist \(NoSuchKey\); upload a complete encoded folder"),
    ("error-500", r"s3://data/digits/\S+ could not be read \(500 InternalError\)"),
    ("wrong", r"the SHA-256 of s3://data/digits/\S+ does not match index\.json"),
]


@pytest.mark.parametrize(
    ("fault", "said"), [CAUSES[0], *(pytest.param(*case, marks=pytest.mark.full) for case in CAUSES[1:])]
)
def test_a_training_whose_store_fails_ends_with_one_sentence_and_exit_code_2(
    remote: tuple[ObjectStore, str], data: Path, tmp_path: Path, fault: str, said: str
) -> None:
    store, address = remote
    store.fault = lambda name, number: fault if name.endswith(".mds") else None
    recipe = small_run.write_recipe(tmp_path / "recipe.yaml", tmp_path / "cache")
    command = [sys.executable, "-m", "sfd_scale", "train", str(recipe), "--run", str(tmp_path / "run")]
    done = subprocess.run(
        [*command, f"data.remote={address}"], cwd=ROOT, capture_output=True, text=True, timeout=150,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(rf"^error: data\.remote: {said}", line) and "Traceback" not in done.stderr
    assert not list((tmp_path / "cache").glob("*.mds")) and not list((tmp_path / "cache" / ".incoming").iterdir())


READ_ALL = """
import sys
import threading
from pathlib import Path
from sfd_scale.data.shards import open_shards
own = open_shards(Path(sys.argv[1]), sys.argv[2])
print("begins", flush=True)
print([own[i]["id"] for i in range(own.num_samples)] == list(range(own.num_samples)), flush=True)
"""


def test_a_killed_process_does_not_hold_up_the_others(remote: tuple[ObjectStore, str], tmp_path: Path) -> None:
    store, address = remote
    store.latency_s = 0.3
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.Popen(
        [sys.executable, "-c", READ_ALL, str(tmp_path), address], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert killed.stdout is not None and killed.stdout.readline() == "begins\n"
    deadline = time.monotonic() + 60
    while not list((tmp_path / ".incoming").iterdir()) and time.monotonic() < deadline:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    own = open_shards(tmp_path, address, limits=LIMITS)
    assert not list((tmp_path / ".incoming").iterdir())  # what the dead process left
    assert [own[i]["id"] for i in range(COUNT)] == list(range(COUNT))
    assert check_data(tmp_path) == []


def test_the_threads_end_soon_after_a_loader_is_closed(many_shards: tuple[Path, str], tmp_path: Path) -> None:
    """They end while all shards of an epoch are planned, too: then the plan looks for the next one for many steps."""
    before = set(threading.enumerate())
    config = DataConfig(path=tmp_path, remote=str(many_shards[0]), order="window", shuffle_block=64, lanes=8)
    loader = LatentLoader(config, seed=5, split=BatchSplit(16, 1, 1), rank=0)
    next(loader.batches(0))
    started = set(threading.enumerate()) - before
    assert any(thread.name == "shard-plan" for thread in started)
    loader.close()
    for thread in started:
        thread.join(10)
    assert not any(thread.is_alive() for thread in started)
