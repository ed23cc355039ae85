"""The command line: `sfd COMMAND RECIPE [key=value ...]`, or `python -m sfd_scale COMMAND ...` under a launcher."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import rich
import rich.table
import typer
from rich.markup import escape

from sfd_scale import config
from sfd_scale.launch.command_line import Overrides, Recipe, complete_recipe, load_recipe, run_command
from sfd_scale.runtime.inert_imports import inert_imports
from sfd_scale.runtime.output import plain_console
from sfd_scale.runtime.signals import REQUEUE_EXIT_CODE

if TYPE_CHECKING:
    from sfd_scale.recipe import ConvertRecipe, EncodeRecipe, FitRecipe, TrainRecipe

# The console script does not search the checkout, where the package `eval` is; `python -m` does.
if config.CHECKOUT is not None:
    sys.path.append(str(config.CHECKOUT))

from eval.__main__ import app as evaluation

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=escape(__doc__))
app.add_typer(evaluation, name="eval")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sfd-scale {importlib.metadata.version('sfd-scale')}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """The options of every command."""


def _train_recipe() -> type[TrainRecipe]:
    from sfd_scale.recipe import TrainRecipe

    return TrainRecipe


def _encode_recipe() -> type[EncodeRecipe]:
    from sfd_scale.recipe import EncodeRecipe

    return EncodeRecipe


def _convert_recipe() -> type[ConvertRecipe]:
    from sfd_scale.recipe import ConvertRecipe

    return ConvertRecipe


def _fit_recipe() -> type[FitRecipe]:
    from sfd_scale.recipe import FitRecipe

    return FitRecipe


@app.command()
def init(
    name: Annotated[str, typer.Argument(help="The project: a new folder for its recipes.")],
    images: Annotated[Path, typer.Option(help="Your images: one folder per class.")],
    size: Annotated[
        int | None, typer.Option(help="Pixels: 256 with the official tokenizers; 32, 64 or 128 with small ones.")
    ] = None,
    codec: Annotated[
        Literal["auto", "small", "sfd"],
        typer.Option(help="sfd: the official pretrained tokenizers; small: made from your images; auto: what is here."),
    ] = "auto",
) -> None:
    """Write the recipes of a project on your own images, and print the commands to run."""
    from sfd_scale.data.project import init as write

    _, commands = write(name, images, size, codec)
    typer.echo("\n".join(commands))


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    run: Annotated[Path | None, typer.Option(help="Run folder.")] = None,
    allow_foreign: Annotated[
        bool, typer.Option("--allow-foreign", help="Resume from checkpoints of another recipe.")
    ] = False,
) -> None:
    """Train a model. The same command with the same run folder resumes."""
    loaded = load_recipe(recipe, _train_recipe, overrides)
    from sfd_scale.train import train as run_training

    if not run_training(loaded, run or loaded.run, allow_foreign, source=recipe):
        sys.exit(REQUEUE_EXIT_CODE)


@app.command()
def encode(recipe: Recipe, overrides: Overrides = None) -> None:
    """Encode images to shards (images, composite latents, features). The same command resumes."""
    loaded = load_recipe(recipe, _encode_recipe, overrides)
    from sfd_scale.encode import encode as run

    run(loaded)


@app.command()
def convert(recipe: Recipe, overrides: Overrides = None) -> None:
    """Convert feature files of the official code (safetensors) to shards, and verify counts and checksums."""
    loaded = load_recipe(recipe, _convert_recipe, overrides)
    from sfd_scale.encode import convert as run

    run(loaded)


@app.command()
def fit(recipe: Recipe, overrides: Overrides = None) -> None:
    """Fit a closed-form codec to images: PCA of patches, or PCA of features."""
    loaded = load_recipe(recipe, _fit_recipe, overrides)
    from sfd_scale.encode import fit as run

    run(loaded)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder or one of its checkpoints; for .pt also an exported file.")],
    out: Annotated[
        Path | None, typer.Option(help="The file to write: .safetensors, or .pt in the format of the official code.")
    ] = None,
    hub_folder: Annotated[
        Path | None, typer.Option(help="Instead of --out: a folder for the Hugging Face hub, with a model card.")
    ] = None,
    weights: Annotated[Literal["ema", "params"], typer.Option(help="ema or params.")] = "ema",
    step: Annotated[int | None, typer.Option(help="The step of the checkpoint; default: the newest.")] = None,
    initial: Annotated[bool, typer.Option("--initial", help="Export the initial weights, before training.")] = False,
    ema_length: Annotated[
        float | None,
        typer.Option(help="Post-hoc EMA of this relative standard deviation; needs ema.lengths."),
    ] = None,
) -> None:
    """Export the EMA weights of a run as safetensors, with the recipe and statistics that sampling needs.

    With --out FILE.pt, write a file for the official code: weights, EMA weights and Adam's moments.
    """
    from sfd_scale import hub, official
    from sfd_scale.export import WeightsChoice
    from sfd_scale.export import export as export_run

    choice = WeightsChoice(weights=weights, step=step, initial=initial, ema_length=ema_length)
    if (out is None) == (hub_folder is None):
        raise ValueError("--out: a file to write, or --hub-folder in its place; give one of the two")
    if hub_folder is not None:
        hub.write_folder(run, hub_folder, choice)
    elif out is not None and out.suffix == ".pt":
        if weights != "ema" or initial or ema_length is not None:
            raise ValueError("--weights, --initial, --ema-length: not for .pt, which holds what the run has")
        official.export_official(run, out, step)
    elif out is not None:
        export_run(run, out, choice)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A checkpoint of the official code (.pt).")],
    recipe: Annotated[str | None, typer.Argument(help="Its training recipe; default: SFD of its size.")] = None,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The safetensors file to write, for evaluation.")] = None,
    run: Annotated[Path | None, typer.Option(help="The run folder to create; `sfd train` resumes from it.")] = None,
    stats: Annotated[
        list[Path] | None,
        typer.Option(
            help="Latent statistics: the official latents_stats.pt and latents_sv_stats.pt, or one .safetensors."
        ),
    ] = None,
    weights: Annotated[Literal["ema", "params"], typer.Option(help="ema or params, for --out.")] = "ema",
) -> None:
    """Import a checkpoint of the official code, without executing its pickle: as weights, or as a run to resume."""
    from sfd_scale import official

    if recipe is not None and config.is_override(recipe):  # an override; no recipe was named
        overrides, recipe = [recipe, *(overrides or ())], None
    if (out is None) == (run is None):
        raise ValueError("--out or --run: give one of them: a file for the weights, or a run folder to resume from")
    loaded = official.recipe_for(file, recipe, overrides or ())
    if out is not None:
        official.import_weights(file, out, loaded, stats=stats or (), weights=weights)
    else:
        assert run is not None
        official.import_run(file, run, loaded, stats=stats or ())


@app.command()
def sample(
    checkpoint: Annotated[Path, typer.Argument(help="A file of `sfd export`, or a folder of `--hub-folder`.")],
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("samples.png"),
    count: Annotated[int, typer.Option(min=1, help="How many images.")] = 16,
    label: Annotated[int | None, typer.Option(help="A class index; default: all classes in turn.")] = None,
    guidance: Annotated[
        float, typer.Option(help="Scale of classifier-free guidance, or of AutoGuidance with --guide; 1 is none.")
    ] = 1.0,
    guide: Annotated[
        Path | None, typer.Option(help="The guidance model (AutoGuidance), a file of `sfd export`.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the solver.")] = 50,
    solver: Annotated[
        Literal["euler", "midpoint", "heun2", "heun3", "rk4", "dopri5"],
        typer.Option(help="dopri5 chooses its own steps."),
    ] = "euler",
    grid: Annotated[int | None, typer.Option(min=1, help="Columns of the grid; default: a square.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Draw a grid of images from an exported checkpoint."""
    from sfd_scale.sample import sample_grid

    sample_grid(
        checkpoint, out, count=count, label=label, steps=steps, seed=seed, guidance=guidance, guide=guide,
        solver=solver, columns=grid,
    )  # fmt: skip


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    out: Annotated[Path | None, typer.Option(help="HTML file; default: report.html in the first run.")] = None,
    title: Annotated[str | None, typer.Option()] = None,
) -> None:
    """Write an HTML page about one or several runs: curves, scores, samples, recipes."""
    from eval import run_report

    run_report.write(runs, out, title)


