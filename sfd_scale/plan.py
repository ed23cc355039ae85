"""Recipes → plans: `sfd plan`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table

from sfd_scale.build import flops, footprint, work
from sfd_scale.config import digest, load
from sfd_scale.data.manifest import Manifest, read_index
from sfd_scale.planning import planner, tables
from sfd_scale.planning.costs import engine_name
from sfd_scale.planning.efficiency import Efficiency
from sfd_scale.planning.footprint import Footprint
from sfd_scale.planning.hardware import Hardware, find_gpu, read_gpu_spec
from sfd_scale.planning.work import Work
from sfd_scale.recipe import TrainRecipe

IMAGENET = 1_281_167  # images of the training set


@dataclass(frozen=True)
class Model:
    """Counts of a recipe's model: memory, kernels, and FLOPs of one sample."""

    footprint: Footprint
    work: Work
    flops: float


@dataclass(frozen=True)
class Planned:
    """A recipe with its plan."""

    recipe: TrainRecipe
    job: planner.PlannedRun
    plan: planner.Plan


@dataclass(frozen=True)
class Machine:
    """The hardware of a plan. gpu: its name in the command."""

    gpu: str
    hardware: Hardware
    gpus_per_node: int
    efficiency: Efficiency


def make_machine(gpu: str, spec: Path | None, gpus_per_node: int, network: float | None) -> Machine:
    """The hardware that the command names.

    Args:
        spec: a file that describes a GPU, in place of the name.
        network: GB/s between nodes, per GPU and direction.

    Raises:
        ValueError: for an unknown GPU or a wrong file.
    """
    hardware = find_gpu(gpu) if spec is None else read_gpu_spec(spec)
    if network is not None:
        hardware = replace(hardware, network=1e9 * network)
    return Machine(gpu if spec is None else hardware.device, hardware, gpus_per_node, Efficiency())


def parse_counts(texts: Sequence[str]) -> list[int]:
    """Numbers of GPUs, separated by commas or given repeatedly.

    Raises:
        ValueError: for a text that is no list of integers.
    """
    try:
        return [int(number) for text in texts for number in text.split(",")]
    except ValueError:
        raise ValueError(f"--gpus: {','.join(texts)}; allowed: numbers separated by commas, such as 8,16,32") from None


def data_size(recipe: TrainRecipe, samples: int | None) -> tuple[int, int]:
    """Bytes of a sample and number of samples: of the recipe's data if it is here, else of ImageNet."""
    path = recipe.data.path
    if samples is None and (path / "manifest.json").is_file():
        count = Manifest.read(path).num_samples
        size = sum(shard["raw_data"]["bytes"] for shard in read_index(path)["shards"])
        return max(size // max(count, 1), 1), count
    return recipe.task.sample_bytes(), IMAGENET if samples is None else samples


def count_model(recipe: TrainRecipe) -> Model:
    return Model(footprint(recipe), work(recipe), flops(recipe))


def model_key(recipe: TrainRecipe) -> str:
    """Equal for recipes with equal counts: they may differ in the engine, except for its precision."""
    return digest([recipe.model, recipe.latents, recipe.schedule, recipe.engine.precision, recipe.attention])


def make_job(
    recipe: TrainRecipe, model: Model, gpus: int, gpus_per_node: int, samples: int | None
) -> planner.PlannedRun:
    size, count = data_size(recipe, samples)
    checkpoint, steps = recipe.checkpoint, recipe.train.steps
    saved = steps // (checkpoint.every or steps) or 1
    apart = 0 if checkpoint.keep_every is None else steps // checkpoint.keep_every
    kept = saved if checkpoint.keep_last is None else min(saved, apart + checkpoint.keep_last)
    return planner.PlannedRun(
        footprint=model.footprint,
        work=model.work,
        flops_per_sample=model.flops,
        engine=recipe.engine,
        global_batch=recipe.train.global_batch,
        micro_batch=recipe.train.micro_batch,
        steps=steps,
        ranks=gpus,
        ranks_per_node=min(gpus_per_node, gpus) if gpus > 0 else gpus_per_node,
        sample_bytes=size,
        samples=count,
        kept_checkpoints=kept,
        save_every=checkpoint.every or steps,
        background=checkpoint.background,
        num_workers=recipe.data.num_workers,
    )


def measured_mfu(path: Path, flops: float, peak: float) -> float:
    """The MFU of a run: from its metrics.jsonl (mfu, else the throughput of a rank), or from a JSON object with `mfu`,
    or with `samples_per_s` and `world_size`.

    Raises:
        ValueError: if the file is missing or has none of them.
    """
    if not path.is_file():
        raise ValueError(f"--measured: {path} is no file")
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines()]
            found = [row["mfu"] for row in rows if row.get("mfu")]
            rates = [row["samples_per_s_per_rank"] for row in rows if row.get("samples_per_s_per_rank")]
            if found or rates:  # the median: the first steps are slow, and pauses for saves are rare
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
    names: Sequence[str], overrides: Sequence[str], gpus: Sequence[int], machine: Machine, *,
    mfu: float | None = None, measured: Path | None = None, samples: int | None = None,
) -> list[Planned]:  # fmt: skip
    """The plan of every recipe on every number of GPUs.

    Raises:
        ValueError: for an impossible number of GPUs.
    """
    made, models = [], dict[str, Model]()
    for name in names:
        recipe = load(name, TrainRecipe, overrides)
        key = model_key(recipe)
        model = models[key] = models[key] if key in models else count_model(recipe)
        peak = machine.hardware.peak_bf16
        stated = mfu if measured is None else measured_mfu(measured, model.flops, peak)
        for count in gpus:
            planner.check_ranks(count, min(machine.gpus_per_node, max(count, 1)))
            job = make_job(recipe, model, count, machine.gpus_per_node, samples)
            made.append(Planned(recipe, job, planner.plan(job, machine.hardware, machine.efficiency, stated)))
    return made


def table(made: Sequence[Planned], machine: Machine, as_markdown: bool) -> Table | str:
    """One plan in full, or several as a table with one line each."""
    rows = [tables.table_row(entry.recipe.name, entry.job, entry.plan) for entry in made]
    if as_markdown:
        return tables.markdown(rows)
    if len(made) > 1:
        out = Table(*tables.TABLE_HEAD)
        for row in rows:
            out.add_row(*row)
        return out
    (entry,) = made
    title = f"{entry.recipe.name} on {entry.job.ranks} × {machine.gpu}, {engine_name(entry.job.engine)}"
    out = Table("", "", "source", title=title)
    for cells in tables.quantities(entry.plan, machine.hardware):
        out.add_row(*cells)
    return out


if __name__ == "__main__":
    from sfd_scale.__main__ import main

    main("plan")
