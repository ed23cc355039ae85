"""Recipes → plans: what `sfd plan` shows."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from sfd_scale.build import flops, footprint
from sfd_scale.config import digest, load
from sfd_scale.data.manifest import Manifest, read_index
from sfd_scale.planning import planner
from sfd_scale.planning.costs import engine_name
from sfd_scale.planning.footprint import Footprint
from sfd_scale.recipe import TrainRecipe
from sfd_scale.runtime.device import peak_flops_by_name

IMAGENET = 1_281_167  # images of the training set


def data_size(recipe: TrainRecipe, samples: int | None) -> tuple[int, int]:
    """Bytes of a sample, and the number of samples: of the recipe's data where it is here, else of ImageNet's."""
    path = recipe.data.path
    if samples is None and (path / "manifest.json").is_file():
        count = Manifest.read(path).num_samples
        size = sum(shard["raw_data"]["bytes"] for shard in read_index(path)["shards"])
        return max(size // max(count, 1), 1), count
    return recipe.task.sample_bytes(), IMAGENET if samples is None else samples


def job(
    recipe: TrainRecipe, model: Footprint, flops_per_sample: float, gpus: int, gpus_per_node: int, samples: int | None
) -> planner.PlannedRun:
    size, count = data_size(recipe, samples)
    checkpoint, steps = recipe.checkpoint, recipe.train.steps
    saved = steps // (checkpoint.every or steps) or 1
    apart = 0 if checkpoint.keep_every is None else steps // checkpoint.keep_every
    kept = saved if checkpoint.keep_last is None else min(saved, apart + checkpoint.keep_last)
    return planner.PlannedRun(
        footprint=model,
        flops_per_sample=flops_per_sample,
        engine=recipe.engine,
        global_batch=recipe.train.global_batch,
        micro_batch=recipe.train.micro_batch,
        steps=steps,
        ranks=gpus,
        ranks_per_node=min(gpus_per_node, gpus) if gpus > 0 else gpus_per_node,
        sample_bytes=size,
        samples=count,
        kept_checkpoints=kept,
    )


def measured_mfu(path: Path, flops: float, peak: float) -> float:
    """The use of the peak that a run had: from its metrics.jsonl (mfu, else the rate of a rank), or from a JSON object
    with `mfu`, or with `samples_per_s` and `world_size`.

    Raises:
        ValueError: where there is no such file, or it holds neither.
    """
    if not path.is_file():
        raise ValueError(f"--measured: {path} is no file")
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines()]
            found = [row["mfu"] for row in rows if row.get("mfu")]
            rates = [row["samples_per_s_per_rank"] for row in rows if row.get("samples_per_s_per_rank")]
            if found or rates:  # by the median: the first steps are slow, and pauses for saves are rare
                return float(statistics.median(found)) if found else float(statistics.median(rates)) * flops / peak
        else:
            data = json.loads(text)
            if "mfu" in data:
                return float(data["mfu"])
            if "samples_per_s" in data and "world_size" in data:
                return float(data["samples_per_s"]) * flops / (float(data["world_size"]) * peak)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error
    raise ValueError(f"{path}: no `mfu`, nor `samples_per_s` with `world_size`; give a run's metrics.jsonl, or those")


def make(
    names: Sequence[str], overrides: Sequence[str], gpus: Sequence[int], gpu: str, *, gpus_per_node: int,
    mfu: float | None, measured: Path | None, samples: int | None,
) -> list[tuple[TrainRecipe, planner.PlannedRun, planner.Plan]]:  # fmt: skip
    """The plan of every recipe on every number of GPUs.

    Raises:
        ValueError: for a GPU that is not known, or what `planner.plan` refuses.
    """
    if gpu not in planner.DEVICES:
        raise ValueError(f"--gpu: {gpu!r}; allowed: {', '.join(planner.DEVICES)}")
    device, made, models = planner.DEVICES[gpu], [], dict[str, tuple[Footprint, float]]()
    peak = peak_flops_by_name(device.name)
    for name in names:
        recipe = load(name, TrainRecipe, overrides)
        # Recipes that differ in the engine alone have one footprint.
        key = digest([recipe.model, recipe.latents, recipe.schedule, recipe.engine.precision])
        model, work_per_sample = models[key] = models[key] if key in models else (footprint(recipe), flops(recipe))
        used = planner.ASSUMED_MFU if mfu is None else mfu
        used = used if measured is None else measured_mfu(measured, work_per_sample, peak)
        for count in gpus:
            planner.check_ranks(count, min(gpus_per_node, max(count, 1)))
            work = job(recipe, model, work_per_sample, count, gpus_per_node, samples)
            made.append((recipe, work, planner.plan(work, device, peak, used)))
    return made


def table(
    made: Sequence[tuple[TrainRecipe, planner.PlannedRun, planner.Plan]], gpu: str, as_markdown: bool
) -> Table | str:
    """One plan in full, or several as a table, one line each."""
    device = planner.DEVICES[gpu]
    rows = [planner.table_row(recipe.name, work, plan) for recipe, work, plan in made]
    if as_markdown:
        return planner.markdown(rows)
    if len(made) > 1:
        out = Table(*planner.TABLE_HEAD)
        for row in rows:
            out.add_row(*row)
        return out
    recipe, work, plan = made[0]
    out = Table("", "", show_header=False, title=f"{recipe.name} on {work.ranks} × {gpu}, {engine_name(work.engine)}")
    for name, value in planner.quantities(plan, device):
        out.add_row(name, value)
    return out


if __name__ == "__main__":
    from sfd_scale.__main__ import main

    main("plan")