@app.command()
def study(
    recipe: Recipe,
    overrides: Overrides = None,
    only: Annotated[
        list[str] | None, typer.Option(help="A run, such as sfd or 'lead*/seed0', or a sweep; can be repeated.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Parallel processes; they share the CPU cores.")] = 1,
    report: Annotated[bool, typer.Option("--report", help="Only write figures and tables of finished runs.")] = False,
) -> None:
    """Run a grid of small trainings and compare them. The same command resumes."""
    from eval.study import study as module
    from eval.study.recipe import StudyRecipe
    from eval.work.processes import run_in_parallel

    loaded = module.Study(config.load(recipe, StudyRecipe, overrides or ()))
    if not report and jobs > 1:
        patterns = [word for pattern in only or () for word in ("--only", pattern)]
        code = run_in_parallel(
            [sys.executable, "-m", "sfd_scale", "study", recipe, *(overrides or ()), *patterns], jobs
        )
        if code:
            sys.exit(code)
    elif not report and not module.run(loaded, only or ()):
        sys.exit(REQUEUE_EXIT_CODE)
    missing = module.report(loaded)
    typer.echo(f"missing: {', '.join(missing) or 'nothing'}; figures and tables: {loaded.recipe.out}/report")


@app.command()
def replicate(
    recipe: Recipe,
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds: the recipe's own and the next ones.")] = 3,
    vary: Annotated[str, typer.Option(help="The parts of the seed that vary: init, data, noise.")] = "init,data,noise",
    evaluate: Annotated[str | None, typer.Option(help="An evaluation recipe: scores every checkpoint.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Parallel processes; they share the CPU cores.")] = 1,
) -> None:
    """Train a recipe with several seeds: RUN.seed0, RUN.seed1, ... The same command resumes."""
    loaded = load_recipe(recipe, _train_recipe, overrides)
    from eval.comparison import replicate as module
    from eval.recipe import EvalRecipe
    from eval.work.processes import run_in_parallel

    todo = module.replicates(loaded, seeds, module.parse_vary(vary))
    evaluation = None if evaluate is None else config.load(evaluate, EvalRecipe)
    if jobs > 1:
        options = ["--seeds", str(seeds), "--vary", vary, *(["--evaluate", evaluate] if evaluate else [])]
        command = [sys.executable, "-m", "sfd_scale", "replicate", recipe, *(overrides or ()), *options]
        if code := run_in_parallel(command, jobs):
            sys.exit(code)
    elif not module.replicate(todo, evaluation, source=recipe):
        sys.exit(REQUEUE_EXIT_CODE)
    typer.echo("\n".join(str(each.run) for each in todo))


