"""Dataloaders: MDS shards → micro-batches of one rank.

The order of samples (order.py) does not depend on the world size, on gradient accumulation or on restarts.

G global batch · N samples of the dataset.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from sfd_scale.data.batches import FeatureBatch, ImageBatch, LatentBatch
from sfd_scale.data.manifest import FLIPPED, STATS, Manifest, as_stored, index_sha256, read_index, restored
from sfd_scale.data.mds_reader import Array
from sfd_scale.data.order import SampleOrder, block_order, num_lanes, window_order
from sfd_scale.data.prefetch import ShardPrefetcher, ShardSchedule, ranks_part
from sfd_scale.data.shards import RemoteMDSReader, open_shards
from sfd_scale.data.workers import worker_batches
from sfd_scale.diffusion.latents import LatentStats
from sfd_scale.runtime import distributed, seeding
from sfd_scale.runtime.batch_split import BatchSplit
from sfd_scale.runtime.settings import NoEffectOnResults, at_least

Key = tuple[int, int]  # (epoch, sample id)
Ranges = tuple[tuple[int, int], ...]  # of steps: [start, stop) each, disjoint, ascending
B = TypeVar("B", LatentBatch, ImageBatch, FeatureBatch)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training data.

    path: a folder that `sfd encode` wrote, or the local cache of `remote`.
    remote: where the shards are downloaded from: s3://, gs://, azure://, oci://, hf:// or a folder.
    cache_limit: the largest size of the cache on one node, such as 100gb. It needs room for the shards that are in use
        at the same time and for those that are downloaded ahead; the error message for a smaller one names the size.
    flip: random horizontal flip, with probability 1/2.
    order: how samples are shuffled. `blocks`: shards are shuffled, then the samples inside each block. `window`: each
        of `lanes` sets of shards is shuffled with a sliding window, which grows at the start of an epoch; so an epoch
        begins after few downloads, and each node reads its own part of the data. null: the order of the run's
        checkpoints; `window` for a new run.
    shuffle_block: samples per shuffle block, or of the sliding window. A larger one mixes better, a smaller one reads
        more sequentially.
    lanes: sets of shards of the order `window`; at most the global batch. Sample j of a batch comes from lane
        j · lanes // global batch. A multiple of the number of nodes makes each node read only its part.
    num_workers: worker processes of the dataloader. Shards are downloaded ahead, and batches are read ahead, without
        workers too.
    stats: latent statistics that replace those of the data: a stats.safetensors, or a folder with the official
        latents_stats.pt and latents_sv_stats.pt.
    features: where the alignment features come from. `shards`: stored. `online`: the recipe's vision encoder on stored
        images. `decoded`: the recipe's semantic codec on the semantic latents.
    allow_stats_mismatch: continue if the statistics differ between data and checkpoint, or data and manifest.
    """

    path: Path
    remote: str | None = None
    cache_limit: NoEffectOnResults[str | None] = None
    flip: bool = True
    shuffle: bool = True
    order: Literal["window", "blocks"] | None = None
    shuffle_block: int = 262_144
    lanes: int = 32
    num_workers: NoEffectOnResults[int] = 0
    stats: Path | None = None
    features: Literal["none", "shards", "online", "decoded"] = "shards"
    allow_stats_mismatch: bool = False

    def __post_init__(self) -> None:
        at_least(self, shuffle_block=1, lanes=1, num_workers=0)


def epoch_order(config: DataConfig, seed: int, shard_sizes: tuple[int, ...], global_batch: int, epoch: int) -> Tensor:
    """The order of the samples in an epoch: (N,) int64, or (N // G · G,) for the order `window`."""
    if not config.shuffle:
        return torch.arange(sum(shard_sizes))
    if config.order == "blocks":
        return block_order(seed, epoch, shard_sizes, config.shuffle_block)
    lanes = num_lanes(global_batch, config.lanes)
    return window_order(seed, epoch, shard_sizes, global_batch, lanes, config.shuffle_block)


def data_step(step: int, skipped: Ranges) -> int:
    """The data step that a training step uses, when the data steps of `skipped` are left out."""
    for start, stop in skipped:
        if step >= start:
            step += stop - start
    return step


