"""The part of its time for which a training waits for local data: `data_wait_share`, as the trainer measures it.

A thread reads latents and features ahead and makes the random draws. A step of fixed length follows each batch; the
host sleeps in it, as it does while a GPU computes.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import Figure, Options
from benchmarks.loader import BATCH, ours, write_theirs
from sfd_scale.data.convert import ConvertConfig, convert
from sfd_scale.data.waiting import PatientBatches
from sfd_scale.diffusion.conditioning import ClassLabels
from sfd_scale.diffusion.latents import LatentLayout
from sfd_scale.diffusion.schedule import SemanticFirstSchedule
from sfd_scale.training.semantic_first import SemanticFirstConfig, SemanticFirstObjective
from sfd_scale.training.trainer import READ_AHEAD

RATES, LIMIT = (500, 1000), 0.01  # samples per second of a rank; the part of the time that it may wait
SAMPLES, STEPS = 512, 200


def shares(folder: Path, rate: int, steps: int) -> tuple[float, float]:
    """The part of the time in which a training of `rate` samples per second waits for data, after its first batch: the
    mean over the steps, and the median, on which other processes of the machine have no effect."""
    layout = LatentLayout(texture_channels=32, semantic_channels=16, size=16)
    objective = SemanticFirstObjective(
        SemanticFirstConfig(), layout, SemanticFirstSchedule(delta_t=0.3), ClassLabels(1000), seed=0
    )
    stream = PatientBatches(map(objective.prepare, ours(folder, workers=0)), limit_s=600, advice="", ahead=READ_AHEAD)
    next(stream)
    waits, started = [], time.perf_counter()
    for _ in range(steps):
        time.sleep(BATCH / rate)  # the host waits for the device
        before = stream.waited_s
        next(stream)
        waits.append(stream.waited_s - before)
    whole = time.perf_counter() - started
    return sum(waits) / whole, statistics.median(waits) * steps / whole


def run(options: Options) -> list[Figure]:
    """The wait of one rank at given rates, from a warm page cache, with the default settings."""
    figures = []
    with tempfile.TemporaryDirectory() as root:
        write_theirs(Path(root) / "theirs", 64 if options.quick else SAMPLES)
        convert(ConvertConfig(source=Path(root) / "theirs", features=True), Path(root) / "ours")
        for rate in RATES:
            found = shares(Path(root) / "ours", rate, 5 if options.quick else STEPS)
            for which, share in zip(("mean", "median"), found, strict=True):
                what = f"wait for data, {rate} samples/s, features, warm, 0 workers, {which} step"
                figures.append(
                    harness.measured(what, ours=share, peer=LIMIT, against="limit", unit="of the time", target=1.0)
                )
    return figures


if __name__ == "__main__":
    harness.main("data_wait", run)
