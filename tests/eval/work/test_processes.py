"""Worker processes side by side: a stop, a worker that does not hear it, a worker that fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from eval.work.processes import run_in_parallel

SLOW = """
import os, signal, sys, time
place = sys.argv[1]
slow = True
try:
    os.close(os.open(place + "/fast", os.O_CREAT | os.O_EXCL))
    slow = False
except FileExistsError:
    pass
signals = []
signal.signal(signal.SIGTERM, lambda *_: signals.append(time.monotonic()))
open(place + f"/ready{int(slow)}", "w").close()
while not signals:
    time.sleep(0.05)
if not slow:
    sys.exit(75)
time.sleep(2.5)  # a save that takes long
open(place + "/saved", "w").write(str(len(signals)))
sys.exit(75)
"""


def test_a_stop_is_passed_on_once_and_waits_for_every_save(tmp_path: Path) -> None:
    parent = (
        "import sys; from eval.work.processes import run_in_parallel\n"
        "sys.exit(run_in_parallel([sys.executable, '-c', sys.argv[1], sys.argv[2]], 2))"
    )
    beside = subprocess.Popen([sys.executable, "-c", parent, SLOW, str(tmp_path)])
    while not all((tmp_path / f"ready{n}").exists() for n in (0, 1)):
        assert beside.poll() is None
        time.sleep(0.05)
    beside.send_signal(signal.SIGTERM)
    assert beside.wait(timeout=60) == 75
    assert (tmp_path / "saved").read_text() == "1"


def test_a_process_that_does_not_stop_is_killed_after_the_limit(tmp_path: Path) -> None:
    deaf = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "open(f'{sys.argv[1]}/up{os.getpid()}', 'w').close()\n"
        "time.sleep(100)"
    )
    parent = (
        "import sys; from eval.work.processes import run_in_parallel\n"
        "sys.exit(run_in_parallel([sys.executable, '-c', sys.argv[1], sys.argv[2]], 2))"
    )
    beside = subprocess.Popen(
        [sys.executable, "-c", parent, deaf, str(tmp_path)], env={**os.environ, "SHUTDOWN_TIMEOUT": "1"}
    )
    while len(found := list(tmp_path.glob("up*"))) < 2:
        assert beside.poll() is None
        time.sleep(0.05)
    beside.send_signal(signal.SIGTERM)
    assert beside.wait(timeout=60) == 75
    assert not any(psutil.pid_exists(int(file.name.removeprefix("up"))) for file in found)


def test_a_worker_that_fails_ends_the_others_with_its_exit_code(tmp_path: Path) -> None:
    code = (
        "import os, sys, time\n"
        "try: os.close(os.open(sys.argv[1] + '/first', os.O_CREAT | os.O_EXCL))\n"
        "except FileExistsError: sys.exit(3)\n"
        "time.sleep(100)"
    )
    started = time.monotonic()
    assert run_in_parallel([sys.executable, "-c", code, str(tmp_path)], 2) == 3
    assert time.monotonic() - started < 60