class BatchLoader(Generic[B]):
    """The micro-batches of one rank.

    Args:
        seed: of the order, the flips and the posterior samples.
        split: how the global batch is divided over ranks and micro-batches.
        rank: 0 to split.world_size - 1.

    Raises:
        ValueError: if the dataset is incomplete or smaller than a global batch.
    """

    def __init__(self, config: DataConfig, *, seed: int, split: BatchSplit, rank: int) -> None:
        self.config, self.seed, self.split, self.rank = config, seed, split, rank
        self.samples = open_shards(config.path, config.remote, config.cache_limit)
        self.manifest = Manifest.read(config.path)
        self.shard_sizes = tuple(shard["samples"] for shard in read_index(config.path)["shards"])
        if self.manifest.num_samples < split.global_batch:
            raise ValueError(
                f"train.global_batch: {split.global_batch}, but {config.path} has {self.manifest.num_samples} samples"
            )
        self.order = SampleOrder(
            functools.partial(epoch_order, config, seed, self.shard_sizes, split.global_batch),
            split.global_batch, self.shard_sizes,
        )  # fmt: skip
        self.schedule: ShardSchedule | None = None
        self._prefetcher: ShardPrefetcher | None = None
        if isinstance(self.samples, RemoteMDSReader):
            shards = [(shard.path.name, shard.bytes) for shard in self.samples.shards]
            node_ranks = min(distributed.local_world_size(), split.world_size)
            self.schedule = ShardSchedule(self.order, shards, split, rank, node_ranks)
            self.samples.cache.keep_by(self.schedule)

    @property
    def num_classes(self) -> int:
        return self.manifest.num_classes

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches per epoch. The last, incomplete one is dropped."""
        return self.manifest.num_samples // self.split.global_batch

    @property
    def feature_dim(self) -> int | None:
        """Channels of the stored features; None if the shards have no features."""
        return self._column_shape("features")[0] if "features" in self.manifest.columns else None

    @property
    def stats_hash(self) -> str | None:
        """Hash of the statistics that normalise the latents; None for data without latents."""
        return None

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The settings that decide the order and content of the batches. A resumed run must have the same."""
        config = self.config
        shuffled: dict[str, Any] = {"shuffle_block": config.shuffle_block if config.shuffle else 0}
        if config.shuffle and config.order != "blocks":
            shuffled = {"order": "window", "shuffle_window": config.shuffle_block, "lanes": config.lanes}
        return {
            "index_sha256": index_sha256(config.path), "flip": config.flip, "features": config.features, **shuffled
        }  # fmt: skip

    def keys(self, step: int) -> Iterator[list[Key]]:
        """The keys of this rank's micro-batches in a global step.

        Global batch b is order[b·G : (b + 1)·G] of the epoch. It is cut into micro-batches in the order of
        (accumulation step, rank).
        """
        epoch, ids = self.order.batch(step)
        for part in ranks_part(ids, self.split, self.rank).split(self.split.micro_batch):
            yield [(epoch, index) for index in part.tolist()]

    def batches(self, first_step: int, skipped: Ranges = ()) -> Iterator[B]:
        """Micro-batches without end, from a global step on; split.grad_accum_steps of them make one step.

        Args:
            skipped: data steps to leave out; later data moves forward.
        """
        columns = self._batch_columns()
        sample_bytes = sum(size * math.prod(self._column_shape(name)) for name, size in columns.items())
        self.close()
        batches = worker_batches(
            self.batch, self._micro_batches(first_step, skipped), num_workers=self.config.num_workers,
            setting="data.num_workers", batch_bytes=self.split.micro_batch * sample_bytes,
            batch_tensors=len(columns) + 2, survive_stop=True,
        )  # fmt: skip
        # Threads start after the workers: a fork must not copy locks that a thread holds.
        self._prefetch(first_step, skipped)
        return batches

    def _micro_batches(self, step: int, skipped: Ranges) -> Iterator[list[Key]]:
        """The keys of this rank's micro-batches, without end, from a global step on."""
        while True:
            self._reads(step, data_step(step, skipped))
            yield from self.keys(data_step(step, skipped))
            step += 1

    def _reads(self, step: int, data_step: int) -> None:
        """The samples of a training step are read now, from a data step."""
        if self.schedule is not None:
            self.schedule.step = data_step
        if self._prefetcher is not None:
            self._prefetcher.advance(step)

    def _prefetch(self, first_step: int, skipped: Ranges) -> None:
        """Download the shards of the next steps ahead."""
        if self.schedule is None:
            return
        assert isinstance(self.samples, RemoteMDSReader)
        plan = self.schedule.plan(first_step, lambda step: data_step(step, skipped))
        self._prefetcher = ShardPrefetcher(self.samples.cache, plan, first_step, self.schedule.node_ranks)

    def close(self) -> None:
        """End the threads that download ahead."""
        if self._prefetcher is not None:
            self._prefetcher.close()

    def __del__(self) -> None:
        if hasattr(self, "_prefetcher"):  # not after an error in __init__
            self.close()

    def batch(self, keys: list[Key]) -> B:
        """The batch of the given samples."""
        raise AssertionError("subclasses implement this")

    def _batch_columns(self) -> dict[str, int]:
        """The columns in a batch, and the bytes of one element there."""
        raise AssertionError("subclasses implement this")

    def _column_shape(self, column: str) -> tuple[int, ...]:
        """The stored shape of one sample of a column."""
        return tuple(int(n) for n in self.manifest.columns[column].split(":")[2].split(","))

    def _gather(self, keys: list[Key], *columns: Sequence[str]) -> tuple[Tensor, list[Array]]:
        """Read labels (N,) and columns. Each entry of `columns` names one column for each sample."""
        labels, *values = self.samples.gather([index for _, index in keys], [["label"] * len(keys), *columns])
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise ValueError(
                f"{self.config.path}: labels from {labels.min()} to {labels.max()}, but {self.num_classes} classes; a "
                "shard is damaged: run `sfd check-data` to find it"
            )
        return torch.from_numpy(labels), values

    def _flips(self, keys: list[Key]) -> list[bool]:
        return flips(self.seed, keys) if self.config.flip else [False] * len(keys)

    def _require_column(self, column: str, advice: str) -> None:
        if column not in self.manifest.columns:
            raise ValueError(
                f"{self.config.path}: no column {column!r} ({advice}); it has {list(self.manifest.columns)}"
            )


