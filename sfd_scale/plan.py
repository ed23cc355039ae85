"""Recipes → plans: `sfd plan`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from sfd_scale.build import flops, footprint, work
from sfd_scale.config import digest, load
from sfd_scale.data.manifest import Manifest, read_index
from sfd_scale.models.ddt import DDTConfig
from sfd_scale.models.lightningdit import LightningDiTConfig
from sfd_scale.planning import planner, search, tables
from sfd_scale.planning.calibration import MeasuredStep, calibrate
from sfd_scale.planning.convergence import FLUX
from sfd_scale.planning.costs import engine_name
from sfd_scale.planning.efficiency import Efficiency
from sfd_scale.planning.evaluation_cost import HEAD as EVALUATION_HEAD
from sfd_scale.planning.evaluation_cost import EvaluationCost, evaluation_costs
from sfd_scale.planning.evaluation_cost import rows as evaluation_rows
from sfd_scale.planning.footprint import Footprint
from sfd_scale.planning.hardware import Hardware, find_gpu, read_gpu_spec
from sfd_scale.planning.measured import BenchFigure, BenchResults, Throughput, read_throughput
from sfd_scale.planning.step_time import Step
from sfd_scale.planning.work import Work, trace_work
from sfd_scale.recipe import TrainRecipe
from sfd_scale.runs import RunFolder
from sfd_scale.runtime.batch_split import BatchSplit, split_batch
from sfd_scale.tokenizers.texture_vae import AutoencoderKLConfig, build
from sfd_scale.training.semantic_first import SemanticFirstConfig

IMAGENET = 1_281_167  # images of the training set


@dataclass(frozen=True)
class Model:
    """Counts of a recipe's model: memory, kernels, and FLOPs of one sample."""

    footprint: Footprint
    work: Work
    flops: float


@dataclass(frozen=True)
class Planned:
    """A recipe with its plan, and the machine that was planned with."""

    recipe: TrainRecipe
    job: planner.PlannedRun
    plan: planner.Plan
    calibrated: Calibrated


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
    settings = [recipe.model, recipe.latents, recipe.schedule, recipe.engine.precision, recipe.attention]
    return digest([*settings, recipe.optimizer])


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


@dataclass(frozen=True)
class Calibrated:
    """The machine of a plan after `--measured`.

    mfu: the measured one, in place of the time model, if nothing is known of the measured run but its MFU.
    note: the error of the plan on the measurements, for people.
    """

    machine: Machine
    mfu: float | None = None
    note: str | None = None


def calibrated(path: Path, machine: Machine, flops_per_sample: float) -> Calibrated:
    """The machine with constants that fit the measurements of a file; the measured GPU must be that of the plan.

    Raises:
        ValueError: if the file has no measurements.
    """
    found = read_throughput(path)
    if isinstance(found, Throughput):
        rate, run = found.samples_per_s, RunFolder(path.parent)
        if rate is None or not (run.recipe_file.is_file() and run.environment_file.is_file()):
            mfu = found.mfu if found.mfu is not None else (rate or 0.0) * flops_per_sample / machine.hardware.peak_bf16
            return Calibrated(machine, mfu=mfu, note=f"MFU of {path.name}")
        steps = [_measured_run(run, rate, machine)]
    else:
        machine = _with_sustained_rates(machine, found, path)
        steps = [_measured_figure(figure) for figure in found.figures]
    fitted = calibrate(steps, machine.hardware, machine.efficiency, str(path))
    machine = replace(machine, hardware=fitted.hardware, efficiency=fitted.efficiency)
    return Calibrated(machine, note=fitted.describe())


def _with_sustained_rates(machine: Machine, found: BenchResults, path: Path) -> Machine:
    """The calibration starts from the measured rates of a large matmul and of a copy, where the file has them."""
    hardware, efficiency = machine.hardware, machine.efficiency
    if found.matmul_flops is not None:
        hardware = replace(hardware, tensor_share=min(found.matmul_flops / hardware.peak_bf16, 1.0))
    if found.copy_bytes is not None:
        share = min(found.copy_bytes / hardware.bandwidth, 1.0)
        memory = replace(efficiency.memory, value=share, source="measured here", reference=str(path))
        efficiency = replace(efficiency, memory=memory)
    return replace(machine, hardware=hardware, efficiency=efficiency)


def _measured_run(run: RunFolder, rate: float, machine: Machine) -> MeasuredStep:
    """The step of a run with `rate` samples/s on each rank."""
    recipe = run.recipe
    world = int(json.loads(run.environment_file.read_text(encoding="utf-8"))["world_size"])
    split = split_batch(recipe.train.global_batch, recipe.train.micro_batch, world)
    job = make_job(recipe, count_model(recipe), world, machine.gpus_per_node, samples=1)
    job = replace(job, engine=planner.decided_engine(job, split, machine.hardware))
    return MeasuredStep(str(run.path), planner.step_of(job, split), split.micro_batch * split.grad_accum_steps / rate)


