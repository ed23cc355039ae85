"""The command line: `sfd COMMAND RECIPE [key=value ...]`, the same under any launcher (`python -m sfd_scale`)."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path
from typing import Annotated, Literal

import rich
import rich.console
import typer
from rich.markup import escape

from sfd_scale import config
from sfd_scale.launch.command_line import Overrides, Recipe, load_recipe, run_command
from sfd_scale.runtime.signals import REQUEUE_EXIT_CODE

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=escape(__doc__))


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    run: Annotated[Path | None, typer.Option(help="Run folder.")] = None,
    allow_foreign: Annotated[
        bool, typer.Option("--allow-foreign", help="Go on from checkpoints of another recipe.")
    ] = False,
) -> None:
    """Train a model. The same command on the same run folder resumes."""
    from sfd_scale.recipe import TrainRecipe

    loaded = load_recipe(recipe, TrainRecipe, overrides)
    from sfd_scale.train import train as run_training

    if not run_training(loaded, run or loaded.run, allow_foreign, source=recipe):
        sys.exit(REQUEUE_EXIT_CODE)


@app.command()
def encode(recipe: Recipe, overrides: Overrides = None) -> None:
    """Encode images to shards (pixels, composite latents, features). A second start continues the first."""
    from sfd_scale.recipe import EncodeRecipe

    loaded = load_recipe(recipe, EncodeRecipe, overrides)
    from sfd_scale.encode import encode as run

    run(loaded)


@app.command()
def convert(recipe: Recipe, overrides: Overrides = None) -> None:
    """Convert the authors' feature files (safetensors) to shards, verified by count and checksum."""
    from sfd_scale.recipe import ConvertRecipe

    loaded = load_recipe(recipe, ConvertRecipe, overrides)
    from sfd_scale.encode import convert as run

    run(loaded)


@app.command()
def fit(recipe: Recipe, overrides: Overrides = None) -> None:
    """Fit a closed-form codec (patch PCA, PCA of features) to images."""
    from sfd_scale.recipe import FitRecipe

    loaded = load_recipe(recipe, FitRecipe, overrides)
    from sfd_scale.encode import fit as run

    run(loaded)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder, or one checkpoint of it; for .pt an export too.")],
    out: Annotated[
        Path | None, typer.Option(help="The file to write: .safetensors, or .pt in the authors' format.")
    ] = None,
    hub_folder: Annotated[
        Path | None, typer.Option(help="In its place, a folder for the Hugging Face hub, with a model card.")
    ] = None,
    weights: Annotated[Literal["ema", "params"], typer.Option(help="ema or params.")] = "ema",
    step: Annotated[int | None, typer.Option(help="A step; the newest by default.")] = None,
    initial: Annotated[
        bool, typer.Option("--initial", help="The untrained weights that the run started from.")
    ] = False,
    ema_length: Annotated[
        float | None, typer.Option(help="Average of this relative standard deviation, from a run with ema.lengths.")
    ] = None,
) -> None:
    """Write the EMA weights of a run as safetensors, with all that sampling needs to know.

    A name that ends in .pt gives a file for the authors' code: both sets of weights and Adam's moments.
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
    file: Annotated[Path, typer.Argument(help="A checkpoint of the authors (.pt).")],
    recipe: Annotated[str | None, typer.Argument(help="What it was trained by; by default SFD of its size.")] = None,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The safetensors file to write, for evaluation.")] = None,
    run: Annotated[Path | None, typer.Option(help="The run folder to make, which `sfd train` goes on from.")] = None,
    stats: Annotated[
        list[Path] | None,
        typer.Option(
            help="The authors' latents_stats.pt, then again latents_sv_stats.pt; or one .safetensors of ours."
        ),
    ] = None,
    weights: Annotated[Literal["ema", "params"], typer.Option(help="ema or params, for --out.")] = "ema",
) -> None:
    """Read a checkpoint of the authors, without running what is pickled in it: weights to sample, or a run to go on."""
    from sfd_scale import official

    if recipe is not None and "=" in recipe:  # an override; no recipe was named
        overrides, recipe = [recipe, *(overrides or ())], None
    if (out is None) == (run is None):
        raise ValueError("--out or --run: one of them; a file of weights, or a run folder to train on")
    loaded = official.recipe_for(file, recipe, overrides or ())
    if out is not None:
        official.import_weights(file, out, loaded, stats=stats or (), weights=weights)
    else:
        assert run is not None
        official.import_run(file, run, loaded, stats=stats or ())


@app.command()
def sample(
    checkpoint: Annotated[Path, typer.Argument(help="A file from `sfd export`.")],
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("samples.png"),
    count: Annotated[int, typer.Option(min=1, help="How many images.")] = 16,
    label: Annotated[int | None, typer.Option(help="One class; by default the classes in turn.")] = None,
    steps: Annotated[int, typer.Option(help="Euler steps.")] = 50,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Draw a grid of images from an exported checkpoint."""
    from sfd_scale.sample import sample_grid

    sample_grid(checkpoint, out, count=count, label=label, steps=steps, seed=seed)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    out: Annotated[Path | None, typer.Option(help="The page; report.html in the first folder by default.")] = None,
    title: Annotated[str | None, typer.Option()] = None,
) -> None:
    """Write one HTML page about one run or several: curves, scores, samples, recipes."""
    from eval import run_report

    run_report.write(runs, out, title)


