"""Shards → batches. The global order of samples is a pure function of (seed, epoch), so it is the same at every world
size, accumulation and restart; MosaicML streaming stores and downloads.

G global batch · M micro-batch · N samples of the data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sfd_scale import seeding
from sfd_scale.data.schema import FLIPPED, STATS, Manifest, index_sha256, read_index, restored
from sfd_scale.data.shards import Rows, open_shards
from sfd_scale.latents import ImageBatch, LatentBatch, LatentStats

Key = tuple[int, int]  # (epoch, sample id)
Ranges = tuple[tuple[int, int], ...]  # of steps: disjoint, rising, [start, stop) each
B = TypeVar("B", LatentBatch, ImageBatch)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A folder of shards from `sfd encode`, or the cache of `remote`.

    flip: train on the mirrored image as often as on the image itself. shuffle_block: samples that are mixed with each
    other, taken from whole shards in random order; larger mixes better, smaller reads more sequentially.
    num_workers: processes that read ahead; a remote wants several, as each waits for its own download.
    """

    path: Path
    remote: str | None = None
    cache_limit: str | None = None  # of a node, such as 100gb; no less than two shuffle blocks, else shards come twice
    flip: bool = True
    shuffle: bool = True
    shuffle_block: int = 262_144
    num_workers: int = 0
    stats: Path | None = None  # other statistics than those of the data, such as the authors', from `sfd convert`

    def __post_init__(self) -> None:
        for name, least in (("shuffle_block", 1), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)}; allowed: {least} and up")


def epoch_order(seed: int, epoch: int, shard_sizes: tuple[int, ...], block: int) -> Tensor:
    """The order of an epoch: shards shuffled, then samples shuffled inside blocks of that sequence. (N,) int64."""
    starts = torch.tensor([0, *shard_sizes]).cumsum(0)
    shards = seeding.permutation(seed, f"shards/{epoch}", len(shard_sizes)).tolist()
    sequence = torch.cat([torch.arange(int(starts[s]), int(starts[s + 1])) for s in shards])
    pieces = [
        piece[seeding.permutation(seed, f"samples/{epoch}/{number}", len(piece))]
        for number, piece in enumerate(sequence.split(block))
    ]
    return torch.cat(pieces)


def data_step(step: int, passed: Ranges) -> int:
    """Which step's data the training step `step` takes, when the data of the steps `passed` is left out."""
    for start, stop in passed:
        if step >= start:
            step += stop - start
    return step


class _Keys(Sampler[list[Key]]):
    """Endless keys of this rank's micro-batches, from a first global step on."""

    def __init__(self, reader: _Reader[Any], first_step: int, passed: Ranges) -> None:
        self.reader, self.first_step, self.passed = reader, first_step, passed

    def __iter__(self) -> Iterator[list[Key]]:
        step = self.first_step
        while True:
            yield from self.reader.keys(data_step(step, self.passed))
            step += 1


class _Rows(Dataset[tuple[Key, dict[str, Any]]]):
    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __getitem__(self, key: Key) -> tuple[Key, dict[str, Any]]:
        return key, self.rows[key[1]]


