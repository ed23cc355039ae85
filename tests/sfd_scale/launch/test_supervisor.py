"""Stop requests, failures and leftovers of a launch: real processes as ranks, without torch in them."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from sfd_scale.launch import agent, status, supervisor
from sfd_scale.launch.supervisor import Launch, Supervisor

# A launcher as DeepSpeed's is: it ends with the code of the first rank that fails, and does not look after the others.
LAUNCHER = """
import os, subprocess, sys, time
numbers = [{"RANK": str(n), "LOCAL_RANK": str(n)} for n in range(2)]
ranks = [subprocess.Popen([sys.executable, "-u", *sys.argv[1:], "work"], env={**os.environ, **n}) for n in numbers]
while any(rank.poll() is None for rank in ranks):
    for rank in ranks:
        if rank.poll():
            sys.exit(rank.returncode if rank.returncode > 0 else 1)
    time.sleep(0.05)
sys.exit(next((rank.returncode if rank.returncode > 0 else 1 for rank in ranks if rank.returncode), 0))
"""
UP = """
open(f"logs/up-{os.environ['RANK']}", "w").close()
"""
SAVES = f"""
import os, signal, sys, time
asked = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda signum, frame: asked.append(signum))
{UP}
while not asked:
    time.sleep(0.05)
time.sleep(float(os.environ["RANK"]))  # rank 1 writes for longer
open("saved-" + os.environ["RANK"], "w").close()
sys.exit(75)
"""


def launch(folder: Path, work: str, **more: float) -> Launch:
    (folder / "work.py").write_text(work)
    (folder / "launcher.py").write_text(LAUNCHER)
    launch_id = f"test-{os.getpid()}-{time.monotonic_ns()}"
    timeout = str(more.get("timeout", 20))
    variables = {status.LAUNCH_ID: launch_id, status.LOG_FOLDER: str(folder / "logs"), status.SHUTDOWN_TIMEOUT: timeout}
    ranks = {"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "PYTHONPATH": str(folder)}
    command = [sys.executable, str(folder / "launcher.py"), agent.RANK_FILE]
    return Launch(command=command, environment={**os.environ, **variables, **ranks}, world_size=2)


def when_started(made: Launch, *signals: tuple[float, int]) -> None:
    """Signals this process, the launcher, so many seconds after both ranks have begun to work."""

    def wait() -> None:
        while len(list(made.log_folder.glob("up-*"))) < 2:
            time.sleep(0.05)
        for delay, signum in signals:
            time.sleep(delay)
            os.kill(os.getpid(), signum)

    threading.Thread(target=wait, daemon=True).start()


def test_a_stop_that_is_sent_to_every_process_leaves_the_launcher_to_the_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Slurm does it: torchrun, which serves the ranks' store, must not end before they have saved."""
    monkeypatch.chdir(tmp_path)
    made = replace(launch(tmp_path, SAVES), end_signal=signal.SIGQUIT)
    hears = "import signal\nsignal.signal(signal.SIGQUIT, lambda *_: open('told', 'w').close())\n"
    text = (tmp_path / "launcher.py").read_text()
    (tmp_path / "launcher.py").write_text(hears + text)

    def to_all() -> None:
        while len(list(made.log_folder.glob("up-*"))) < 2:
            time.sleep(0.05)
        for process in [*psutil.Process().children(recursive=True), psutil.Process()]:
            process.send_signal(signal.SIGUSR1)

    threading.Thread(target=to_all, daemon=True).start()
    assert Supervisor(made).run() == 75
    assert (tmp_path / "told").exists() and {path.name for path in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}
    assert agent.find_ranks(made.launch_id) == []


def test_a_stop_request_reaches_every_rank_and_the_code_asks_for_a_requeue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = launch(tmp_path, SAVES)
    when_started(made, (0.0, signal.SIGTERM))
    assert Supervisor(made).run() == 75
    assert {path.name for path in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}
    assert agent.find_ranks(made.launch_id) == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(("code", "ended"), [(0, 0), (75, 75)])
def test_a_launcher_that_is_slow_to_end_does_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, ended: int
) -> None:
    monkeypatch.chdir(tmp_path)
    made = launch(tmp_path, f"import sys\nsys.exit({code})")
    (tmp_path / "launcher.py").write_text(LAUNCHER.replace("while any", "time.sleep(600)\nwhile any"))
    started = time.monotonic()
    assert Supervisor(made).run() == ended
    assert time.monotonic() - started < 200


def test_a_launcher_whose_rank_has_failed_is_left_to_end_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It kills the other ranks, and its code tells a user's error from a failure."""
    monkeypatch.chdir(tmp_path)
    made = launch(tmp_path, "import os, sys\nsys.exit(2 * int(os.environ['RANK']))")
    assert Supervisor(made).run() == 2