@app.command()
def study(
    recipe: Recipe,
    overrides: Overrides = None,
    only: Annotated[
        list[str] | None, typer.Option(help="A cell, such as sfd or 'lead*/seed0', or a sweep; several times for more.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes beside each other, with the cores shared out.")] = 1,
    report: Annotated[bool, typer.Option("--report", help="Only figures and tables, of what is there.")] = False,
) -> None:
    """Run a grid of small trainings and show how they compare. A second start does what is missing."""
    from eval.study import study as module
    from eval.study.recipe import StudyRecipe
    from eval.work.processes import run_beside

    loaded = module.Study(config.load(recipe, StudyRecipe, overrides or ()))
    if not report and jobs > 1:
        patterns = [word for pattern in only or () for word in ("--only", pattern)]
        code = run_beside([sys.executable, "-m", "sfd_scale", "study", recipe, *(overrides or ()), *patterns], jobs)
        if code:
            sys.exit(code)
    elif not report and not module.run(loaded, only or ()):
        sys.exit(REQUEUE_EXIT_CODE)
    missing = module.report(loaded)
    typer.echo(f"missing: {', '.join(missing) or 'nothing'}; figures and tables: {loaded.recipe.out}/report")


@app.command()
def plan(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE... [KEY=VALUE...]", help="Recipes and overrides.")],
    gpus: Annotated[list[int], typer.Option(help="How many; several times for a table.")],
    gpu: Annotated[str, typer.Option(help="Which: a100, h100, h200, b200, ...")] = "h100",
    gpus_per_node: Annotated[int, typer.Option(min=1)] = 8,
    mfu: Annotated[float | None, typer.Option(help="Use of the peak FLOP/s that is assumed.")] = None,
    measured: Annotated[Path | None, typer.Option(help="Take it from a run's metrics.jsonl, or from a JSON.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Of the data, if it is not here; else ImageNet's.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="A table to paste.")] = False,
) -> None:
    """Memory, time and cost of a recipe on N GPUs, before anything is started."""
    from sfd_scale import plan as plans

    names, overrides = [r for r in recipes if "=" not in r], [r for r in recipes if "=" in r]
    made = plans.make(
        names, overrides, gpus, gpu, gpus_per_node=gpus_per_node, mfu=mfu, measured=measured, samples=samples
    )
    out = plans.table(made, gpu, markdown)
    typer.echo(out) if isinstance(out, str) else rich.print(out)


@app.command()
def show(recipe: Recipe, overrides: Overrides = None) -> None:
    """Print a recipe, resolved: every setting with its value."""
    from eval.recipes import load_any

    typer.echo(config.to_yaml(load_any(recipe, overrides or ())), nl=False)


@app.command()
def diff(a: Recipe, b: Recipe) -> None:
    """Print the settings in which two resolved recipes differ."""
    from eval.recipes import load_any

    left, right = (config.to_yaml(load_any(name)).splitlines() for name in (a, b))
    for line in difflib.unified_diff(left, right, a, b, lineterm="", n=1):
        typer.echo(line)


@app.command()
def recipes() -> None:
    """List the recipes that a command can be given by name."""
    from eval.recipes import summary_table

    # Wider than any row: a row stays one line, in a narrow terminal and in a pipe to grep.
    rich.console.Console(width=1000).print(summary_table())


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def launch(
    context: typer.Context,
    launcher: Annotated[str, typer.Option(help="deepspeed, torchrun, or auto.")] = "auto",
    module: Annotated[str, typer.Option(help="What runs in the ranks: sfd_scale, or eval.")] = "sfd_scale",
) -> None:
    """Start a command on many ranks: `sfd launch train RECIPE ...`, by RANKS or HOSTFILE or a scheduler's variables."""
    from sfd_scale.launch.__main__ import launch as start

    sys.exit(start(launcher, module, context.args))


@app.command()
def doctor() -> None:
    """Look at versions, accelerator, kernels, network, limits and disk; exit code 1 where something does not work."""
    from sfd_scale.doctor import examine

    found = examine()
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
    checkpoint: Annotated[Path, typer.Option(help="A run folder, a checkpoint of one, or a file of `sfd export`.")],
    samples: Annotated[int, typer.Option(min=1, help="How many samples of the data.")] = 2048,
) -> None:
    """Does a checkpoint belong to the data of a recipe? Its loss by the clock, beside what training recorded."""
    from sfd_scale.check import check_checkpoint
    from sfd_scale.recipe import TrainRecipe

    found = check_checkpoint(config.load(recipe, TrainRecipe, overrides or ()), checkpoint, samples)
    rich.print(found.table())
    if found.recorded_stats_hash not in (None, found.stats_hash):
        typer.echo(f"statistics of the data {found.stats_hash}, of the checkpoint {found.recorded_stats_hash}")
    verdict = {
        True: "belongs to this data",
        False: "DOES NOT BELONG to this data",
        None: "records nothing to compare with",
    }
    typer.echo(f"{checkpoint}: {verdict[found.belongs]}")
    sys.exit(1 if found.belongs is False else 0)


@app.command("check-features")
def check_features(
    recipe: Recipe,
    overrides: Overrides = None,
    *,
    samples: Annotated[int, typer.Option(min=1, help="How many samples of the data.")] = 2048,
) -> None:
    """How close `data.features=decoded` is on the data of a training recipe: cosine to the true features."""
    from sfd_scale.check import decoded_cosine
    from sfd_scale.recipe import TrainRecipe

    mean, low = decoded_cosine(config.load(recipe, TrainRecipe, overrides or ()), samples)
    typer.echo(f"cosine of decoded to true features: {mean:.4f} over all tokens, 1st percentile {low:.4f}")


@app.command("check-data")
def check_data(path: Annotated[Path, typer.Argument(help="A folder of shards.")]) -> None:
    """Verify the size and hash of every shard."""
    from sfd_scale.data.shards import check_data as check

    bad = check(path)
    for line in bad:
        typer.echo(line, err=True)
    typer.echo(f"{path}: {'all shards are whole' if not bad else f'{len(bad)} shards are damaged'}")
    sys.exit(1 if bad else 0)


def main() -> None:
    """The console script `sfd`."""
    # The evaluation harness stands in the checkout; `python -m` finds it there, the console script would not.
    sys.path.append(str(config.RECIPE_ROOT.parent))
    run_command(app)


if __name__ == "__main__":
    main()
