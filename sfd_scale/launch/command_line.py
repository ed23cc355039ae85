"""Shared by the command lines `sfd` and `python -m eval`: arguments, recipe loading, and error output."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar

import typer
from rich.text import Text

from sfd_scale import config
from sfd_scale.launch.check import CHECK_ONLY, CHECK_WAIT_S, CHECKED
from sfd_scale.runtime import environment, output
from sfd_scale.runtime.caches import use_writable_caches
from sfd_scale.runtime.errors import error_text, require_folder
from sfd_scale.runtime.inert_imports import inert_imports
from sfd_scale.runtime.logging import console, setup_logging
from sfd_scale.runtime.signals import REQUEUE_EXIT_CODE, interruptible

T = TypeVar("T")


def complete_recipe(incomplete: str) -> list[str]:
    """The recipe names that start with a word: for the completion of the shell."""
    return [name for name in config.recipe_names() if name.startswith(incomplete)]


Recipe = Annotated[
    str,
    typer.Argument(help="The name of a recipe (see `sfd recipes`), or a YAML file.", autocompletion=complete_recipe),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Settings that override the recipe.")
]


def load_recipe(recipe: str, cls: Callable[[], type[T]], overrides: Sequence[str] | None) -> T:
    """Load the typed recipe of a command. Exit with code 0 if a launcher only checks the recipe (launch/check.py).

    Args:
        cls: imports the class of the recipe and returns it. A process without a launcher reads the recipe first with
            inert imports: a mistake in it is reported before torch is imported.
    """
    try:
        if not environment.launched():
            with inert_imports():
                config.load(recipe, cls(), overrides or ())
        if environment.flag(CHECK_ONLY):
            raise typer.Exit
        return config.load(recipe, cls(), overrides or ())
    except config.ConfigError:
        if environment.flag(CHECKED):
            time.sleep(CHECK_WAIT_S)  # the launcher prints the error and kills this process
        raise


def run_command(command_line: typer.Typer, program: str | None = None, command: str | None = None) -> None:
    """Run a command. A user's error is printed as one sentence; SFD_DEBUG=1 shows the traceback.

    Args:
        program: the name that help texts show, such as `sfd`; by default the way in which Python was started.
        command: runs this command with the arguments of the process; by default the first argument is the command.

    A rank that fails does not destroy the process group: this would wait for the other ranks, which may wait for it.
    """
    output.make_safe()
    try:
        require_folder()
        environment.check()
        arguments = config.checked_arguments(sys.argv[1:])
        setup_logging()
        interruptible("stopped by Ctrl-C; finished parts are kept, and the same command goes on")
        use_writable_caches()
        command_line(args=arguments if command is None else [command, *arguments], prog_name=program)
    except SystemExit as end:
        if end.code in (0, None, REQUEUE_EXIT_CODE):
            _flush()
            _end_process_group()
        raise
    except (ValueError, FloatingPointError, OSError) as error:
        if _debugs():
            raise
        _fail(error_text(error))
    except RuntimeError as error:
        if _debugs() or not str(error).startswith("Symlink loop"):  # of pathlib
            raise
        _fail(f"{error}; give the file itself")


def _debugs() -> bool:
    """Whether SFD_DEBUG asks for tracebacks; any text but `0` and the like does."""
    try:
        return environment.flag("SFD_DEBUG")
    except ValueError:
        return True


def _flush() -> None:
    """Write what standard output still buffers: at exit, Python would report an error as `Exception ignored`."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _fail(f"standard output: {error_text(error)}")


def _end_process_group() -> None:
    if "torch" in sys.modules:  # otherwise there is no group
        from sfd_scale.runtime import distributed

        distributed.shutdown()


def _fail(message: str) -> None:
    rank = f"[rank {environment.text('RANK')}] " if environment.launched() else ""
    console.print(Text.assemble(("error:", "bold red"), f" {rank}{message}"), soft_wrap=True)
    sys.exit(2)
