"""Loading latents: our shards and dataloader vs. the official file format and data set, on the same samples.

The peer reimplements the official format: safetensors files of 1,000 images with float32 latents and float16 alignment
features of both flips, and a map-style data set that opens the file for every item. `sfd convert` makes our shards from
these files, with and without features. Before a cold pass, the files are dropped from the page cache, so that they are
read from the disk.
"""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks import harness
from benchmarks.harness import Figure, Options
from benchmarks.official import batches
from sfd_scale.data.convert import ConvertConfig, convert
from sfd_scale.data.dataloader import DataConfig, LatentLoader
from sfd_scale.diffusion.latents import LatentStats
from sfd_scale.runtime.batch_split import BatchSplit

BATCH, SHARD, SAMPLES = 32, 1000, 2000
WORKERS = (0, 1, 2)
THEIRS, THEIRS_FEATURES, OURS, OURS_FEATURES = "theirs", "theirs+features", "ours", "ours+features"
OFFICIAL = "official"  # the official data set, if --official is given; it reads the features
# Name, ours, theirs, name of theirs, and the target of the ratio.
PAIRS = (
    ("latents, default format", OURS, THEIRS_FEATURES, "official format, with features", 2.0),
    ("latents", OURS, THEIRS, "official format", 1.0),
    ("latents and features", OURS_FEATURES, THEIRS_FEATURES, "official format, with features", 1.0),
)
OFFICIAL_PAIRS = tuple(
    (what, own, OFFICIAL, "the official code", target) for what, own, _, _, target in (PAIRS[0], PAIRS[2])
)
LIMIT = 100_000  # bytes an image in the default form
Batches = Iterator[Any]


def write_theirs(folder: Path, samples: int) -> None:
    """Official latent files of random numbers, which is fine because neither format compresses."""
    folder.mkdir(parents=True)
    for number, start in enumerate(range(0, samples, SHARD)):
        count, draw = min(SHARD, samples - start), torch.Generator().manual_seed(number)
        tensors = {"labels": torch.randint(0, 1000, (count,), generator=draw)}
        for suffix in ("", "_flip"):
            tensors[f"latents{suffix}"] = torch.randn(count, 32, 16, 16, generator=draw)
            tensors[f"latents_sv{suffix}"] = torch.randn(count, 16, 16, 16, generator=draw)
            tensors[f"feats_dino{suffix}"] = torch.randn(count, 768, 16, 16, generator=draw).half()
        save_file(tensors, folder / f"latents_rank00_shard{number:03d}.safetensors")


class Theirs(Dataset[dict[str, Tensor]]):
    """Opens the file for every item; the flip comes from the global random generator."""

    def __init__(self, folder: Path, stats: LatentStats, features: bool) -> None:
        self.stats, self.features = stats, features
        self.items: list[tuple[str, int]] = []
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(str(file), framework="pt") as handle:
                self.items += [(str(file), row) for row in range(handle.get_slice("labels").get_shape()[0])]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        file, row = self.items[index]
        suffix = "_flip" if torch.rand(()).item() < 0.5 else ""
        with safe_open(file, framework="pt") as handle:
            parts = [handle.get_slice(f"{name}{suffix}")[row : row + 1] for name in ("latents", "latents_sv")]
            item = {"latents": self.stats.normalize(torch.cat(parts, 1))[0]}
            item["labels"] = handle.get_slice("labels")[row : row + 1][0]
            if self.features:
                item["features"] = handle.get_slice(f"feats_dino{suffix}")[row : row + 1][0]
        return item


def theirs(folder: Path, stats: LatentStats, features: bool, workers: int) -> Batches:
    """Endless batches."""
    data = Theirs(folder, stats, features)
    loader = DataLoader(data, BATCH, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0)
    while True:
        yield from loader


def ours(folder: Path, workers: int) -> Batches:
    """Endless batches."""
    config = DataConfig(path=folder, num_workers=workers)
    return LatentLoader(config, seed=0, split=BatchSplit(BATCH, 1, 1), rank=0).batches(0)


