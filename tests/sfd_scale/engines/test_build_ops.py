"""The compilation of DeepSpeed's operators shows that it goes on, and loading them prints nothing. A wait for another
process that compiles them ends."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sfd_scale.engines import build_ops

HOLD = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_compilation_logs_its_seconds(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(build_ops, "_TICK_S", 0.01)
    with caplog.at_level(logging.INFO):
        with build_ops.progress_of([]):
            time.sleep(0.05)
        assert not caplog.records
        with build_ops.progress_of(["shm", "adam"]):
            end = time.monotonic() + 60
            while not caplog.records and time.monotonic() < end:
                time.sleep(0.01)
    assert caplog.messages[0].startswith("shm, adam: compiling, 0 s")
    count = len(caplog.records)
    time.sleep(0.05)
    assert len(caplog.records) == count  # it ends with the compilation


def test_builders_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with build_ops.quiet_builders():
        print("DeepSpeed op built successfully")  # noqa: T201
    assert capsys.readouterr().out == ""


def test_a_process_that_compiles_for_ever_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("SFD_BUILD_TIMEOUT", "1")
    build_ops.wait_for_builds()  # an empty folder
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    with subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(TimeoutError, match="cpu_adam: another process has been compiling it for 1 s; end that pro"):
            build_ops.wait_for_builds()
        other.kill()
    build_ops.wait_for_builds()  # the lock of a killed process is free
