"""Read-only installations and missing home folders: caches go where they can be written, or a variable is named."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sfd_scale.runtime import caches, environment

ROOT = Path(__file__).resolve().parents[3]
NOBODY = 54321  # no user of this machine, as the user of many containers; root may write everywhere


def as_nobody(function: Callable[[], Any], **variables: str) -> Any:
    """What a function returns, or the text of its ValueError, for a user without a home folder.

    A fork, because such a user may not even read the interpreter.
    """
    if os.getuid() != 0:
        pytest.skip("needs root, to become another user")
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            os.environ.clear()
            os.environ.update(variables)
            tempfile.tempdir = None
            try:
                found = function()
            except ValueError as error:
                found = str(error)
            os.write(writing, json.dumps(found).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return json.loads(answer)


def variables_of_caches() -> dict[str, str]:
    caches.use_writable_caches()
    return environment.snapshot()


def extensions_of(prefix: str) -> Callable[[], str]:
    def find() -> str:
        sys.prefix = prefix
        return str(caches.extensions_folder())

    return find


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    for folder in (tmp_path, *tmp_path.parents[:3]):
        if folder.stat().st_uid == os.getuid() and folder != Path("/tmp"):
            folder.chmod(0o755)
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1777)
    return tmp_path / "tmp"


@pytest.mark.parametrize("home", [None, "", "{}/missing", "{}/readonly"])
def test_caches_go_to_the_temporary_folder_where_the_home_folder_cannot_be_written(
    temporary: Path, home: str | None
) -> None:
    downloads = temporary.parent / "readonly/.cache/huggingface"
    downloads.mkdir(parents=True)
    given = {} if home is None else {"HOME": home.format(temporary.parent)}
    found = as_nobody(variables_of_caches, TMPDIR=str(temporary), XDG_DATA_HOME="/mine", **given)
    spare = temporary / f"sfd-scale-{NOBODY}"
    assert found["XDG_CACHE_HOME"] == str(spare / ".cache") and found["TRITON_HOME"] == str(spare)
    assert found["XDG_DATA_HOME"] == "/mine"
    assert spare.stat().st_uid == NOBODY and spare.stat().st_mode & 0o077 == 0
    # Weights that were downloaded before are still found.
    assert found.get("HF_HOME") == (str(downloads) if home == "{}/readonly" else None)
    assert found["HOME"] == (given.get("HOME") or str(spare))


def test_a_home_folder_that_can_be_written_is_used(temporary: Path) -> None:
    found = as_nobody(variables_of_caches, TMPDIR=str(temporary), HOME=str(temporary))
    assert not found.keys() & {"XDG_CACHE_HOME", "TRITON_HOME"}


def test_no_writable_folder_at_all_says_which_variable_to_set(temporary: Path) -> None:
    (temporary / f"sfd-scale-{NOBODY}").mkdir()  # of root: another user may have put links into it
    assert as_nobody(variables_of_caches, TMPDIR=str(temporary)) == (
        f"{temporary}/sfd-scale-{NOBODY}: belongs to another user; set TMPDIR to a folder of your own"
    )


def test_compiled_extensions_of_a_read_only_installation_are_copied_with_their_times(temporary: Path) -> None:
    built = temporary.parent / "venv/torch_extensions/cpu_adam/cpu_adam.so"
    built.parent.mkdir(parents=True)
    built.write_bytes(b"code")
    os.utime(built, (1e9, 1e9))
    program = extensions_of(str(temporary.parent / "venv"))
    folder = Path(as_nobody(program, TMPDIR=str(temporary)))
    copy = folder / "cpu_adam/cpu_adam.so"
    assert folder.is_relative_to(temporary) and copy.read_bytes() == b"code"
    assert copy.stat().st_mtime == 1e9  # else ninja would compile it again
    assert Path(as_nobody(program, TMPDIR=str(temporary))) == folder
    (temporary / "cache").mkdir(mode=0o777)
    (temporary / "cache").chmod(0o777)
    cached = Path(as_nobody(program, TMPDIR=str(temporary), XDG_CACHE_HOME=str(temporary / "cache")))
    assert cached.is_relative_to(temporary / "cache")


def test_an_installation_without_extensions_gets_an_empty_folder_to_compile_in(temporary: Path) -> None:
    (temporary.parent / "venv").mkdir()
    folder = Path(as_nobody(extensions_of(str(temporary.parent / "venv")), TMPDIR=str(temporary)))
    assert folder.is_dir() and not list(folder.iterdir()) and [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_folder_for_extensions_that_cannot_be_written_is_named(temporary: Path) -> None:
    (temporary.parent / "mine").mkdir()
    given = str(temporary.parent / "mine")
    assert as_nobody(extensions_of("/usr"), TMPDIR=str(temporary), TORCH_EXTENSIONS_DIR=given) == (
        f"TORCH_EXTENSIONS_DIR: {given} cannot be written; allowed: a folder for compiled extensions that this user "
        "may write"
    )


@pytest.mark.full
def test_deepspeed_starts_on_a_read_only_installation_without_compiling(tmp_path: Path) -> None:
    """The real installation, mounted read-only in a namespace of its own."""
    if os.getuid() != 0:
        pytest.skip("needs root, to mount")
    script = (
        'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" || exit 77\n'
        '! touch "$1/file" 2>/dev/null || exit 78\n'
        '"$0" -m sfd_scale.engines.build_ops\n'
    )
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", script, sys.executable, sys.prefix], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)}, timeout=600,
    )  # fmt: skip
    if done.returncode == 77:
        pytest.skip(f"this machine allows no mounts: {done.stderr}")
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("cpu_adam.so"))
