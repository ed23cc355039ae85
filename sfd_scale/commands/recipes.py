"""Commands that read recipes and the machine: `sfd show`, `diff`, `recipes`, `plan`, `doctor`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import rich
import rich.table
import typer
from rich.markup import escape

from sfd_scale import config
from sfd_scale.launch.command_line import Overrides, Recipe, complete_recipe
from sfd_scale.runtime.inert_imports import inert_imports
from sfd_scale.runtime.output import plain_console

app = typer.Typer()


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
    names, overrides = config.split_words(recipes)
    with inert_imports():  # a mistake is reported before torch is imported
        from sfd_scale import plan as plans
        from sfd_scale.recipe import TrainRecipe

        plans.make_machine(gpu, gpu_spec, gpus_per_node, network)
        plans.parse_counts(gpus)
        for name in names:
            config.load(name, TrainRecipe, overrides)
    from sfd_scale import plan as plans

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
def doctor(
    recipe: Annotated[str | None, typer.Argument(help="Also say what is slow in this recipe on this machine.")] = None,
    overrides: Overrides = None,
) -> None:
    """Check versions, accelerator, kernels, network, limits and disk. Exit code 1 if a check fails."""
    if recipe is not None:
        with inert_imports():  # a mistake is reported before torch is imported
            from eval.recipes import load_any

            load_any(recipe, overrides or ())
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


def _print_table(table: rich.table.Table) -> None:
    # Wider than any row: a row stays one line, in a narrow terminal and in a pipe to grep.
    plain_console(width=1000).print(table)
