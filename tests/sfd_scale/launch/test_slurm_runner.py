"""LAUNCHER=slurm: DeepSpeed's runner starts the ranks by srun, on a Slurm of this test with one node."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sfd_scale.launch import status
from sfd_scale.runtime.signals import REQUEUE_EXIT_CODE

ROOT = Path(__file__).resolve().parents[3]
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmctldPort={controller}
SlurmdPort={node}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""
SAVES = """
import os, signal, sys, time
asked = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda signum, frame: asked.append(signum))
open("up-" + os.environ["RANK"], "w").close()
while not asked:
    time.sleep(0.05)
time.sleep(float(os.environ["RANK"]))
open("saved-" + os.environ["RANK"], "w").close()
sys.exit(75)
"""
NEVER_SAVES = SAVES.replace("while not asked", "while True")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Slurm with one node; yields the environment in which its commands find it."""
    missing = [name for name in ("srun", "sinfo", "slurmctld", "slurmd") if not shutil.which(name)]
    if missing or os.geteuid() != 0:
        pytest.skip(f"not installed: {', '.join(missing)}" if missing else "slurmd needs root")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    ports = {"controller": free_port(), "node": free_port()}
    configuration = folder / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(host=socket.gethostname().split(".")[0], folder=folder, **ports))
    environment = {**os.environ, "SLURM_CONF": str(configuration)}
    with (folder / "log").open("w") as log:
        daemons = [
            subprocess.Popen([name, "-D"], env=environment, stdout=log, stderr=log) for name in ("slurmctld", "slurmd")
        ]
        try:
            deadline = time.monotonic() + 60
            while "idle" not in subprocess.run(["sinfo"], env=environment, capture_output=True, text=True).stdout:
                if time.monotonic() > deadline:
                    pytest.skip(f"Slurm does not start here: {(folder / 'log').read_text()[-500:]}")
                time.sleep(0.2)
            yield environment
        finally:
            for daemon in reversed(daemons):
                daemon.terminate()
                daemon.wait(timeout=30)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(slurm: dict[str, str], folder: Path, code: str) -> "subprocess.Popen[str]":
    """A launch of two ranks that run `code`; returns once both have started."""
    (folder / "work.py").write_text(code)
    (folder / "hosts").write_text(f"{socket.gethostname()} slots=2\n")
    asked = {"LAUNCHER": "slurm", "HOSTFILE": str(folder / "hosts"), "LOG_FOLDER": str(folder / "logs")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{slurm['PATH']}"
    process = subprocess.Popen(
        [ROOT / "launchers/deepspeed.sh", "--module", "work", "go"], cwd=folder, text=True, stderr=subprocess.PIPE,
        env={**slurm, **asked, "PATH": path, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(list(folder.glob("up-*"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
    return process


def test_a_stop_request_reaches_the_ranks_through_srun(slurm: dict[str, str], tmp_path: Path) -> None:
    process = start(slurm, tmp_path, SAVES)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == REQUEUE_EXIT_CODE, said
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]
    states = [path.read_text() for path in sorted((tmp_path / "logs").glob("rank-*.json"))]
    assert len(states) == 2 and all('"state": "stopped"' in text for text in states)


def test_a_second_stop_request_kills_ranks_that_do_not_save(slurm: dict[str, str], tmp_path: Path) -> None:
    process = start(slurm, tmp_path, NEVER_SAVES)
    pids = [rank.pid for rank in status.read(tmp_path / "logs", launch_id(tmp_path))]
    process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == REQUEUE_EXIT_CODE
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "the ranks outlive the launch"
        time.sleep(0.1)


def launch_id(folder: Path) -> str:
    return str(json.loads((folder / "logs/rank-0.json").read_text())["launch"])