@app.command()
def plan(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE... [KEY=VALUE...]", help="Recipes and overrides.")],
    gpus: Annotated[list[str], typer.Option(help="Numbers of GPUs, such as 8,16; can be repeated.")],
    gpu: Annotated[str, typer.Option(help="GPU model: a100, h100, h200, b200, ...")] = "h100",
    gpu_spec: Annotated[Path | None, typer.Option(help="A YAML file that describes another GPU.")] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1)] = 8,
    network: Annotated[
        float | None, typer.Option(help="GB/s between nodes, per GPU and direction; default: 50 (400 Gb/s) or 25.")
    ] = None,
    mfu: Annotated[float | None, typer.Option(help="MFU from 0 to 1, in place of the time model.")] = None,
    measured: Annotated[
        Path | None, typer.Option(help="Calibrate by a run's metrics.jsonl, gpu-bench's results, or JSON with `mfu`.")
    ] = None,
    best: Annotated[
        bool, typer.Option("--best", help="Search engine, micro-batch, checkpointing, compile: fastest and cheapest.")
    ] = False,
    price: Annotated[float | None, typer.Option(min=0, help="Of one GPU-hour, for costs with --best.")] = None,
    mtbf: Annotated[
        float | None, typer.Option(min=1, help="Hours between failures of one GPU, for --best; default: 50,700.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw days, memory and time by part into this PNG.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the table as an HTML page.")] = None,
    constants: Annotated[bool, typer.Option("--constants", help="Print the constants of the time too.")] = False,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Dataset size, if it is not here; default: ImageNet.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
) -> None:
    """Estimate memory, time and cost of a training recipe on N GPUs."""
    from sfd_scale import plan as plans

    names, overrides = config.split_words(recipes)
    machine, counts = plans.make_machine(gpu, gpu_spec, gpus_per_node, network), plans.parse_counts(gpus)
    if best:
        if len(names) != 1:
            raise ValueError(f"--best: {len(names)} recipes; allowed: one")
        advised = plans.best(
            names[0], overrides, counts, machine, measured=measured, price=price, gpu_mtbf_hours=mtbf
        )  # fmt: skip
        for part in plans.advice_text(advised, gpus_per_node, markdown):
            typer.echo(f"{part}\n") if isinstance(part, str) else plain_console().print(part)
        return
    made = plans.make(
        names, overrides, counts, machine, mfu=mfu, measured=measured, samples=samples
    )  # fmt: skip
    plans.write_pictures(made, machine, plot, html)
    out = plans.table(made, machine, markdown)
    typer.echo(out) if isinstance(out, str) else plain_console().print(out)
    if constants:
        plain_console().print(plans.constants(made[0].calibrated.machine))


