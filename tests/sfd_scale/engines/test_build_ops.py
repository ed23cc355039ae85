"""The compilation of DeepSpeed's operators shows that it goes on, and loading them prints nothing."""

from __future__ import annotations

import logging
import time

import pytest

from sfd_scale.engines import build_ops


def test_a_compilation_logs_its_seconds(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(build_ops, "_TICK_S", 0.01)
    with caplog.at_level(logging.INFO):
        with build_ops.progress_of([]):
            time.sleep(0.05)
        assert not caplog.records
        with build_ops.progress_of(["shm", "adam"]):
            time.sleep(0.1)
    assert caplog.messages[0].startswith("shm, adam: compiling, 0 s")
    count = len(caplog.records)
    time.sleep(0.05)
    assert len(caplog.records) == count  # it ends with the compilation


def test_builders_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with build_ops.quiet_builders():
        print("DeepSpeed op built successfully")  # noqa: T201
    assert capsys.readouterr().out == ""
