"""Command and environment of every kind of launch: pdsh, openmpi, slurm, no ssh, torchrun static and c10d.

DeepSpeed's own runner reads the command that we give it, and makes that of pdsh, mpirun or srun from it.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sfd_scale.launch import agent, status
from sfd_scale.launch.commands import RankCommand, make_launch
from sfd_scale.launch.environment import read_env_file
from sfd_scale.launch.hosts import Host
from sfd_scale.launch.supervisor import Launch
from sfd_scale.runtime import network

RUN = RankCommand("sfd_scale", ("train", "quickstart/vision", "train.steps=3"))
OWN = network.source_address("192.0.2.1")
OTHER = "192.0.2.77"
HOSTS = [Host(OWN, 2), Host(OTHER, 2)]
# Runs what it is asked on this machine, whatever the host.
SSH = '#!/bin/sh\nfor last; do :; done\ncase " $* " in *" -G "*) echo "hostname $last";; *) exec sh -c "$last";; esac\n'


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Variables of a launch on two hosts of two slots, with an ssh that stays here."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/ssh").write_text(SSH)
    (tmp_path / "bin/ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "hosts").write_text(f"{OWN} slots=2\n{OTHER} slots=2\n")
    return {
        "DS_ACCELERATOR": "cpu", "PATH": os.environ["PATH"], "HOSTFILE": str(tmp_path / "hosts"),
        "LOG_FOLDER": str(tmp_path / "logs"), "MASTER_PORT": "29512", "NCCL_DEBUG": "INFO", "HF_TOKEN": "secret",
        "SHUTDOWN_TIMEOUT": "40",
    }  # fmt: skip


def same_for_all(made: Launch, folder: Path, world_size: int) -> None:
    assert made.world_size == world_size
    assert (made.log_folder, made.shutdown_timeout_s) == (folder / "logs", 40.0)
    assert made.launch_id and made.environment[status.LAUNCH_ID] == made.launch_id
    assert made.environment["PATH"].startswith(str(Path(sys.executable).parent))


def by_deepspeed(made: Launch, runner: str) -> list[str]:
    """The command that DeepSpeed's runner makes of ours, with the variables that it exports."""
    from deepspeed.launcher import multinode_runner
    from deepspeed.launcher import runner as module

    words = list(made.command)
    options: Namespace = module.parse_args(words[words.index("deepspeed.launcher.runner") + 1 :])
    assert options.launcher == runner and options.force_multi and options.no_local_rank
    assert [options.user_script, *options.user_args][:2] == [agent.RANK_FILE, "sfd_scale"]
    pool = module.fetch_hostfile(options.hostfile)
    active = {name: list(range(slots)) for name, slots in pool.items()}
    world = base64.urlsafe_b64encode(json.dumps(active).encode()).decode()
    classes: dict[str, Any] = {
        "pdsh": multinode_runner.PDSHRunner, "openmpi": multinode_runner.OpenMPIRunner,
        "slurm": multinode_runner.SlurmRunner,
    }  # fmt: skip
    made_by = classes[runner](options, world, *([] if runner == "pdsh" else [pool]))
    for name, value in read_env_file(Path(made.environment["DS_ENV_FILE"])).items():
        made_by.add_export(name, value)
    out = made_by.get_cmd(dict(made.environment), active)
    return list(out[0] if runner == "pdsh" else out)


@pytest.mark.parametrize("runner", ["pdsh", "openmpi", "slurm"])
def test_a_runner_starts_every_rank_on_every_host(asked: dict[str, str], tmp_path: Path, runner: str) -> None:
    made = make_launch("deepspeed", RUN, {**asked, "LAUNCHER": runner, "LAUNCHER_ARGS": "--verbose"})
    same_for_all(made, tmp_path, world_size=4)
    words = by_deepspeed(made, runner)
    assert words[-4:] == ["sfd_scale", *RUN.arguments]
    assert words[-5] == agent.RANK_FILE and "--verbose" in words
    exported = read_env_file(Path(made.environment["DS_ENV_FILE"]))
    assert exported["MASTER_ADDR"] == OWN and exported["MASTER_PORT"] == "29512" and exported["NCCL_DEBUG"] == "INFO"
    assert exported[status.LAUNCH_ID] == made.launch_id and "HF_TOKEN" not in exported
    assert f"{status.LAUNCH_ID}={made.launch_id}" in " ".join(words)
    # Who signals the ranks: ssh to each host, or srun.
    assert (list(made.hosts), made.srun) == (([], True) if runner == "slurm" else (HOSTS, False))


def test_pdsh_reaches_the_hosts_by_name_and_mpirun_and_srun_get_what_deepspeed_leaves_out(
    asked: dict[str, str],
) -> None:
    def words(runner: str) -> list[str]:
        return by_deepspeed(make_launch("deepspeed", RUN, {**asked, "LAUNCHER": runner}), runner)

    pdsh, mpirun, srun = words("pdsh"), words("openmpi"), words("slurm")
    assert (pdsh[0], value(pdsh, "-w")) == ("pdsh", f"{OWN},{OTHER}")
    assert f"--master_addr={OWN}" in pdsh and "--master_port=29512" in pdsh
    assert (mpirun[0], value(mpirun, "-n")) == ("mpirun", "4")
    assert value(mpirun, "btl_tcp_if_include") == network.interface_of(OWN)
    assert (srun[0], value(srun, "-n"), value(srun, "--nodes"), value(srun, "--ntasks-per-node")) == (
        "srun", "4", "2", "2",
    )  # fmt: skip


def value(words: Sequence[str], option: str) -> str:
    return words[list(words).index(option) + 1]


def test_without_ssh_each_host_starts_its_own_ranks(asked: dict[str, str], tmp_path: Path) -> None:
    made = make_launch("deepspeed", RUN, {**asked, "NO_SSH": "1", "NODE_RANK": "1", "MASTER_ADDR": OWN})
    same_for_all(made, tmp_path, world_size=4)
    assert (made.node, list(made.hosts), made.srun) == (1, [], False)
    assert "deepspeed.launcher.launch" in made.command
    assert (value(made.command, "--node_rank"), value(made.command, "--master_addr")) == ("1", OWN)


@pytest.mark.parametrize(
    ("variables", "options", "node"),
    [
        ({"NODES": "2", "NODE_RANK": "1"}, {"--nnodes": "2", "--node-rank": "1", "--master-port": "29512"}, 1),
        (
            {"NODES": "2:4", "RENDEZVOUS": "c10d", "JOB_ID": "job", "MAX_RESTARTS": "5"},
            {"--nnodes": "2:4", "--rdzv-id": "job", "--max-restarts": "5", "--rdzv-endpoint": f"{OWN}:29512"},
            None,
        ),
    ],
    ids=["static", "c10d"],
)
def test_torchrun_gets_the_nodes_and_their_rendezvous(
    asked: dict[str, str], tmp_path: Path, variables: dict[str, str], options: dict[str, str], node: int | None
) -> None:
    del asked["HOSTFILE"]
    run = RankCommand("sfd_scale", (*RUN.arguments, "train.global_batch=96"))
    made = make_launch("torchrun", run, {**asked, "RANKS": "2", "MASTER_ADDR": OWN, **variables})
    same_for_all(made, tmp_path, world_size=4)
    assert {name: value(made.command, name) for name in options} == options
    assert made.node == node and value(made.command, "--nproc-per-node") == "2"
    assert made.environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "40"
    assert list(made.command)[-6:] == [agent.RANK_FILE, "sfd_scale", *run.arguments]
