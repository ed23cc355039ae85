"""Shards → batches. The global order of samples is a pure function of (seed, epoch), so it is the same at every world
size, accumulation and restart; MosaicML streaming stores and downloads.

G global batch · M micro-batch · N samples of the data.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sfd_scale.config.bounds import at_least
from sfd_scale.config.loader import Incidental
from sfd_scale.data.batches import FeatureBatch, ImageBatch, LatentBatch
from sfd_scale.data.manifest import FLIPPED, STATS, Manifest, as_stored, index_sha256, read_index, restored
from sfd_scale.data.mds_reader import Array
from sfd_scale.data.shards import open_shards
from sfd_scale.diffusion.latents import LatentStats
from sfd_scale.runtime import seeding

Key = tuple[int, int]  # (epoch, sample id)
Ranges = tuple[tuple[int, int], ...]  # of steps: disjoint, rising, [start, stop) each
B = TypeVar("B", LatentBatch, ImageBatch, FeatureBatch)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A folder of shards from `sfd encode`, or the cache of `remote`.

    flip: train on the mirrored image as often as on the image itself. shuffle_block: samples that are mixed with each
    other, taken from whole shards in random order; larger mixes better, smaller reads more sequentially.
    cache_limit: of a node, such as 100gb; no less than two shuffle blocks, else shards come twice.
    num_workers: processes that read ahead; a remote wants several, as each waits for its own download.
    stats: other statistics than those of the data: a file of ours, or a folder with the authors' latents_stats.pt and
    latents_sv_stats.pt.
    features: where vision features come from, if the objective needs them: `shards`, stored; `online`, the vision
    encoder of the recipe on stored images; `decoded`, its semantic codec on the semantic latents.
    allow_stats_mismatch: go on where the statistics of data and checkpoint, or data and manifest, differ.
    """

    path: Path
    remote: str | None = None
    cache_limit: Incidental[str | None] = None
    flip: bool = True
    shuffle: bool = True
    shuffle_block: int = 262_144
    num_workers: Incidental[int] = 0
    stats: Path | None = None
    features: Literal["none", "shards", "online", "decoded"] = "shards"
    allow_stats_mismatch: bool = False

    def __post_init__(self) -> None:
        at_least(self, shuffle_block=1, num_workers=0)


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


class _Batches(Dataset[Any]):
    """What the loader and its workers ask for: a whole micro-batch at once."""

    def __init__(self, reader: _Reader[Any]) -> None:
        self.reader = reader

    def __getitem__(self, key: Key) -> Any:
        return self.reader.batch([key])

    def __getitems__(self, keys: list[Key]) -> Any:
        return self.reader.batch(keys)


def _outlive_a_stop(worker: int) -> None:
    """A worker ends when its rank tells it to, and not by the signals that a scheduler sends to every process: the rank
    has a step to finish before it saves."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS, which has no such schedulers either
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _as_it_is(batch: Any) -> Any:
    return batch


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
    def feature_dim(self) -> int | None:
        """Channels of the stored features, if there are any."""
        form = self.manifest.columns.get("features")
        return None if form is None else int(form.split(":")[2].split(",")[0])

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides the order of samples; a resumed run must find the same."""
        shuffled = self.config.shuffle_block if self.config.shuffle else 0
        return {
            "index_sha256": index_sha256(self.config.path), "flip": self.config.flip, "shuffle_block": shuffled,
            "features": self.config.features,
        }  # fmt: skip

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
            _Batches(self),
            batch_sampler=_Keys(self, first_step, passed),
            num_workers=self.config.num_workers,
            collate_fn=_as_it_is,
            worker_init_fn=_outlive_a_stop,
            persistent_workers=self.config.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else the loader draws a seed that nobody uses from the global generator
        )
        return iter(loader)

    def _order(self, epoch: int) -> Tensor:
        if not self.config.shuffle:
            return torch.arange(self.manifest.num_samples)
        if epoch not in self._orders:
            self._orders = {epoch: epoch_order(self.seed, epoch, self.shard_sizes, self.config.shuffle_block)}
        return self._orders[epoch]

    def batch(self, keys: list[Key]) -> B:
        raise AssertionError("of the subclasses")

    def _gather(self, keys: list[Key], *columns: Sequence[str]) -> tuple[Tensor, list[Array]]:
        """Labels (N,), and for each of `columns` the values of the column that it names for each sample."""
        labels, *values = self.rows.gather([index for _, index in keys], [["label"] * len(keys), *columns])
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise ValueError(
                f"{self.config.path}: labels from {labels.min()} to {labels.max()}, of {self.num_classes} classes; a "
                "shard is damaged: `sfd check-data` names it"
            )
        return torch.from_numpy(labels), values

    def _flips(self, keys: list[Key]) -> list[bool]:
        return flips(self.seed, keys) if self.config.flip else [False] * len(keys)

    def _need(self, column: str, why: str) -> None:
        if column not in self.manifest.columns:
            raise ValueError(f"{self.config.path}: no column {column!r} ({why}); it has {list(self.manifest.columns)}")


