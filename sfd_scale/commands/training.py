"""Commands for training runs: `sfd train`, `check`, `check-features`, `report`, `study`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sfd_scale import config
from sfd_scale.launch.command_line import Overrides, Recipe, load_recipe
from sfd_scale.runtime import environment
from sfd_scale.runtime.output import plain_console
from sfd_scale.runtime.signals import REQUEUE_EXIT_CODE

if TYPE_CHECKING:
    from eval.study.recipe import StudyRecipe
    from sfd_scale.recipe import TrainRecipe

app = typer.Typer()


def _train_recipe() -> type[TrainRecipe]:
    from sfd_scale.recipe import TrainRecipe

    return TrainRecipe


def _study_recipe() -> type[StudyRecipe]:
    from eval.study.recipe import StudyRecipe

    return StudyRecipe


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
    environment.check_alone()
    from sfd_scale.train import train as run_training

    if not run_training(loaded, run or loaded.run, allow_foreign, source=recipe):
        sys.exit(REQUEUE_EXIT_CODE)


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
    settings = load_recipe(recipe, _study_recipe, overrides)
    from eval.study import study as module
    from eval.work.processes import run_in_parallel

    loaded = module.Study(settings)
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
