"""Part 6: the trainer on real shards, as `sfd train` runs it: wait for data, and the time of a step."""

from __future__ import annotations

import functools
import json
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import Part
from benchmarks.gpu.workload import Workload, fresh, missing
from sfd_scale.models import attention

PACKAGES = ("omegaconf", "streaming", "safetensors", "rich")
# Of the logged intervals, the first ones compile and fill the page cache.
SKIPPED = 2


def run(part: Part, chosen: Workload) -> None:
    reason = missing(PACKAGES)
    if reason is not None:
        part.leave_out("trainer on shards", reason)
        return
    with shards(chosen) as folder:
        part.run("trainer on shards", functools.partial(_train, part, chosen, folder))


@contextmanager
def shards(chosen: Workload) -> Iterator[Path]:
    """A folder with `data`: shards of random latents with alignment features, as `sfd convert` makes them."""
    from benchmarks.loader import write_theirs
    from sfd_scale.data.convert import ConvertConfig, convert

    with tempfile.TemporaryDirectory(prefix="gpu-shards-") as root:
        folder = Path(root)
        write_theirs(folder / "official", 1024 if chosen.device.type == "cuda" else 32)
        convert(ConvertConfig(source=folder / "official", features=True), folder / "data")
        yield folder


def overrides(chosen: Workload, folder: Path, run: str, steps: int) -> list[str]:
    """Of the recipe train/sfd_xxl_fsdp: the data, a short run, and a small model on the CPU."""
    count = chosen.micro_batches[0]
    words = [
        f"data.path={folder / 'data'}", f"run={folder / run}", f"train.steps={steps}", f"train.log_every={steps // 6}",
        f"train.global_batch={count}", "checkpoint.every=null",
    ]  # fmt: skip
    if chosen.device.type != "cuda":
        words += ["model.size=null", f"model.depth={chosen.depth}", "model.width=384", "model.heads=6",
                  "model.alignment.depth=1", "engine.precision=fp32", "engine.compile=false"]  # fmt: skip
    return words


def _train(part: Part, chosen: Workload, folder: Path) -> None:
    from sfd_scale import config
    from sfd_scale.recipe import TrainRecipe
    from sfd_scale.train import train

    fresh(chosen.device)
    steps = 60 if chosen.device.type == "cuda" else 6
    recipe = config.load("train/sfd_xxl_fsdp", TrainRecipe, overrides(chosen, folder, "run", steps))
    train(recipe, folder / "run")
    attention.activate("auto", chosen.device)
    found = summary(folder / "run" / "metrics.jsonl")
    what = f"{chosen.name} trainer on shards, micro-batch {chosen.micro_batches[0]}"
    part.fact(f"{what}, median step, s", found["step_s/p50"])
    part.fact(f"{what}, share of waits for data", found["data_wait_share"], f"{found['data_wait_share']:.2%}")
    part.fact(f"{what}, samples/s", found["samples_per_s"])
    if found.get("mfu") is not None:
        part.fact(f"{what}, MFU", found["mfu"], f"{found['mfu']:.1%}")


def summary(metrics: Path) -> Mapping[str, Any]:
    """Medians of the logged intervals, without the first ones."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    rows = rows[SKIPPED:] or rows
    names = ("step_s/p50", "data_wait_share", "samples_per_s", "mfu", "loss")
    known = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}
    return {name: statistics.median(values) for name, values in known.items() if values}
