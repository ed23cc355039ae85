"""The order of samples: the same at every world size, accumulation and restart; each sample once an epoch; and what
the batches hold."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sfd_scale.data.dataloader import DataConfig, ImageLoader, LatentLoader, block_order
from sfd_scale.data.download import FetchError
from sfd_scale.data.manifest import restored
from sfd_scale.data.shards import check_data, open_shards
from sfd_scale.diffusion.latents import LatentStats
from sfd_scale.runtime import distributed, seeding
from sfd_scale.runtime.batch_split import BatchSplit, split_batch
from tests.helpers.encoded import digits, encode_digits, tokenizer
from tests.helpers.ranks import run_ranks

COUNT, GLOBAL = 44, 8  # five global batches an epoch; four samples are left out of each


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data")
    encode_digits(out, COUNT, image=True, features="shards")
    return out


def reader(path: Path, rank: int = 0, world_size: int = 1, micro: int = GLOBAL, **config: Any) -> LatentLoader:
    return LatentLoader(
        DataConfig(path=path, **{"order": "blocks", "shuffle_block": 20, **config}),
        seed=5, split=split_batch(GLOBAL, micro, world_size), rank=rank,
    )  # fmt: skip


def steps(path: Path, world_size: int, grad_accum_steps: int, first: int, count: int, **config: Any) -> list[list[Any]]:
    """The keys and latents of each global step, put together from all ranks and micro-batches in their order."""
    micro = GLOBAL // (world_size * grad_accum_steps)
    streams = [reader(path, rank, world_size, micro, **config).batches(first) for rank in range(world_size)]
    out = []
    for _ in range(count):
        parts = [next(streams[rank]) for _ in range(grad_accum_steps) for rank in range(world_size)]
        assert all(len(part) == micro for part in parts)
        out.append([torch.cat([getattr(part, name) for part in parts]) for name in ("keys", "latents", "features")])
    return out


def same(a: list[list[Tensor]], b: list[list[Tensor]]) -> bool:
    return all(torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


def test_world_size_and_accumulation_do_not_change_a_step(data: Path) -> None:
    alone = steps(data, 1, 1, 0, 12)
    assert alone[0][0].tolist() != sorted(alone[0][0].tolist())
    for world_size, grad_accum_steps in ((1, 4), (2, 1), (2, 2), (4, 1), (4, 2), (8, 1)):
        assert same(steps(data, world_size, grad_accum_steps, 0, 12), alone), (world_size, grad_accum_steps)


def test_a_run_that_starts_at_a_step_is_the_rest_of_the_whole(data: Path) -> None:
    alone = steps(data, 1, 1, 0, 12)
    for first in (1, 4, 5, 7, 10):  # inside the first epoch, at its end, and in later ones
        assert same(steps(data, 2, 2, first, 12 - first), alone[first:]), first


def test_each_sample_comes_once_an_epoch_and_epochs_differ(data: Path) -> None:
    assert reader(data).steps_per_epoch == 5
    epochs = [torch.cat([keys for keys, *_ in steps(data, 2, 1, 5 * epoch, 5)]) for epoch in range(3)]
    for number, keys in enumerate(epochs):
        assert keys[:, 0].unique().tolist() == [number]
        assert len(keys[:, 1].unique()) == len(keys) == 40
    assert not torch.equal(epochs[0][:, 1], epochs[1][:, 1])
    left_out = [set(range(COUNT)) - set(keys[:, 1].tolist()) for keys in epochs]
    assert left_out[0] != left_out[1]


def test_another_seed_is_another_order_and_no_shuffle_is_none(data: Path) -> None:
    config = DataConfig(path=data)
    orders = []
    for seed in (5, 6):
        other = LatentLoader(config, seed=seed, split=BatchSplit(GLOBAL, 1, 1), rank=0)
        orders.append([index for _, index in next(other.keys(0))])
    assert orders[0] != orders[1]
    plain = reader(data, shuffle=False)
    assert [key for step in range(6) for key in next(plain.keys(step))][38:43] == [
        (0, 38), (0, 39), (1, 0), (1, 1), (1, 2)
    ]  # fmt: skip


def test_the_order_mixes_inside_blocks_of_shuffled_shards() -> None:
    sizes = (10,) * 30
    order = block_order(0, 0, sizes, block=60)
    assert sorted(order.tolist()) == list(range(300))
    shards = [set((piece // 10).tolist()) for piece in order.split(60)]
    assert [len(block) for block in shards] == [6] * 5  # a block reads six shards to the end, and no other does
    assert set.union(*shards) == set(range(30)) and sorted(shards[0]) != list(range(6))
    inside = order[:60]
    assert (inside[1:] // 10 == inside[:-1] // 10).float().mean() < 0.4  # neighbours are seldom of one shard
    assert torch.equal(order, block_order(0, 0, sizes, block=60))
    assert not torch.equal(order, block_order(0, 1, sizes, block=60))
    # Blocks need not follow the bounds of shards, and one may hold everything.
    for block in (7, 1000):
        assert sorted(block_order(3, 2, (5, 1, 9), block).tolist()) == list(range(15))


def test_a_batch_is_the_stored_sample_normalised_and_flipped_as_a_whole(data: Path) -> None:
    stats = LatentStats.load(data / "stats.safetensors")
    rows = open_shards(data)
    flips = 0
    for batch in itertools.islice(reader(data, micro=4).batches(0), 20):
        assert batch.features is not None
        for i, key in enumerate(batch.keys.tolist()):
            mirrored = bool(seeding.uniform(5, "flip", [tuple(key)])[0] < 0.5)
            flips += mirrored
            image, label = digits(COUNT)[key[1]]
            encoded = tokenizer().encode((image.flip(2) if mirrored else image)[None])
            assert encoded.features is not None
            assert batch.labels[i] == label == rows[key[1]]["label"]
            raw = stats.denormalize(batch.latents[i : i + 1])
            assert (raw - encoded.latents).abs().max() <= 2**-10 * encoded.latents.abs().max()
            assert (batch.features[i] - encoded.features[0]).abs().max() <= 2**-11
    assert 25 <= flips <= 55  # of 80
    pooled = torch.cat([batch.latents for batch in itertools.islice(reader(data).batches(0), 10)])
    assert pooled.transpose(0, 1).flatten(1).mean(1).abs().max() < 0.15
    assert (pooled.transpose(0, 1).flatten(1).std(1) - 1).abs().max() < 0.15


def test_without_flip_the_mirrored_columns_are_not_read(tmp_path: Path) -> None:
    encode_digits(tmp_path, 16, flip=False)
    with pytest.raises(ValueError, match=r"no column 'latents_flip' \(encode with store\.flip=true, or set data\.flip"):
        reader(tmp_path)
    latents = next(reader(tmp_path, flip=False, shuffle=False).batches(0)).latents
    stats = LatentStats.load(tmp_path / "stats.safetensors")
    stored = restored([open_shards(tmp_path)[i]["latents"] for i in range(8)], "float16")
    assert torch.equal(latents, stats.normalize(stored))


def test_a_posterior_is_drawn_anew_each_epoch(tmp_path: Path) -> None:
    encode_digits(tmp_path, 8, latents="moments", dtype="bfloat16", flip=False)
    own = reader(tmp_path, flip=False, shuffle=False)
    first, second = itertools.islice(own.batches(0), 2)
    rows = open_shards(tmp_path)
    mean = restored([rows[i]["latents"] for i in range(8)], "bfloat16")
    noise = []
    for epoch, batch in enumerate((first, second)):
        drawn = own.stats.denormalize(batch.latents) - mean
        keys = [(epoch, i) for i in range(8)]
        std = torch.arange(6.0).sub(8).div(2).exp().view(6, 1, 1)
        wanted = std * seeding.normal(5, "posterior", keys, (9, 8, 8))[:, :6]
        assert (drawn[:, :6] - wanted).abs().max() < 1e-5
        assert drawn[:, 6:].abs().max() < 1e-5  # a deterministic part stays as it is
        noise.append(drawn[:, :6])
    assert not torch.equal(noise[0], noise[1])


def test_images_flip_in_the_reader(data: Path) -> None:
    own = ImageLoader(DataConfig(path=data), seed=5, split=BatchSplit(8, 1, 1), rank=0)
    batch = next(own.batches(0))
    assert batch.images.shape == (8, 3, 32, 32) and batch.images.dtype == torch.uint8
    mirrored = 0
    for image, label, key in zip(batch.images, batch.labels, batch.keys.tolist(), strict=True):
        source, wanted = digits(COUNT)[key[1]]
        turned = bool(seeding.uniform(5, "flip", [tuple(key)])[0] < 0.5)
        mirrored += turned
        assert torch.equal(image, source.flip(2) if turned else source) and label == wanted
    assert 0 < mirrored < 8
    latents_too = next(reader(data, order=None, shuffle_block=262_144).batches(0))
    assert torch.equal(latents_too.keys, batch.keys)


def test_worker_processes_give_the_same_batches(data: Path) -> None:
    state = torch.random.get_rng_state()
    assert same(steps(data, 1, 2, 3, 6, num_workers=2), steps(data, 1, 1, 3, 6))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_several_readers_at_once_leave_nothing_in_shared_memory(data: Path) -> None:
    before = set(Path("/dev/shm").iterdir())
    streams = [reader(data).batches(0) for _ in range(3)]
    batches = [next(stream) for stream in streams]
    assert torch.equal(batches[0].latents, batches[2].latents)
    assert set(Path("/dev/shm").iterdir()) - before == set()


def test_the_fingerprint_changes_with_what_decides_the_order(data: Path, tmp_path: Path) -> None:
    own = reader(data).fingerprint
    assert reader(data, rank=1, world_size=2, micro=2, num_workers=1).fingerprint == own
    assert reader(data, shuffle_block=21).fingerprint != own
    assert reader(data, flip=False).fingerprint != own
    encode_digits(tmp_path, COUNT, image=True, features="shards", chunk=9)
    assert reader(tmp_path).fingerprint["index_sha256"] != own["index_sha256"]


def test_data_that_is_not_whole_is_refused(data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(data, broken)
    shard = broken / "shard.000002.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(ValueError, match=rf"{shard.name}: \d+ bytes, expected \d+; encode into this folder again"):
        reader(broken)
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name}: missing"):
        reader(broken)
    shutil.copy(data / shard.name, shard)
    reader(broken)
    LatentStats(torch.zeros(9, dtype=torch.float64), torch.ones(9, dtype=torch.float64)).save(
        broken / "stats.safetensors"
    )
    with pytest.raises(ValueError, match=r"stats\.safetensors: not the statistics of this data"):
        reader(broken)
    # Named in the recipe, other statistics are taken.
    assert torch.equal(reader(broken, stats=broken / "stats.safetensors").stats.std, torch.ones(9, dtype=torch.float64))
    # Those of one channel would be spread over all.
    one = torch.ones(1, dtype=torch.float64)
    LatentStats(one, one.clone()).save(broken / "one.safetensors")
    with pytest.raises(ValueError, match=r"data\.stats: .*one\.safetensors has 1 channels, the latents have 9"):
        reader(broken, stats=broken / "one.safetensors")


def test_too_small_and_wrong_data(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.global_batch: 64, but .* has 44 samples"):
        LatentLoader(DataConfig(path=data), seed=0, split=BatchSplit(64, 1, 1), rank=0)
    encode_digits(tmp_path, 8, image=True, latents="none")
    with pytest.raises(ValueError, match="these shards hold images; encode them with a tokenizer"):
        reader(tmp_path)
    for name, value in (("shuffle_block", 0), ("num_workers", -1)):
        with pytest.raises(ValueError, match=f"{name}: {value}; allowed"):
            replace(DataConfig(path=data), **{name: value})


def remote_rank(cache: Path, remote: Path) -> list[Any]:
    """Steps of a rank that reads through a cache, with a second reader open, and what was cached before."""
    rank, ranks = distributed.rank(), distributed.world_size()
    own, other = (reader(cache, rank, ranks, GLOBAL // ranks, remote=str(remote)) for _ in range(2))
    early = len(list(cache.glob("*.mds")))
    distributed.barrier()
    next(other.batches(3))
    return [early, [(b.keys, b.latents) for b in itertools.islice(own.batches(0), 6)]]


def test_a_remote_is_cached_shard_by_shard_and_read_in_the_same_order(data: Path, tmp_path: Path) -> None:
    cache, before = tmp_path / "cache", set(Path("/dev/shm").iterdir())
    ranks = run_ranks(remote_rank, 2, cache, data, timeout=240)
    assert ranks[0][0] == ranks[1][0] == 0  # no shard before the first sample
    for step, (keys, latents, _) in enumerate(steps(data, 1, 1, 0, 6)):
        for place, whole in ((0, keys), (1, latents)):
            assert torch.equal(torch.cat([ranks[rank][1][step][place] for rank in range(2)]), whole)
    assert {path.name for path in cache.glob("*.mds")} == {path.name for path in data.glob("*.mds")}
    assert check_data(cache) == [] and not list((cache / ".incoming").iterdir())
    assert not [path for path in set(Path("/dev/shm").iterdir()) - before if path.name.startswith("0")]


def test_a_cache_belongs_to_its_remote(data: Path, tmp_path: Path) -> None:
    reader(tmp_path / "cache", remote=str(data))
    encode_digits(tmp_path / "other", 16)
    (tmp_path / "cache" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="the cache holds other data; empty it"):
        reader(tmp_path / "cache", remote=str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"data\.remote: .* has no manifest\.json; upload a complete encoded folder"):
        reader(tmp_path / "new", remote=str(tmp_path / "absent"))


def test_a_remote_shard_that_is_damaged_or_missing_is_an_error_each_time(data: Path, tmp_path: Path) -> None:
    remote, cache = tmp_path / "remote", tmp_path / "cache"
    shutil.copytree(data, remote)
    shard = remote / "shard.000001.00000.mds"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    own = open_shards(cache, remote=str(remote))
    assert own[0]["id"] == 0
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"the SHA-256 of .*remote/shard\.000001\.00000\.mds does not match index\.json"
        ):
            own[8]
    (remote / "shard.000002.00000.mds").unlink()
    with pytest.raises(FetchError, match=r"shard\.000002.* does not exist; upload"):
        own[16]
    # Mended, they are read; a download that was cut off is not taken for the shard.
    for name in ("shard.000001.00000.mds", "shard.000002.00000.mds"):
        shutil.copy(data / name, remote / name)
        (cache / ".incoming" / name).write_bytes(b"cut off")
    assert [own[i]["id"] for i in (8, 16)] == [8, 16] and check_data(remote) == []
    assert (cache / "shard.000001.00000.mds").read_bytes() == (data / "shard.000001.00000.mds").read_bytes()


def test_a_cache_stays_below_its_limit(data: Path, tmp_path: Path) -> None:
    size = (data / "shard.000000.00000.mds").stat().st_size
    own = open_shards(tmp_path, remote=str(data), cache_limit=str(int(4.5 * size)))
    for index in range(COUNT):
        assert own[index]["id"] == index
    assert sorted(path.name[9:12] for path in tmp_path.glob("*.mds")) == ["002", "003", "004", "005"]
    assert own[0]["id"] == 0  # fetched again
    with pytest.raises(
        ValueError, match=rf"data\.cache_limit: {size}; allowed: \d+ bytes and up \(four of the largest shards\)"
    ):
        open_shards(tmp_path, remote=str(data), cache_limit=str(size))


def test_stats_are_a_plain_file(data: Path) -> None:
    assert {name: tuple(t.shape) for name, t in load_file(data / "stats.safetensors").items()} == {
        "mean": (9,), "std": (9,)
    }  # fmt: skip


def test_a_worker_outlives_a_stop_that_is_sent_to_all(data: Path) -> None:
    """Slurm's scancel signals every process; what the rank tells its workers still ends them."""
    others = set(psutil.Process().children())
    batches = reader(data, num_workers=1).batches(0)
    next(batches)
    (worker,) = set(psutil.Process().children()) - others
    subprocess.run([sys.executable, "-c", f"import os; os.kill({worker.pid}, 15)"], check=True)
    for _ in range(6):  # more than it has read ahead
        next(batches)
    assert worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE
    worker.terminate()  # by this process, its parent
    assert worker.wait(timeout=60) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_in_memory_that_a_gpu_reads_by_itself(data: Path, num_workers: int) -> None:
    batch = next(reader(data, num_workers=num_workers).batches(0))
    assert batch.features is not None and not batch.keys.is_pinned()
    assert all(part.is_pinned() for part in (batch.latents, batch.labels, batch.features))
    expected = next(iter(steps(data, 1, 1, 0, 1)))[1]
    assert torch.equal(batch.to(distributed.device()).latents.cpu(), expected)