def drop_from_cache(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def take(batches: Batches, count: int) -> None:
    for _ in range(count):
        next(batches)


class Folders:
    """The same samples in all formats, and a dataloader of each contender."""

    def __init__(self, root: Path, samples: int, official: Path | None = None) -> None:
        self.root, self.samples, self.official = root, samples, official
        self.names = [THEIRS, THEIRS_FEATURES, OURS, OURS_FEATURES] + ([OFFICIAL] if official is not None else [])
        write_theirs(root / "theirs", samples)
        for name, features in ((OURS, False), (OURS_FEATURES, True)):
            convert(ConvertConfig(source=root / "theirs", features=features), root / name)
        os.sync()  # only files that are on the disk can be dropped from the page cache
        self.stats = LatentStats.load(root / OURS / "stats.safetensors")

    def folder(self, name: str) -> Path:
        return self.root / ("theirs" if name in (THEIRS, THEIRS_FEATURES, OFFICIAL) else name)

    def start(self, name: str, workers: int) -> Batches:
        if name == OFFICIAL:
            assert self.official is not None
            return batches(self.official, self.folder(name), BATCH, workers)
        if name in (THEIRS, THEIRS_FEATURES):
            return theirs(self.folder(name), self.stats, name == THEIRS_FEATURES, workers)
        return ours(self.folder(name), workers)

    def bytes_per_image(self, name: str) -> float:
        files = (file for file in self.folder(name).rglob("*") if file.is_file())
        return sum(file.stat().st_size for file in files) / self.samples

    def warm(self, workers: int, repeats: int) -> dict[str, list[float]]:
        """Seconds of a pass over all samples. Workers run on and read ahead between the turns, for all contenders."""
        streams = {name: self.start(name, workers) for name in self.names}
        count = self.samples // BATCH
        return harness.race({n: functools.partial(take, s, count) for n, s in streams.items()}, repeats)

    def cpu_time(self, repeats: int) -> dict[str, list[float]]:
        """CPU seconds of a warm pass in one process: other load on the machine hardly changes them."""
        streams = {name: self.start(name, 0) for name in self.names}
        seconds: dict[str, list[float]] = {name: [] for name in streams}
        for number in range(1 + repeats):
            for name, stream in streams.items():
                started = time.process_time()
                take(stream, self.samples // BATCH)
                if number:  # the first pass fills the page cache
                    seconds[name].append(time.process_time() - started)
        return seconds

    def cold(self, workers: int, repeats: int) -> dict[str, list[float]]:
        """Seconds of a first pass, including the start of the workers."""
        seconds: dict[str, list[float]] = {name: [] for name in self.names}
        for _ in range(repeats):
            for name, own in seconds.items():
                drop_from_cache(self.folder(name))
                started = time.perf_counter()
                take(self.start(name, workers), self.samples // BATCH)
                own.append(time.perf_counter() - started)
        return seconds


def run(options: Options) -> list[Figure]:
    """Dataloading throughput and bytes per image, vs. the official format."""
    # As in a worker process. With more threads, a busy core would slow down one format and not the other.
    torch.set_num_threads(1)
    samples = 128 if options.quick else SAMPLES
    repeats = options.repeats or (2 if options.quick else 4)
    figures = []
    with tempfile.TemporaryDirectory() as root:
        folders = Folders(Path(root), samples, options.official)
        passes: list[tuple[str, str, dict[str, list[float]]]] = [
            ("CPU time", "samples/cpu-s", folders.cpu_time(repeats))
        ]
        for workers in WORKERS:
            passes.append((f"warm, {workers} workers", "samples/s", folders.warm(workers, repeats)))
            passes.append((f"cold, {workers} workers", "samples/s", folders.cold(workers, min(repeats, 2))))
        for how, unit, seconds in passes:
            for form, own, other, against, target in PAIRS + (OFFICIAL_PAIRS if options.official is not None else ()):
                figures.append(
                    harness.compare(
                        f"{form}, {how}",
                        seconds,
                        ours=own,
                        peer=other,
                        against=against,
                        work=samples // BATCH * BATCH,
                        unit=unit,
                        target=target,
                    )  # fmt: skip
                )
        size = folders.bytes_per_image(OURS)
        for against, peer, limit in (
            ("official format", folders.bytes_per_image(THEIRS), None),
            ("limit", LIMIT, 1.0),
        ):
            what = "default format on disk"
            figures.append(
                harness.measured(what, ours=size, peer=float(peer), against=against, unit="bytes/image", target=limit)
            )
    return figures


if __name__ == "__main__":
    harness.main("loader", run)
