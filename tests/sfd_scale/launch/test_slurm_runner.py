"""LAUNCHER=slurm: DeepSpeed's runner starts the ranks by srun, here on a real Slurm of two nodes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sfd_scale.runtime.signals import REQUEUE_EXIT_CODE
from tests.helpers.slurm import Slurm, slurm

ROOT = Path(__file__).resolve().parents[3]
# A rank without torch, which saves for longer on rank 1.
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
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm(2, tmp_path_factory.mktemp("slurm")) as made:
        yield made


def start(cluster: Slurm, folder: Path, code: str) -> "subprocess.Popen[str]":
    """A launch that runs `code` in one rank per node; returns once both have started."""
    (folder / "work.py").write_text(code)
    (folder / "hosts").write_text("".join(f"{host.name} slots=1\n" for host in cluster.hosts))
    variables = {
        **os.environ, "SLURM_CONF": str(cluster.config), "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "DS_ACCELERATOR": "cpu",
        "LAUNCHER": "slurm", "HOSTFILE": str(folder / "hosts"), "LOG_FOLDER": str(folder / "logs"),
        "MASTER_ADDR": cluster.hosts[0].address,
    }  # fmt: skip
    command = cluster.hosts[0].command(str(ROOT / "launchers/deepspeed.sh"), "--module", "work", "go")
    process = subprocess.Popen(command, cwd=folder, env=variables, text=True, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while len(list(folder.glob("up-*"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
    return process


def ranks(folder: Path) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in sorted((folder / "logs").glob("rank-*.json"))]


def test_a_stop_request_reaches_the_ranks_of_both_nodes_through_srun(cluster: Slurm, tmp_path: Path) -> None:
    process = start(cluster, tmp_path, SAVES)
    process.terminate()
    _, said = process.communicate(timeout=200)
    assert process.returncode == REQUEUE_EXIT_CODE, said
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]
    assert [(rank["host"], rank["state"]) for rank in ranks(tmp_path)] == [("node-a", "stopped"), ("node-b", "stopped")]


def test_a_second_stop_request_kills_ranks_that_do_not_save(cluster: Slurm, tmp_path: Path) -> None:
    process = start(cluster, tmp_path, NEVER_SAVES)
    pids = [int(str(rank["pid"])) for rank in ranks(tmp_path)]
    process.send_signal(signal.SIGTERM)
    time.sleep(3.0)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=200)
    assert process.returncode == REQUEUE_EXIT_CODE
    deadline = time.monotonic() + 30
    while any(map(psutil.pid_exists, pids)):
        assert time.monotonic() < deadline, "the ranks outlive the launch"
        time.sleep(0.1)
