"""Evaluation: `sfd eval COMMAND`; in a checkout also `python -m eval COMMAND`. Ranks of a launcher share the work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer
from rich.table import Table

from sfd_scale import config
from sfd_scale.launch.command_line import Overrides, Recipe, load_recipe, run_command
from sfd_scale.runtime.output import plain_console

if TYPE_CHECKING:
    from eval.recipe import EvalRecipe

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

# At the end, all ranks wait for the last chunks of the slowest one.
TIMEOUT_S = 3600.0
Checkpoint = Annotated[Path | None, typer.Option(help="A file of `sfd export`; by default the recipe's.")]
Guide = Annotated[
    Path | None,
    typer.Option(help="The guidance model (AutoGuidance), a file of `sfd export`; by default the recipe's."),
]
Out = Annotated[Path, typer.Option(help="Where to write.")]
Number = TypeVar("Number", int, float)


def _load(
    recipe: str, overrides: list[str] | None, checkpoint: Path | None = None, guide: Path | None = None
) -> EvalRecipe:
    given = {"checkpoint": checkpoint, "guide": guide}
    paths = [config.override(key, path) for key, path in given.items() if path is not None]
    return load_recipe(recipe, _eval_recipe, [*(overrides or []), *paths])


def _eval_recipe() -> type[EvalRecipe]:
    from eval.recipe import EvalRecipe

    return EvalRecipe


def _start_ranks() -> bool:
    """Start the process group, if a launcher started this process; whether this is the first rank."""
    from sfd_scale.runtime import distributed  # here: it imports torch

    distributed.init(TIMEOUT_S)
    return distributed.is_main()


def _numbers(option: str, text: str, kind: type[Number]) -> list[Number]:
    """Numbers between commas."""
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option}: {text}; allowed: numbers between commas") from error


@app.command()
def generate(
    recipe: Recipe, out: Out, overrides: Overrides = None, checkpoint: Checkpoint = None, guide: Guide = None
) -> None:
    """Draw images and store their features. A second start continues, on any number of ranks."""
    loaded = _load(recipe, overrides, checkpoint, guide)
    from eval.generate import generate as run

    _start_ranks()
    run(loaded, out)


@app.command()
def score(
    recipe: Recipe,
    samples: Annotated[Path, typer.Option(help="A folder of `generate`, an .npz, or a folder of images.")],
    out: Annotated[Path | None, typer.Option(help="The results.json to write; beside the samples by default.")] = None,
    overrides: Overrides = None,
    *,
    compat: Annotated[
        Literal["adm"] | None, typer.Option(help="adm: the matrix root and the float16 distances of ADM's evaluator.")
    ] = None,
    prc_fp16: Annotated[
        bool, typer.Option("--prc-fp16", help="Only the float16 distances of ADM's evaluator.")
    ] = False,
) -> None:
    """Score samples against the recipe's reference: FID, sFID, IS, precision, recall, KID."""
    like_adm = ["metrics.frechet=sqrtm"] if compat == "adm" else []
    like_adm += ["metrics.distances=float16"] if compat == "adm" or prc_fp16 else []
    loaded = _load(recipe, [*(overrides or []), *like_adm])
    from eval.results import further_key
    from eval.score import default_out
    from eval.score import score as run

    main_rank = _start_ranks()
    results = run(loaded, samples, default_out(samples) if out is None else out)
    if main_rank:
        table = Table("score", "value", title=f"{results.name}, {results.count} samples")
        for name, value in results.scores.by_key().items():
            table.add_row(name, "–" if value is None else f"{value:.6g}")
        for extractor, representation in results.representations.items():
            for name, value in representation.scores.by_key().items():
                if value is not None:
                    table.add_row(further_key(name, extractor), f"{value:.6g}")
        plain_console().print(table)


@app.command()
def reference(recipe: Recipe, overrides: Overrides = None) -> None:
    """Compute and cache the features and moments of the recipe's reference, for each extractor."""
    loaded = _load(recipe, overrides)
    from eval.features.make import make_extractor
    from eval.reference import load_judges, load_reference
    from sfd_scale.runtime import distributed

    main_rank = _start_ranks()
    found = load_reference(loaded, make_extractor(loaded.extractor, distributed.device()))
    judges = load_judges(loaded, distributed.device())
    if main_rank:
        plain_console().print(found.provenance)
        for judge in judges.values():
            plain_console().print(judge.reference.provenance)


@app.command()
def validation(
    recipe: Recipe,
    images: Annotated[Path, typer.Option(help="The validation set: an .npz, a folder of images, or shards.")],
    out: Annotated[Path, typer.Option(help="The file to write; the recipe names it under `validation`.")],
    overrides: Overrides = None,
) -> None:
    """Measure FD of validation images against the reference, for each extractor: the unit of FDr."""
    loaded = _load(recipe, overrides)
    from eval.validation import measure

    main_rank = _start_ranks()
    found = measure(loaded, images, out)
    if main_rank:
        table = Table("extractor", "FD of the validation set")
        for name, value in found.items():
            table.add_row(name, f"{value:.6g}")
        plain_console().print(table)


@app.command()
def report(
    result: Annotated[list[Path], typer.Option(help="A results.json; repeat the option for several.")],
    out: Out,
    run: Annotated[
        list[Path] | None, typer.Option(help="A run folder whose loss curves to show; repeat the option for several.")
    ] = None,
    title: Annotated[str, typer.Option()] = "Evaluation",
) -> None:
    """Write an HTML page and a Markdown file about several results."""
    from eval.report import report as write

    write(result, out, runs=run or [], title=title)