LEAVES = """
import atexit, os, sys, time
kept = os.dup(2)  # as DeepSpeed does
class Slow:
    def __del__(self):
        time.sleep(600)  # the teardown of modules
atexit.register(lambda: print("an exit function", flush=True))
slow = Slow()
sys.modules["slow"] = slow
print("last words", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("code", [0, 75, 3])
def test_a_rank_leaves_without_the_teardown_of_its_modules(tmp_path: Path, code: int) -> None:
    (tmp_path / "leaves.py").write_text(LEAVES)
    variables = {status.LAUNCH_ID: "x", status.LOG_FOLDER: str(tmp_path), status.SHUTDOWN_TIMEOUT: "5"}
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, agent.RANK_FILE, "leaves", str(code)], env={**os.environ, **variables, **alone},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == code
    assert ("an exit function" in done.stdout) == (code != 3), "a rank that failed ends at once"
    assert "last words" in done.stderr and "last words" in (tmp_path / "rank-0.log").read_text()


@pytest.mark.parametrize("how", ["second signal", "timeout"])
def test_ranks_that_do_not_stop_are_ended(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "KILL_WAIT_S", 2.0)
    deaf = f"import os, signal, time\nsignal.signal(signal.SIGUSR1, lambda *a: None)\n{UP}\ntime.sleep(600)"
    monkeypatch.chdir(tmp_path)
    made = launch(tmp_path, deaf, timeout=2 if how == "timeout" else 600)
    later = [(3.0, signal.SIGINT)] if how == "second signal" else []
    when_started(made, (0.0, signal.SIGINT), *later)
    started = time.monotonic()
    assert Supervisor(made).run() == 75  # nothing failed: the last checkpoint is whole
    assert time.monotonic() - started < 300
    assert agent.find_ranks(made.launch_id) == []
    assert "second stop signal, or no save in time: killing all ranks" in caplog.text


def test_the_ranks_that_a_launcher_leaves_behind_end_and_the_first_failure_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "GRACE_S", 1.0)
    work = "import os, time\nif os.environ['RANK'] == '1':\n    raise MemoryError('no room')\ntime.sleep(60)"
    made = launch(tmp_path, work)
    with caplog.at_level(logging.ERROR):
        assert Supervisor(made).run() == 1
    assert "failed first: MemoryError: no room" in caplog.text
    assert str(made.log_folder / "rank-1.log") in caplog.text
    assert agent.find_ranks(made.launch_id) == []


def test_a_rank_that_is_killed_is_named_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "GRACE_S", 1.0)
    made = launch(
        tmp_path, "import os, time\nif os.environ['RANK'] == '1':\n    os.kill(os.getpid(), 9)\ntime.sleep(60)"
    )
    assert Supervisor(made).run() == 1
    assert "was killed (out of memory?), or the host is down" in caplog.text


def test_a_launch_that_does_its_work_ends_with_0(tmp_path: Path) -> None:
    made = launch(tmp_path, "pass")
    assert Supervisor(made).run() == 0
    assert {rank.state for rank in status.read(made.log_folder, made.launch_id)} == {"done"}


@pytest.mark.parametrize("state", ["failed", "stopped", "running"])
def test_what_an_earlier_start_of_the_same_name_left_does_not_count(tmp_path: Path, state: str) -> None:
    made = launch(tmp_path, "pass")
    made.log_folder.mkdir()
    for rank, started in ((0, time.time() - 3600), (7, time.time() - 3600)):
        fields = {"launch": made.launch_id, "rank": rank, "world_size": 8, "host": "h", "node": 0, "pid": 1}
        status.RankStatus(**fields, state=state, started=started).write(made.log_folder)  # type: ignore[arg-type]
    assert Supervisor(made).run() == 0


def test_a_rank_that_was_started_again_has_not_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun's elastic agent does it: the second attempt takes longer than the others wait after a failure."""
    monkeypatch.setattr(supervisor, "GRACE_S", 6.0)
    work = (
        "import os, time\nif not os.path.exists('tried'):\n    open('tried', 'w').close()\n    raise OSError('once')\n"
    )
    made = launch(tmp_path, f"{work}time.sleep(7)")
    again = (
        "import os, subprocess, sys\n"
        "call = [sys.executable, '-u', *sys.argv[1:], 'work']\n"
        "one = {**os.environ, 'RANK': '0', 'LOCAL_RANK': '0', 'WORLD_SIZE': '1', 'LOCAL_SIZE': '1'}\n"
        "sys.exit(subprocess.call(call, env=one) and subprocess.call(call, env=one))"
    )
    (tmp_path / "launcher.py").write_text(again)
    monkeypatch.chdir(tmp_path)
    assert Supervisor(made).run() == 0


def test_a_launch_under_nohup_survives_the_end_of_its_terminal(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        made = launch(tmp_path, "import time\ntime.sleep(1)")
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGHUP)).start()
        assert Supervisor(made).run() == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