@app.command()
def show(recipe: Recipe, overrides: Overrides = None) -> None:
    """Print a resolved recipe: every setting with its value."""
    with inert_imports():
        from eval.recipes import load_any

        typer.echo(config.to_yaml(load_any(recipe, overrides or ())), nl=False)


@app.command()
def diff(
    recipe: Recipe,
    others: Annotated[
        list[str],
        typer.Argument(
            metavar="[RECIPE] [KEY=VALUE...]",
            help="The recipe to compare with, by default the same one, and settings that override it.",
            autocompletion=complete_recipe,
        ),
    ],
) -> None:
    """Print the settings in which two resolved recipes differ: one dotted key per line, with both values."""
    with inert_imports():
        from eval.recipes import compare

        table = compare(recipe, others)
    if table is None:
        typer.echo("no difference")
    else:
        _print_table(table)


@app.command()
def recipes(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[WORD...]", help="Only recipes whose line contains all words.")
    ] = None,
) -> None:
    """List the recipes: kind, model, engine, global batch and published number."""
    with inert_imports():
        from eval.recipes import summary_table

        table = summary_table(words or ())
    _print_table(table)


def _print_table(table: rich.table.Table) -> None:
    # Wider than any row: a row stays one line, in a narrow terminal and in a pipe to grep.
    plain_console(width=1000).print(table)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def launch(
    context: typer.Context,
    launcher: Annotated[str, typer.Option(help="deepspeed, torchrun, or auto.")] = "auto",
    module: Annotated[str, typer.Option(help="The module that the ranks run: sfd_scale or eval.")] = "sfd_scale",
) -> None:
    """Start a command on many ranks: `sfd launch train RECIPE ...`, `sfd launch eval generate RECIPE ...`.

    Set RANKS or HOSTFILE, or use a scheduler.
    """
    from sfd_scale.launch.__main__ import launch as start

    sys.exit(start(launcher, module, context.args))