def _measured_figure(figure: BenchFigure) -> MeasuredStep:
    recipe = load("train/sfd_xl", TrainRecipe, [f"model.size={figure.size}"])
    model = count_model(recipe)
    split = BatchSplit(figure.micro_batch, 1, 1)
    step = Step(model.footprint, model.work, figure.engine, split, ranks_per_node=1)
    return MeasuredStep(figure.name, step, figure.micro_batch / figure.samples_per_s)


def make(
    names: Sequence[str], overrides: Sequence[str], gpus: Sequence[int], machine: Machine, *,
    mfu: float | None = None, measured: Path | None = None, samples: int | None = None,
) -> list[Planned]:  # fmt: skip
    """The plan of every recipe on every number of GPUs.

    Raises:
        ValueError: for an impossible number of GPUs, or a file without measurements.
    """
    made, models = [], dict[str, Model]()
    for name in names:
        recipe = load(name, TrainRecipe, overrides)
        key = model_key(recipe)
        model = models[key] = models[key] if key in models else count_model(recipe)
        found = Calibrated(machine, mfu) if measured is None else calibrated(measured, machine, model.flops)
        for count in gpus:
            planner.check_ranks(count, min(machine.gpus_per_node, max(count, 1)))
            job = make_job(recipe, model, count, machine.gpus_per_node, samples)
            plan = planner.plan(job, found.machine.hardware, found.machine.efficiency, found.mfu)
            made.append(Planned(recipe, job, plan, found))
    return made


def table(made: Sequence[Planned], machine: Machine, as_markdown: bool) -> Table | str:
    """One plan in full, or several as a table with one line each."""
    if as_markdown or len(made) > 1:
        rows = [tables.table_row(entry.recipe.name, entry.job, entry.plan) for entry in made]
        return _as_table(tables.TABLE_HEAD, rows, as_markdown)
    (entry,) = made
    title = f"{entry.recipe.name} on {entry.job.ranks} × {machine.gpu}, {engine_name(entry.job.engine)}"
    out = Table("", "", "source", title=title)
    for cells in tables.quantities(entry.plan, machine.hardware):
        out.add_row(*cells)
    if not entry.plan.fits:
        out.add_row("does not fit", search.nearest(entry.job).describe(), "computed")
    if entry.calibrated.note is not None:
        out.add_row("calibration", entry.calibrated.note, "measured here")
    return out


def write_pictures(made: Sequence[Planned], machine: Machine, plot: Path | None, html: Path | None) -> None:
    """A PNG of the plans, and their table as an HTML page.

    Raises:
        ValueError: if the picture's name does not end with .png.
    """
    if plot is not None:
        from sfd_scale.planning.plot import Drawn, draw  # imports matplotlib

        drawn = [Drawn(entry.recipe.name, entry.job.ranks, entry.plan) for entry in made]
        draw(drawn, machine.hardware, plot)
    if html is not None:
        rows = [tables.table_row(entry.recipe.name, entry.job, entry.plan) for entry in made]
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(tables.html(rows, title=f"Plans on {machine.gpu}"), encoding="utf-8")


@dataclass(frozen=True)
class Advised:
    """The answer of `sfd plan --best`. name, overrides: of the recipe, as the user gave them."""

    name: str
    overrides: tuple[str, ...]
    recipe: TrainRecipe
    found: list[search.Advice]
    refused: list[str]
    evaluation: list[EvaluationCost]
    price: float | None

    @property
    def fastest(self) -> search.Advice:
        return min(self.found, key=lambda advice: advice.days)

    @property
    def cheapest(self) -> search.Advice:
        return min(self.found, key=lambda advice: advice.gpu_hours)

    @property
    def knee(self) -> int | None:
        return search.knee([a for a in self.found if a.batch == self.recipe.train.global_batch])


def best(
    name: str, overrides: Sequence[str], gpus: Sequence[int], machine: Machine, *, measured: Path | None = None,
    price: float | None = None, gpu_mtbf_hours: float | None = None,
) -> Advised:  # fmt: skip
    """The best settings of a recipe on each number of GPUs.

    Args:
        price: of one GPU-hour.

    Raises:
        ValueError: if no settings fit any of the numbers of GPUs; the message names the nearest that fit.
    """
    recipe = load(name, TrainRecipe, overrides)
    model = count_model(recipe)
    if measured is not None:
        machine = calibrated(measured, machine, model.flops).machine
    job = make_job(recipe, model, 1, machine.gpus_per_node, samples=1)
    if gpu_mtbf_hours is not None:
        job = replace(job, gpu_mtbf_hours=gpu_mtbf_hours)
    found, refused = search.advise(
        job, sorted(set(gpus)), machine.hardware, machine.efficiency, FLUX, machine.gpus_per_node
    )
    if not found:
        raise ValueError("; ".join(refused))
    evaluation = _evaluation(recipe, model, machine)
    return Advised(name, tuple(overrides), recipe, found, refused, evaluation, price)


