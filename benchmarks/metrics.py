"""Scores in one process vs. scores by image files: PNG, .npz, np.cov and scipy's sqrtm.

The peer follows the scripts around ADM's evaluator: one file per image, all images stacked into one array, np.cov,
scipy's sqrtm; precision and recall by torch-fidelity. The feature network is the same on both sides and is left out.
"""

from __future__ import annotations

import inspect
import tempfile
import warnings
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from PIL import Image
from torch import Tensor
from torch_fidelity.metric_prc import prc_features_to_metric

from benchmarks import harness
from benchmarks.harness import Figure, Options
from eval.images import npz
from eval.metrics.frechet import frechet_distance
from eval.metrics.moments import moments
from eval.metrics.precision_recall import precision_recall
from eval.work.chunks import ChunkFolder

FEATURES = 2048 + 17 * 17 * 7 + 1008  # floats that a chunk stores per image


def images(count: int, side: int, seed: int) -> Tensor:
    """Smooth shapes with noise, whose PNG is about as large as that of a photograph: (N, 3, S, S) uint8."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=draw)
    smooth = torch.nn.functional.interpolate(coarse, size=side, mode="bicubic")
    return (255 * (smooth + 0.03 * torch.randn(smooth.shape, generator=draw)).clamp(0, 1)).to(torch.uint8)


def features(count: int, dim: int, seed: int) -> Tensor:
    """Correlated features, clipped at 0 as those of Inception: (N, D) float32."""
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(9)) / dim**0.5
    return (torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) @ mix + 0.4).clamp(min=0)


# ------------------------------------------------------------------------------------------------- images to features


def in_process(folder: Path, batch: Tensor, number: int) -> Tensor:
    """Pass the images on in memory, and write only their features."""
    ChunkFolder(folder, 10**9, len(batch)).commit(number, {"features": torch.zeros(len(batch), FEATURES)})
    return batch


def by_files(folder: Path, batch: Tensor) -> Tensor:
    """Write one PNG per image, read and stack them, write an .npz, and read it."""
    for number, image in enumerate(batch):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:06d}.png")
    stacked = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])
    np.savez(folder / "samples.npz", arr_0=stacked)
    with np.load(folder / "samples.npz") as file:
        return torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)


def handover(options: Options) -> Figure:
    count = 32 if options.quick else 128
    batch = images(count, 256, seed=0)
    with tempfile.TemporaryDirectory() as name:
        ours, theirs = Path(name, "ours"), Path(name, "theirs")
        theirs.mkdir()
        assert torch.equal(by_files(theirs, batch), in_process(ours, batch, 0))
        contenders = {"ours": lambda: in_process(ours, batch, 0), "peer": lambda: by_files(theirs, batch)}
        seconds = harness.race(contenders, options.repeats or 4)
    return harness.compare(
        "images to the extractor, 256x256", seconds, against="PNG, read again, .npz", work=count, unit="images/s"
    )


# ------------------------------------------------------------------------------------------------- memory


def stream_npz(path: str, count: int) -> None:
    """Our writer, which gets chunks of 64 images, as from generation."""
    batch = images(64, 256, seed=0)
    parts = (batch.clone() for _ in range(count // 64))
    npz.write_images(Path(path), parts, count, (256, 256), torch.zeros(count, dtype=torch.int64))


def stack_npz(path: str, count: int) -> None:
    """Stack a list of arrays and save it."""
    batch = images(64, 256, seed=0).permute(0, 2, 3, 1).numpy()
    arrays = [image for _ in range(count // 64) for image in batch.copy()]
    np.savez(path, arr_0=np.stack(arrays))


def memory(options: Options) -> Figure:
    count = 128 if options.quick else 2048
    with tempfile.TemporaryDirectory() as name:
        ours, theirs = (
            harness.peak_memory(write, str(Path(name, f"{write.__name__}.npz")), count) / 2**30
            for write in (stream_npz, stack_npz)
        )
    return harness.measured(
        f"peak memory, .npz of {count:,} images", ours=ours, peer=theirs, against="list, np.stack, np.savez", unit="GiB"
    )


# ------------------------------------------------------------------------------------------------- scores


def adm_distance(a: Tensor, b: Tensor) -> float:
    """ADM's statistics and distance: float32 mean, np.cov, sqrtm of the product."""
    x, y = a.numpy(), b.numpy()
    first, second = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        silent = {"disp": False} if "disp" in inspect.signature(scipy.linalg.sqrtm).parameters else {}
        root = scipy.linalg.sqrtm(first @ second, **silent)
    root = root[0] if isinstance(root, tuple) else root
    shift = x.mean(0) - y.mean(0)
    return float(shift @ shift + np.trace(first) + np.trace(second) - 2 * np.trace(root).real)


def distance(options: Options) -> Figure:
    count, dim = (300, 64) if options.quick else (4096, 2048)
    a, b = features(count, dim, 0), features(count, dim, 1)
    found: dict[str, float] = {}

    def ours() -> None:
        found["ours"] = frechet_distance(moments(a), moments(b))

    def peer() -> None:
        found["peer"] = adm_distance(a, b)

    seconds = harness.race({"ours": ours, "peer": peer}, options.repeats or 1, warmup=0)
    assert abs(found["ours"] - found["peer"]) < 1e-4 * found["peer"], found
    return harness.compare(
        f"FID of {count:,} by {count:,} rows of {dim:,}", seconds, against="np.cov, scipy sqrtm", work=1, unit="1/s"
    )


def neighbours(options: Options) -> Figure:
    count, others = (300, 200) if options.quick else (8192, 4096)
    samples, reference = features(count, 2048, 0), features(others, 2048, 1)
    found: dict[str, tuple[float, ...]] = {}

    def ours() -> None:
        found["ours"] = tuple(precision_recall(samples, reference, 3))

    def peer() -> None:
        result = prc_features_to_metric(
            samples, reference, prc_neighborhood=3, prc_batch_size=10_000, save_cpu_ram=True, verbose=False
        )
        found["peer"] = (result["precision"], result["recall"])

    seconds = harness.race({"ours": ours, "peer": peer}, options.repeats or 3, warmup=0)
    assert np.allclose(found["ours"], found["peer"], atol=2e-3), found
    return harness.compare(
        f"precision and recall, {count:,} by {others:,}", seconds, against="torch-fidelity", work=1, unit="1/s"
    )


def run(options: Options) -> list[Figure]:
    """Images to features, memory of the .npz, FID, precision and recall: ours vs. the usual scripts."""
    return [handover(options), memory(options), neighbours(options), distance(options)]


if __name__ == "__main__":
    harness.main("metrics", run)
