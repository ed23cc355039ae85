"""A real Slurm for tests: munged, slurmctld and one slurmd on each of a few hosts made from network namespaces.

Slurm's own files lie below one folder of the test, so a Slurm that the machine already runs is left alone.
"""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.helpers.hosts import NetworkHost, linked_hosts

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "sinfo")
PACKAGES = "slurm-wlm munge"
DAEMONS = ("munged", "slurmctld", "slurmscriptd", "slurmd")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"}
# A requeued job waits until the credential of its last start is over: 120 s by default.
CREDENTIAL_S = 15


@dataclass(frozen=True)
class Slurm:
    """A cluster; the first host runs slurmctld, and users log in there."""

    hosts: Sequence[NetworkHost]
    config: Path

    def run(self, *command: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> str:
        """A command of a user of the cluster; returns its output."""
        variables = {**(environment or os.environ), "SLURM_CONF": str(self.config)}
        done = subprocess.run(
            self.hosts[0].command(*command), cwd=cwd, env=variables, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, ExitCode, …"""
        text = self.run("scontrol", "--oneliner", "show", "job", str(number))
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def wait_for(self, number: int, states: set[str], timeout_s: float = 300) -> dict[str, str]:
        """Wait until the job is in one of the states; returns what `job` says. A job that ended otherwise fails."""
        deadline = time.monotonic() + timeout_s
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < deadline and job["JobState"] not in ENDED, job
            time.sleep(0.5)
        return job

    def processes(self) -> list[psutil.Process]:
        """All processes on the hosts besides Slurm's daemons."""
        found = []
        for host in self.hosts:
            pids = subprocess.run(["ip", "netns", "pids", host.namespace], capture_output=True, text=True, check=True)
            for pid in pids.stdout.split():
                with suppress(psutil.NoSuchProcess):
                    process = psutil.Process(int(pid))
                    found += [process] if process.name() not in DAEMONS else []
        return found


@contextmanager
def slurm(count: int, folder: Path) -> Iterator[Slurm]:
    """A Slurm cluster of `count` hosts with one CPU each; skips the test where it cannot be started.

    All that it starts runs in the namespaces of the hosts and ends with them.
    """
    with linked_hosts(count, PROGRAMS, PACKAGES) as hosts:
        # As on a cluster with DNS: other hosts by their address, while the own name stays on the loopback.
        for host in hosts:
            others = [f"{other.address} {other.name}\n" for other in hosts if other is not host]
            with Path("/etc/netns", host.namespace, "hosts").open("a") as names:
                names.writelines(others)
        cluster = Slurm(hosts, _configure(hosts, folder))
        _start_munged(hosts[0], folder)
        for host, daemon in [(hosts[0], ["slurmctld"]), *((host, ["slurmd", "-N", host.name]) for host in hosts)]:
            with (folder / f"{daemon[0]}-{host.name}.out").open("w") as out:
                subprocess.Popen(
                    host.command(*daemon, "-D", "-f", str(cluster.config)), stdout=out, stderr=subprocess.STDOUT
                )
        _wait_until_idle(cluster, folder)
        yield cluster


def _configure(hosts: Sequence[NetworkHost], folder: Path) -> Path:
    (folder / "state").mkdir()
    nodes = [f"NodeName={host.name} NodeAddr={host.address} CPUs=1 State=UNKNOWN\n" for host in hosts]
    # Without a name slurmd looks for mounted cgroups, and ends: `ip netns exec` hides them. Nothing here uses them.
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    path = folder / "slurm.conf"
    path.write_text(
        f"ClusterName=sfd\nSlurmctldHost={hosts[0].name}({hosts[0].address})\nSlurmUser=root\nSlurmdUser=root\n"
        f"AuthType=auth/munge\nAuthInfo=socket={folder}/munge.socket,cred_expire={CREDENTIAL_S}\n"
        f"StateSaveLocation={folder}/state\nSlurmdSpoolDir={folder}/spool-%n\n"
        f"SlurmctldPidFile={folder}/slurmctld.pid\nSlurmdPidFile={folder}/slurmd-%n.pid\n"
        # linuxproc works without cgroups; config_overrides lets a node have fewer CPUs than the machine.
        "ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nMpiDefault=none\nSwitchType=switch/none\n"
        "SelectType=select/cons_tres\nSelectTypeParameters=CR_Core\nSlurmdParameters=config_overrides\n"
        "SchedulerParameters=sched_interval=2,bf_interval=2\n"
        f"ReturnToService=2\n{''.join(nodes)}PartitionName=main Nodes=ALL Default=YES State=UP\n"
    )
    return path


def _start_munged(host: NetworkHost, folder: Path) -> None:
    """All hosts use one munged: a socket in the file system is reached from every network namespace."""
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    files = {
        "key-file": key, "socket": folder / "munge.socket", "pid-file": folder / "munge.pid",
        "log-file": folder / "munge.log", "seed-file": folder / "munge.seed",
    }  # fmt: skip
    options = [f"--{name}={path}" for name, path in files.items()]
    # --force: below /tmp munged would refuse a folder that all users may write to.
    subprocess.run(host.command("munged", "--force", *options), check=True, capture_output=True)


def _wait_until_idle(cluster: Slurm, folder: Path) -> None:
    deadline = time.monotonic() + 60
    states: list[str] = []
    while states != ["idle"] * len(cluster.hosts):
        logs = "".join(path.read_text()[-2000:] for path in sorted(folder.glob("*.out")))
        assert time.monotonic() < deadline, f"Slurm's nodes do not become idle: {states}\n{logs}"
        time.sleep(0.5)
        command = cluster.hosts[0].command("sinfo", "--noheader", "--Node", "--format=%t")
        variables = {**os.environ, "SLURM_CONF": str(cluster.config)}
        states = subprocess.run(command, env=variables, capture_output=True, text=True).stdout.split()