def _evaluation(recipe: TrainRecipe, model: Model, machine: Machine) -> list[EvaluationCost]:
    """Of a model that draws images; empty for others."""
    if not isinstance(recipe.model, LightningDiTConfig | DDTConfig):
        return []
    guide = None
    if isinstance(recipe.model, LightningDiTConfig) and isinstance(recipe.objective, SemanticFirstConfig):
        small = replace(recipe.model, size="B", depth=None, width=None, heads=None, alignment=None)
        guide = work(replace(recipe, model=small, objective=replace(recipe.objective, alignment_weight=0.0)))
    texture, decoder = recipe.tokenizer.texture, None
    if isinstance(texture, AutoencoderKLConfig):
        layout = recipe.latents

        def latents(samples: int) -> tuple[Tensor, ...]:
            return (torch.zeros(samples, layout.texture_channels, layout.size, layout.size),)

        decoder = replace(trace_work(lambda: build(texture).decoder, latents, "fp32"), precision="tf32")
    return evaluation_costs(model.work, guide, decoder, machine.hardware, machine.efficiency)


ADVICE_HEAD = (
    "GPUs", "batch", "engine", "checkpointing", "compile", "micro-batch × accumulation", "GiB a rank", "s a step",
    "MFU", "bound by", "days", "GPU-hours",
)  # fmt: skip


def advice_rows(advised: Advised) -> list[list[str]]:
    """Under ADVICE_HEAD; with a price, one cell more."""
    rows = []
    for advice in advised.found:
        plan = advice.choice.plan
        engine, split = plan.engine, plan.split
        row = [
            str(advice.ranks), str(advice.batch), engine_name(engine), engine.activation_checkpointing,
            "on" if engine.compile else "off", f"{split.micro_batch} × {split.grad_accum_steps}",
            f"{plan.memory.total / 2**30:.1f}", f"{plan.step_seconds:.3f}", f"{plan.mfu:.0%}",
            tables.bound_by(plan.time), f"{advice.days:.1f}", f"{advice.gpu_hours:,.0f}",
        ]  # fmt: skip
        rows.append(row if advised.price is None else [*row, f"{advised.price * advice.gpu_hours:,.0f}"])
    return rows


def command_line(advised: Advised, advice: search.Advice, gpus_per_node: int) -> str:
    """The command that trains with the advised settings."""
    where = f"RANKS={advice.ranks}" if advice.ranks <= gpus_per_node else "HOSTFILE=hosts"
    batch = [] if advice.batch == advised.recipe.train.global_batch else [
        f"train.global_batch={advice.batch}", f"train.steps={advice.choice.job.steps}"
    ]  # fmt: skip
    keys = " ".join([*advised.overrides, *advice.choice.overrides, *batch])
    return f"{where} launchers/deepspeed.sh train {advised.name} {keys}"


def advice_text(advised: Advised, gpus_per_node: int, as_markdown: bool) -> list[Table | str]:
    """Tables and sentences of the advice, in the order of printing."""
    head = ADVICE_HEAD if advised.price is None else (*ADVICE_HEAD, "cost")
    out: list[Table | str] = [_as_table(head, advice_rows(advised), as_markdown)]
    for name, advice in (("fastest", advised.fastest), ("cheapest", advised.cheapest)):
        text = f"{name}: {advice.days:.1f} days on {advice.ranks} GPUs, {advice.gpu_hours:,.0f} GPU-hours"
        out.append(f"{text}\n    {command_line(advised, advice, gpus_per_node)}")
    own = advised.recipe.train.global_batch
    if advised.knee is not None:
        out.append(f"at batch {own}, more than {advised.knee} GPUs give less than half of their share")
    if any(advice.batch != own for advice in advised.found):
        out.append(
            f"batches above {own} are another recipe: they take more samples to the same quality, by the curve of "
            f"{FLUX.model} (critical batch {FLUX.critical:,.0f}); scale the learning rate"
        )
    out += [f"left out: {text}" for text in advised.refused]
    if advised.evaluation:
        out.append(_as_table(EVALUATION_HEAD, evaluation_rows(advised.evaluation), as_markdown))
    return out


def _as_table(head: Sequence[str], rows: Sequence[Sequence[str]], as_markdown: bool) -> Table | str:
    if as_markdown:
        return tables.markdown(rows, head)
    out = Table(*head)
    for row in rows:
        out.add_row(*row)
    return out


def constants(machine: Machine) -> Table:
    """Every constant of the time model with its source."""
    out = Table("constant", "value", "source", "reference", title=f"constants of the time on {machine.gpu}")
    for cells in tables.constants(machine.efficiency, machine.hardware):
        out.add_row(*cells)
    return out


if __name__ == "__main__":
    from sfd_scale.__main__ import main

    main("plan")
