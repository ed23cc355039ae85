"""Every command has a help text, and the file of a command runs as a module that is the same command."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

# Module → program and command.
MODULES = {
    **{
        f"sfd_scale.{name}": ("sfd", name)
        for name in ("train", "encode", "export", "sample", "plan", "check", "doctor")
    },
    "sfd_scale.hub": ("sfd", "export"),
    "sfd_scale.official": ("sfd", "import"),
    "eval.run_report": ("sfd", "report"),
    **{f"eval.search.{name}": ("python -m eval", name) for name in ("sweep", "solvers", "guide")},
    **{
        f"eval.{name}": ("python -m eval", name)
        for name in ("generate", "score", "reference", "report", "watch")
    },
    "eval.comparison.compare": ("python -m eval", "compare"),
}  # fmt: skip
ROOT = Path(__file__).parents[1]


def _help(module: str, *arguments: str) -> tuple[int, str]:
    """Exit code and output of `python -m module ARGUMENTS --help`, in this process."""
    sys.argv = [module, *arguments, "--help"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the module was imported before, which runpy mentions
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            return int(end.code or 0), out.getvalue()
    return -1, out.getvalue()


def _all_help() -> None:
    """Print every help text as JSON: of each command under its program, and of each module."""
    import eval.__main__
    import sfd_scale.__main__

    found = {}
    for program, package in (("sfd", sfd_scale), ("python -m eval", eval)):
        app = package.__main__.app
        for command in app.registered_commands:
            name = command.name or command.callback.__name__.replace("_", "-")
            found[f"{program} {name}"] = _help(package.__name__, name)
    found |= {module: _help(module) for module in MODULES}
    sys.stdout.write(json.dumps(found))


@pytest.fixture(scope="module")
def texts() -> dict[str, tuple[int, str]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_commands"],  # as a script, tests/eval would stand in the place of eval
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: (code, text) for name, (code, text) in json.loads(done.stdout).items()}


def test_every_command_explains_itself(texts: dict[str, tuple[int, str]]) -> None:
    commands = {name: found for name, found in texts.items() if " " in name}
    assert len(commands) > 20 and {"sfd train", "sfd check-data", "python -m eval watch"} <= set(commands)
    for name, (code, text) in commands.items():
        assert code == 0 and "Usage:" in text and len(text.splitlines()) > 4, name


def test_the_file_of_a_command_is_that_command(texts: dict[str, tuple[int, str]]) -> None:
    files = [*ROOT.glob("sfd_scale/*.py"), *ROOT.glob("eval/**/*.py")]
    runs = {".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files if '\n    main("' in f.read_text()}
    assert runs == set(MODULES)
    for module, (program, command) in MODULES.items():
        code, text = texts[module]
        usage = text.split("Usage: ")[1]
        assert code == 0 and usage.startswith(f"{program} {command} "), module
        # All but the name of the program, which runpy's caller has another one of.
        _, other = texts[f"{program} {command}"]
        assert text.split("\n")[2:] == other.split("\n")[2:], module


if __name__ == "__main__":
    _all_help()
