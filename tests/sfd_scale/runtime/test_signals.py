"""Ctrl-C saves a training; a file has the permissions that the umask gives."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sfd_scale.checkpoint import save_weights
from sfd_scale.runtime.files import write_json
from sfd_scale.runtime.run_paths import RunPaths
from sfd_scale.runtime.signals import StopRequest
from tests.helpers.small_run import encode, write_recipe


def _interrupted(command: list[str], when: Callable[[], bool]) -> tuple[int, str]:
    """Exit code and standard error of a command that gets Ctrl-C as soon as `when`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sfd_scale", *command], stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    deadline = time.monotonic() + 120
    while not when() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    return process.returncode, error


def test_ctrl_c_saves_a_training_and_says_how_to_go_on(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "small.yaml", encode(tmp_path / "data"), steps=1_000_000, every=1_000_000)
    run = tmp_path / "run"
    metrics = RunPaths(run).metrics_file
    code, error = _interrupted(
        ["train", str(recipe), "--run", str(run)], lambda: metrics.exists() and metrics.stat().st_size > 0
    )
    assert code == 75, error
    assert "a second Ctrl-C ends it at once" in error and "the same command resumes" in error
    (saved,) = (run / "checkpoints").glob("step-*")
    assert f"after step {int(saved.name.removeprefix('step-'))}, which is saved" in error


@pytest.mark.parametrize("nohup", [False, True])
def test_a_training_saves_if_its_terminal_ends_and_goes_on_under_nohup(tmp_path: Path, nohup: bool) -> None:
    """As by an ssh connection that breaks: a hangup, and every later write to the terminal fails."""
    steps = 30 if nohup else 1_000_000
    recipe = write_recipe(tmp_path / "small.yaml", encode(tmp_path / "data"), steps=steps, every=1_000_000)
    run, (terminal, end) = tmp_path / "run", pty.openpty()
    command = [sys.executable, "-m", "sfd_scale", "train", str(recipe), "--run", str(run)]
    # A new session whose terminal this is.
    code = f"""
import fcntl, os, signal, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
if {nohup}: signal.signal(signal.SIGHUP, signal.SIG_IGN)
os.execv(sys.executable, {command!r})
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=end, stdout=end, stderr=end, env={**os.environ})
    os.close(end)
    metrics, deadline = RunPaths(run).metrics_file, time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 65536)
    os.close(terminal)
    assert process.wait(120) == (0 if nohup else 75)
    (saved,) = (run / "checkpoints").glob("step-*")
    assert (saved / "COMMIT").is_file() and (saved.name == "step-00000030") == nohup


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_ignored_signals_stay_ignored_but_for_those_that_a_launcher_ignores(
    signum: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell ignores SIGINT in background jobs; the ranks of a launcher inherit what it ignores for itself."""
    before = signal.signal(signum, signal.SIG_IGN)
    try:
        with StopRequest() as alone:
            os.kill(os.getpid(), signum)
            assert signal.getsignal(signum) == signal.SIG_IGN and not alone.requested()
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        with StopRequest() as rank:
            os.kill(os.getpid(), signum)
            assert rank.requested() == (signum != signal.SIGHUP)
        assert signal.getsignal(signum) == signal.SIG_IGN
    finally:
        signal.signal(signum, before)


def test_ctrl_c_ends_another_command_with_a_sentence(tmp_path: Path) -> None:
    out = tmp_path / "images"
    command = ["encode", "quickstart/images", "source.num_images=1000000", "store.chunk=10", f"out={out}"]
    code, error = _interrupted(command, lambda: out.exists() and any(out.rglob("*.mds*")))
    assert code == 130 and "stopped by Ctrl-C; finished parts are kept" in error and "Traceback" not in error


def test_files_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_weights({"x": torch.zeros(1)}, tmp_path / "x.safetensors", {})
        write_json(tmp_path / "x.json", {})
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o640}