@app.command()
def sweep(
    recipe: Recipe,
    grid: Annotated[
        list[str], typer.Argument(metavar="KEY=V1,V2...", help="Settings to vary; KEY=VALUE sets one for all.")
    ],
    out: Out,
) -> None:
    """Generate and score every combination of settings with the same noise and labels. A second start continues."""
    from eval.search.sweep import sweep as run

    _start_ranks()
    run(recipe, grid, out)


@app.command()
def solvers(
    recipe: Recipe,
    out: Out,
    overrides: Overrides = None,
    checkpoint: Checkpoint = None,
    guide: Guide = None,
    budgets: Annotated[str, typer.Option(help="Evaluations per image, such as 8,12,20,40.")] = "8,12,20,40",
    tolerance: Annotated[float, typer.Option(help="How much worse FID may be: 0.01 is 1%.")] = 0.01,
) -> None:
    """Draw the same images with every solver: error and FID over evaluations, and the cheapest good one."""
    loaded = _load(recipe, overrides, checkpoint, guide)
    from eval.search.solvers import solvers as run

    _start_ranks()
    run(loaded, out, budgets=_numbers("--budgets", budgets, int), tolerance=tolerance)


@app.command()
def guide(
    recipe: Recipe,
    out: Out,
    overrides: Overrides = None,
    checkpoint: Checkpoint = None,
    guide: Guide = None,
    scales: Annotated[str, typer.Option(help="Scales to try for each part; 1 leaves it unguided.")] = "1,1.25,1.5,2",
    edges: Annotated[str, typer.Option(help="Times of a part's clock where an interval may begin or end.")] = "0.2,0.4",
    few: Annotated[int, typer.Option(help="Samples of each setting in the search.")] = 1000,
    confirm: Annotated[int, typer.Option(help="The best settings to confirm with the recipe's samples.")] = 3,
    by: Annotated[str, typer.Option(help="The score that decides.")] = "fid",
) -> None:
    """Search scales and intervals of the recipe's guidance, cheap first; confirm the best with fresh noise."""
    loaded = _load(recipe, overrides, checkpoint, guide)
    from eval.search.guide import guide as run

    _start_ranks()
    run(
        loaded, out, scales=_numbers("--scales", scales, float), edges=_numbers("--edges", edges, float), few=few,
        confirm=confirm, by=by,
    )  # fmt: skip


@app.command()
def compare(
    results: Annotated[
        list[str],
        typer.Argument(
            metavar="A [...] [against] B [...]",
            help="A results.json, its folder, an evaluated run, or a pattern; several on each side of `against`.",
        ),
    ],
    rounds: Annotated[int, typer.Option(min=1, help="Bootstrap rounds.")] = 2000,
    replicates: Annotated[
        list[str] | None,
        typer.Option(help="Trainings of one recipe with several seeds, by whose spread one training each is judged."),
    ] = None,
    gap: Annotated[
        float | None, typer.Option(help="In percent of A: how many seeds would find it. Default: the difference.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A JSON file to write.")] = None,
) -> None:
    """Show whether two results or groups of trainings differ: the difference of each score, with an interval."""
    from eval.comparison.compare import compare as run
    from eval.comparison.groups import split_sides

    _start_ranks()  # ranks share the nearest-neighbour search
    a, b = split_sides(results)
    run(a, b, rounds=rounds, replicates=replicates or (), gap=None if gap is None else gap / 100, out=out)


@app.command()
def verify(
    result: Annotated[Path, typer.Argument(help="A results.json, or its folder.")],
    checkpoint: Annotated[Path | None, typer.Option(help="The weights; default: the recorded path.")] = None,
    guide: Annotated[Path | None, typer.Option(help="The guidance model, where the result has one.")] = None,
    labels: Annotated[Path | None, typer.Option(help="The file of labels, where the result has one.")] = None,
) -> None:
    """Draw a few images of a result again, and say whether they are the same. Ends with 1 if they are not."""
    from eval.comparison.verify import verify as run

    _start_ranks()
    if not run(result, checkpoint=checkpoint, guide=guide, labels=labels).same:
        raise typer.Exit(1)


@app.command()
def watch(
    recipe: Recipe,
    run: Annotated[Path, typer.Option(help="The run folder.")],
    out: Annotated[Path | None, typer.Option(help="Where to write; by default evaluations/ in the run folder.")] = None,
    overrides: Overrides = None,
    interval: Annotated[float, typer.Option(help="Seconds between two looks at the run folder.")] = 60.0,
    once: Annotated[bool, typer.Option("--once", help="Evaluate the checkpoints that exist, then stop.")] = False,
    ep_fid: Annotated[
        list[float] | None,
        typer.Option(help="Report the epochs until the unguided FID is this or less; repeat the option for several."),
    ] = None,
) -> None:
    """Evaluate every new checkpoint of a run until its last step."""
    from eval.watch import watch as follow

    loaded = _load(recipe, overrides)
    _start_ranks()
    follow(loaded, run, out, interval=interval, once=once, fid_targets=ep_fid or ())


def main(command: str | None = None) -> None:
    """The command line. The file of a command gives its name: `python -m eval.score` is `python -m eval score`."""
    run_command(app, None if command is None else "python -m eval", command)


if __name__ == "__main__":
    main()