class ImageLoader(BatchLoader[ImageBatch]):
    """Images and labels, for models that train on pixels.

    Raises:
        ValueError: if the shards have no images.
    """

    def __init__(self, config: DataConfig, *, seed: int, split: BatchSplit, rank: int) -> None:
        super().__init__(config, seed=seed, split=split, rank=rank)
        self._require_column("image", "encode it with store.image=true")

    def _batch_columns(self) -> dict[str, int]:
        return {"image": 1}

    def batch(self, keys: list[Key]) -> ImageBatch:
        labels, (pixels,) = self._gather(keys, ["image"] * len(keys))
        images = mirrored(torch.from_numpy(pixels), self._flips(keys))
        return ImageBatch(images, labels, torch.tensor(keys))


def mirrored(images: Tensor, which: Sequence[bool]) -> Tensor:
    """Images (N, C, H, W); those with `which` true are flipped left to right."""
    if not any(which):
        return images
    return torch.where(torch.tensor(which)[:, None, None, None], images.flip(3), images)


class LatentLoader(BatchLoader[LatentBatch]):
    """Normalised latents and labels, and alignment features if stored. All come from the same flip.

    Raises:
        ValueError: if the shards have no latents, or no mirrored latents although `flip` is true, or if the latent
            statistics do not match the manifest or the number of channels.
    """

    def __init__(self, config: DataConfig, *, seed: int, split: BatchSplit, rank: int) -> None:
        super().__init__(config, seed=seed, split=split, rank=rank)
        self._require_column("latents", "these shards hold images; encode them with a tokenizer")
        if config.flip:
            self._require_column(f"latents{FLIPPED}", "encode with store.flip=true, or set data.flip=false")
        if config.features == "online":
            self._require_column("image", "data.features: online; encode with store.image=true")
        self.stats = read_stats(config.path / STATS if config.stats is None else config.stats)
        if config.stats is None and self.stats.hash != self.manifest.stats_hash and not config.allow_stats_mismatch:
            raise ValueError(
                f"{config.path / STATS}: not the statistics of this data; encode it again, or set "
                "data.allow_stats_mismatch=true"
            )
        if len(self.stats.mean) != self.shape[0]:
            raise ValueError(
                f"data.stats: {config.stats or config.path / STATS} has {len(self.stats.mean)} channels, the latents "
                f"have {self.shape[0]}; give the statistics of this data"
            )

    @property
    def stats_hash(self) -> str:
        return self.stats.hash

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of a stored latent."""
        return self._column_shape("latents")

    def _batch_columns(self) -> dict[str, int]:
        stored = {"features": 2} if self.config.features == "shards" and "features" in self.manifest.columns else {}
        return {"latents": 4, **stored, **({"image": 1} if self.config.features == "online" else {})}

    def batch(self, keys: list[Key]) -> LatentBatch:
        suffixes = [FLIPPED if flip else "" for flip in self._flips(keys)]
        wanted = ["latents", "logvar", *(["features"] if self.config.features == "shards" else [])]
        names = [name for name in wanted if name in self.manifest.columns]
        columns = [[name + suffix for suffix in suffixes] for name in names]
        if self.config.features == "online":
            names, columns = [*names, "image"], [*columns, ["image"] * len(keys)]
        labels, arrays = self._gather(keys, *columns)
        values = dict(zip(names, arrays, strict=True))
        latents = restored(values["latents"], self.manifest.dtype)
        if "logvar" in values:
            std = (0.5 * restored(values["logvar"], self.manifest.dtype)).exp()
            latents = latents + std * seeding.normal(self.seed, "posterior", keys, latents.shape[1:])
        # Features stay in 16 bits: half the bytes to copy, and the loss converts them.
        features = as_stored(values["features"], self.manifest.dtype) if "features" in values else None
        images = None
        if "image" in values:
            images = mirrored(torch.from_numpy(values["image"]), [suffix != "" for suffix in suffixes])
        return LatentBatch(self.stats.normalize(latents), labels, torch.tensor(keys), features, images)


class FeatureLoader(BatchLoader[FeatureBatch]):
    """Stored features and labels, for semantic VAEs.

    Raises:
        ValueError: if the shards have no features, or no mirrored features although `flip` is true.
    """

    def __init__(self, config: DataConfig, *, seed: int, split: BatchSplit, rank: int) -> None:
        super().__init__(config, seed=seed, split=split, rank=rank)
        self._require_column("features", "encode with store.features=shards, or set data.features=online")
        if config.flip:
            self._require_column(f"features{FLIPPED}", "encode with store.flip=true, or set data.flip=false")

    def _batch_columns(self) -> dict[str, int]:
        return {"features": 2}

    def batch(self, keys: list[Key]) -> FeatureBatch:
        labels, (values,) = self._gather(keys, [f"features{FLIPPED if flip else ''}" for flip in self._flips(keys)])
        return FeatureBatch(as_stored(values, self.manifest.dtype), labels, torch.tensor(keys))


def read_stats(path: Path) -> LatentStats:
    """Read latent statistics from a stats.safetensors, or from a folder with the two files of the official code.

    Raises:
        ValueError: if `path` is neither.
    """
    official = path / "latents_stats.pt", path / "latents_sv_stats.pt"
    if all(file.is_file() for file in official):
        return LatentStats.from_official(*official)
    if not path.is_file():
        raise ValueError(
            f"data.stats: {path}; allowed: a stats.safetensors, or a folder with latents_stats.pt and "
            "latents_sv_stats.pt"
        )
    return LatentStats.load(path)


def flips(seed: int, keys: list[Key]) -> list[bool]:
    """Whether each sample is mirrored; drawn from (seed, epoch, sample id)."""
    return (seeding.uniform(seed, "flip", keys) < 0.5).tolist()