@app.command()
def doctor(
    recipe: Annotated[str | None, typer.Argument(help="Also say what is slow in this recipe on this machine.")] = None,
    overrides: Overrides = None,
) -> None:
    """Check versions, accelerator, kernels, network, limits and disk. Exit code 1 if a check fails."""
    from sfd_scale.doctor import Finding, examine

    found = examine()
    if recipe is not None:
        from eval.recipes import slow_settings

        slow = slow_settings(recipe, overrides or ())
        found += [Finding("warning", f"speed of {recipe}", text) for text in slow]
        found += [] if slow else [Finding("ok", f"speed of {recipe}", "no setting is known to be slow here")]
    for finding in found:
        style = {"ok": "green", "warning": "yellow", "error": "bold red"}[finding.level]
        rich.get_console().print(
            f"[{style}]{finding.level:>7}[/]  {escape(f'{finding.subject}: {finding.text}')}", soft_wrap=True
        )
    sys.exit(1 if any(finding.level == "error" for finding in found) else 0)


@app.command()
def check(
    recipe: Recipe,
    overrides: Overrides = None,
    *,
    checkpoint: Annotated[Path, typer.Option(help="A run folder, one of its checkpoints, or an exported file.")],
    samples: Annotated[int, typer.Option(min=1, help="Number of samples of the dataset.")] = 2048,
) -> None:
    """Check that a checkpoint belongs to a recipe's data: compare its loss by time with that of the training."""
    loaded = load_recipe(recipe, _train_recipe, overrides)
    from sfd_scale.check import check_checkpoint

    found = check_checkpoint(loaded, checkpoint, samples)
    plain_console().print(found.table())
    if found.recorded_stats_hash not in (None, found.stats_hash):
        typer.echo(f"statistics: data {found.stats_hash}, checkpoint {found.recorded_stats_hash}")
    verdict = {
        True: "belongs to this data",
        False: "DOES NOT BELONG to this data",
        None: "has no recorded loss to compare with",
    }
    typer.echo(f"{checkpoint}: {verdict[found.belongs]}")
    sys.exit(1 if found.belongs is False else 0)


@app.command("check-features")
def check_features(
    recipe: Recipe,
    overrides: Overrides = None,
    *,
    samples: Annotated[int, typer.Option(min=1, help="Number of samples of the dataset.")] = 2048,
) -> None:
    """Measure `data.features=decoded` on a training recipe's data: cosine similarity to the true features."""
    loaded = load_recipe(recipe, _train_recipe, overrides)
    from sfd_scale.check import decoded_cosine

    mean, low = decoded_cosine(loaded, samples)
    typer.echo(f"cosine similarity of decoded and true features: mean {mean:.4f}, 1st percentile {low:.4f}")


@app.command("check-data")
def check_data(path: Annotated[Path, typer.Argument(help="A folder of shards.")]) -> None:
    """Verify the size and hash of every shard."""
    from sfd_scale.data.shards import check_data as check
    from sfd_scale.data.shards import without_hash

    bad = check(path)
    if count := without_hash(path):
        typer.echo(f"{path}: {count} shards have no SHA-256 in index.json; only their size was checked", err=True)
    for line in bad:
        typer.echo(line, err=True)
    typer.echo(f"{path}: {'all shards are complete' if not bad else f'{len(bad)} shards are damaged'}")
    sys.exit(1 if bad else 0)


@app.command("import-data")
def import_data(
    path: Annotated[Path, typer.Argument(help="A folder of MDS shards that another program wrote.")],
    image_size: Annotated[int, typer.Option(min=1, help="Width of the images in pixels.")] = 256,
    num_classes: Annotated[int | None, typer.Option(min=1, help="Default: the highest label and one.")] = None,
) -> None:
    """Make MDS shards of another program readable: write their manifest and latent statistics beside them."""
    from sfd_scale.data.import_mds import import_data as run

    manifest = run(path, image_size, num_classes)
    typer.echo(f"{path}: {manifest.num_samples} samples of {manifest.num_classes} classes, {list(manifest.columns)}")


def main(command: str | None = None) -> None:
    """The console script `sfd`. The file of a command gives its name: `python -m sfd_scale.train` is `sfd train`."""
    run_command(app, None if command is None else "sfd", command)


if __name__ == "__main__":
    main()