class ImageReader(_Reader[ImageBatch]):
    """Images and labels, for models that train on pixels."""

    def __init__(self, config: DataConfig, **split_batch: int) -> None:
        super().__init__(config, **split_batch)
        self._need("image", "encode it with store.image=true")

    def batch(self, keys: list[Key]) -> ImageBatch:
        labels, (pixels,) = self._gather(keys, ["image"] * len(keys))
        images = mirrored(torch.from_numpy(pixels), self._flips(keys))
        return ImageBatch(images, labels, torch.tensor(keys))


def mirrored(images: Tensor, which: Sequence[bool]) -> Tensor:
    """Images (N, C, H, W), those of `which` turned left to right."""
    if not any(which):
        return images
    return torch.where(torch.tensor(which)[:, None, None, None], images.flip(3), images)


class LatentReader(_Reader[LatentBatch]):
    """Normalised latents, labels and, where stored, alignment features, all from the same flip.

    Raises:
        ValueError: if the shards hold no latents, lack the mirrored ones that `flip` asks for, or their statistics are
            not those of the manifest, or of another number of channels.
    """

    def __init__(self, config: DataConfig, **split_batch: int) -> None:
        super().__init__(config, **split_batch)
        self._need("latents", "these shards hold images; encode them with a tokenizer")
        if config.flip:
            self._need(f"latents{FLIPPED}", "encode with store.flip=true, or set data.flip=false")
        if config.features == "online":
            self._need("image", "data.features: online; encode with store.image=true")
        self.stats = read_stats(config.path / STATS if config.stats is None else config.stats)
        if config.stats is None and self.stats.hash != self.manifest.stats_hash and not config.allow_stats_mismatch:
            raise ValueError(
                f"{config.path / STATS}: not the statistics of this data; encode it anew, or set "
                "data.allow_stats_mismatch=true"
            )
        if len(self.stats.mean) != self.shape[0]:
            raise ValueError(
                f"data.stats: {config.stats or config.path / STATS} has {len(self.stats.mean)} channels, the latents "
                f"{self.shape[0]}; give the statistics of this data"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of a stored latent."""
        return tuple(int(n) for n in self.manifest.columns["latents"].split(":")[2].split(","))

    def batch(self, keys: list[Key]) -> LatentBatch:
        ends = [FLIPPED if flip else "" for flip in self._flips(keys)]
        wanted = ["latents", "logvar", *(["features"] if self.config.features == "shards" else [])]
        names = [name for name in wanted if name in self.manifest.columns]
        columns = [[name + end for end in ends] for name in names]
        if self.config.features == "online":
            names, columns = [*names, "image"], [*columns, ["image"] * len(keys)]
        labels, arrays = self._gather(keys, *columns)
        values = dict(zip(names, arrays, strict=True))
        latents = restored(values["latents"], self.manifest.dtype)
        if "logvar" in values:
            std = (0.5 * restored(values["logvar"], self.manifest.dtype)).exp()
            latents = latents + std * seeding.normal(self.seed, "posterior", keys, latents.shape[1:])
        # In 16 bits as they are stored: half the bytes to move, and the loss widens them.
        features = as_stored(values["features"], self.manifest.dtype) if "features" in values else None
        images = mirrored(torch.from_numpy(values["image"]), [end != "" for end in ends]) if "image" in values else None
        return LatentBatch(self.stats.normalize(latents), labels, torch.tensor(keys), features, images)


class FeatureReader(_Reader[FeatureBatch]):
    """Stored features and labels, for semantic VAEs.

    Raises:
        ValueError: if the shards hold no features, or lack the mirrored ones that `flip` asks for.
    """

    def __init__(self, config: DataConfig, **split_batch: int) -> None:
        super().__init__(config, **split_batch)
        self._need("features", "encode with store.features=shards, or set data.features=online")
        if config.flip:
            self._need(f"features{FLIPPED}", "encode with store.flip=true, or set data.flip=false")

    def batch(self, keys: list[Key]) -> FeatureBatch:
        labels, (values,) = self._gather(keys, [f"features{FLIPPED if flip else ''}" for flip in self._flips(keys)])
        return FeatureBatch(as_stored(values, self.manifest.dtype), labels, torch.tensor(keys))


def read_stats(path: Path) -> LatentStats:
    """Statistics from a file of ours, or from a folder with the authors' two.

    Raises:
        ValueError: if there are none.
    """
    theirs = path / "latents_stats.pt", path / "latents_sv_stats.pt"
    if all(file.is_file() for file in theirs):
        return LatentStats.from_official(*theirs)
    if not path.is_file():
        raise ValueError(
            f"data.stats: {path}; allowed: a stats.safetensors, or a folder with latents_stats.pt and "
            "latents_sv_stats.pt"
        )
    return LatentStats.load(path)


def flips(seed: int, keys: list[Key]) -> list[bool]:
    """Whether samples are mirrored in their epochs."""
    return (seeding.uniform(seed, "flip", keys) < 0.5).tolist()
