"""The command line: `sfd COMMAND RECIPE [key=value ...]`, or `python -m sfd_scale COMMAND ...` under a launcher."""

from __future__ import annotations

import importlib.metadata
import sys
from typing import Annotated

import typer
from rich.markup import escape

from sfd_scale import config
from sfd_scale.commands import data, models, recipes, training
from sfd_scale.launch.command_line import run_command

# The console script does not search the checkout, where the package `eval` is; `python -m` does.
if config.CHECKOUT is not None:
    sys.path.append(str(config.CHECKOUT))

from eval.__main__ import app as evaluation

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=escape(__doc__))
for part in (data.app, training.app, models.app, recipes.app):
    app.registered_commands += part.registered_commands
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


def main(command: str | None = None) -> None:
    """The console script `sfd`. The file of a command gives its name: `python -m sfd_scale.train` is `sfd train`."""
    run_command(app, None if command is None else "sfd", command)


if __name__ == "__main__":
    main()