class _Reader(Generic[B]):
    """Reads the data for one rank.

    Raises:
        ValueError: if the data is incomplete or smaller than a global batch.
    """

    def __init__(
        self, config: DataConfig, *, seed: int, global_batch: int, micro_batch: int, rank: int, world_size: int
    ) -> None:
        assert global_batch % (micro_batch * world_size) == 0
        self.config, self.seed = config, seed
        self.global_batch, self.micro_batch, self.rank, self.world_size = global_batch, micro_batch, rank, world_size
        self.rows = open_shards(config.path, config.remote, config.cache_limit)
        self.manifest = Manifest.read(config.path)
        self.shard_sizes = tuple(shard["samples"] for shard in read_index(config.path)["shards"])
        self._orders: dict[int, Tensor] = {}  # of the epoch that is being read
        if self.manifest.num_samples < global_batch:
            raise ValueError(
                f"train.global_batch: {global_batch}, but {config.path} has {self.manifest.num_samples} samples"
            )

    @property
    def num_classes(self) -> int:
        return self.manifest.num_classes

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches of an epoch; the rest of its order is left out."""
        return self.manifest.num_samples // self.global_batch

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides the order of samples; a resumed run must find the same."""
        shuffled = self.config.shuffle_block if self.config.shuffle else 0
        return {"index_sha256": index_sha256(self.config.path), "flip": self.config.flip, "shuffle_block": shuffled}

    def keys(self, step: int) -> Iterator[list[Key]]:
        """The keys of this rank's micro-batches of a global step. All ranks' micro-batches together are
        order[b·G : (b + 1)·G] of the epoch, micro-batch by micro-batch, rank by rank."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        ids = self._order(epoch)[batch * self.global_batch : (batch + 1) * self.global_batch]
        for part in ids.split(self.micro_batch * self.world_size):
            own = part[self.rank * self.micro_batch : (self.rank + 1) * self.micro_batch]
            yield [(epoch, index) for index in own.tolist()]

    def batches(self, first_step: int, passed: Ranges = ()) -> Iterator[B]:
        """Endless micro-batches from a global step on; global_batch / (micro_batch · world_size) make one step. The
        data of the steps `passed` is left out, that after it moves up."""
        loader: DataLoader[Any] = DataLoader(
            _Rows(self.rows),
            batch_sampler=_Keys(self, first_step, passed),
            num_workers=self.config.num_workers,
            collate_fn=self.collate,
            persistent_workers=self.config.num_workers > 0,
            generator=torch.Generator(),  # else the loader draws a seed that nobody uses from the global generator
        )
        return iter(loader)

    def _order(self, epoch: int) -> Tensor:
        if not self.config.shuffle:
            return torch.arange(self.manifest.num_samples)
        if epoch not in self._orders:
            self._orders = {epoch: epoch_order(self.seed, epoch, self.shard_sizes, self.config.shuffle_block)}
        return self._orders[epoch]

    def collate(self, items: list[tuple[Key, dict[str, Any]]]) -> B:
        raise AssertionError("of the subclasses")

    def _need(self, column: str, why: str) -> None:
        if column not in self.manifest.columns:
            raise ValueError(f"{self.config.path}: no column {column!r} ({why}); it has {list(self.manifest.columns)}")


class ImageReader(_Reader[ImageBatch]):
    """Images and labels, for models that train on pixels."""

    def __init__(self, config: DataConfig, **portions: int) -> None:
        super().__init__(config, **portions)
        self._need("image", "encode it with store.image=true")

    def collate(self, items: list[tuple[Key, dict[str, Any]]]) -> ImageBatch:
        keys = [key for key, _ in items]
        images = torch.from_numpy(np.stack([row["image"] for _, row in items]))
        if self.config.flip:
            mirrored = torch.tensor([flipped(self.seed, key) for key in keys])
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        return ImageBatch(images, _labels(items), torch.tensor(keys))


class LatentReader(_Reader[LatentBatch]):
    """Normalised latents, labels and, where stored, alignment features, all from the same flip.

    Raises:
        ValueError: if the shards hold no latents, lack the mirrored ones that `flip` asks for, or their statistics are
            not those of the manifest.
    """

    def __init__(self, config: DataConfig, **portions: int) -> None:
        super().__init__(config, **portions)
        self._need("latents", "these shards hold images; encode them with a tokenizer")
        if config.flip:
            self._need(f"latents{FLIPPED}", "encode with store.flip=true, or set data.flip=false")
        self.stats = LatentStats.load(config.stats or config.path / STATS)
        if config.stats is None and self.stats.hash != self.manifest.stats_hash:
            raise ValueError(f"{config.path / STATS}: not the statistics of this data; encode it anew")

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of a stored latent."""
        return tuple(int(n) for n in self.manifest.columns["latents"].split(":")[2].split(","))

    def collate(self, items: list[tuple[Key, dict[str, Any]]]) -> LatentBatch:
        keys = [key for key, _ in items]
        suffixes = [FLIPPED if self.config.flip and flipped(self.seed, key) else "" for key in keys]
        latents = self._column("latents", items, suffixes)
        if "logvar" in self.manifest.columns:
            std = (0.5 * self._column("logvar", items, suffixes)).exp()
            latents = latents + std * seeding.normal(self.seed, "posterior", keys, latents.shape[1:])
        features = self._column("features", items, suffixes) if "features" in self.manifest.columns else None
        return LatentBatch(self.stats.normalize(latents), _labels(items), torch.tensor(keys), features)

    def _column(self, name: str, items: list[tuple[Key, dict[str, Any]]], suffixes: list[str]) -> Tensor:
        arrays = [row[name + end] for (_, row), end in zip(items, suffixes, strict=True)]
        return restored(arrays, self.manifest.dtype)


def flipped(seed: int, key: Key) -> bool:
    """Whether a sample is mirrored in an epoch."""
    return bool(seeding.uniform(seed, "flip", [key])[0] < 0.5)


def _labels(items: list[tuple[Key, dict[str, Any]]]) -> Tensor:
    return torch.tensor([int(row["label"]) for _, row in items])
