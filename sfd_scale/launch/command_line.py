"""What the command lines `sfd` and `python -m eval` share: their arguments, and what becomes of an error."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import Annotated, TypeVar

import typer
from rich.markup import escape

from sfd_scale import config
from sfd_scale.launch.check import CHECK_ONLY, CHECK_WAIT_S, CHECKED
from sfd_scale.runtime import distributed
from sfd_scale.runtime.logging import console, setup_logging
from sfd_scale.runtime.signals import REQUEUE_EXIT_CODE

T = TypeVar("T")
Recipe = Annotated[str, typer.Argument(help="A recipe's name (see `sfd recipes`) or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Settings of the recipe to change.")
]


def load_recipe(recipe: str, cls: type[T], overrides: Sequence[str] | None) -> T:
    """Load the typed recipe of a command. Exit with code 0 where a launcher only asks whether the recipe is valid."""
    try:
        loaded = config.load(recipe, cls, overrides or ())
    except config.ConfigError:
        if CHECKED in os.environ:
            time.sleep(CHECK_WAIT_S)  # the launcher prints the error and ends this process
        raise
    if CHECK_ONLY in os.environ:
        raise typer.Exit
    return loaded


def run_command(command_line: typer.Typer) -> None:
    """Run a command; a mistake of the user is one sentence, not a traceback (SFD_DEBUG=1 shows it).

    A rank that fails leaves the process group as it is: to tear it down it would wait for the others, which may wait
    for this one.
    """
    setup_logging()
    try:
        command_line()
    except SystemExit as end:
        if end.code in (0, None, REQUEUE_EXIT_CODE):
            distributed.shutdown()
        raise
    except ModuleNotFoundError as error:
        if "SFD_DEBUG" in os.environ or (error.name or "").split(".")[0] != "eval":
            raise
        _fail("the evaluation harness is not installed; run this in a checkout of sfd-scale")
    except (ValueError, FloatingPointError, OSError) as error:
        if "SFD_DEBUG" in os.environ:
            raise
        _fail(str(error))


def _fail(message: str) -> None:
    rank = f"[rank {os.environ['RANK']}] " if distributed.launched() else ""
    console.print(f"[bold red]error:[/] {escape(f'{rank}{message}')}", highlight=False, soft_wrap=True)
    sys.exit(2)
