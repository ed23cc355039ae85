"""The launcher's commands for one host: `python agent.py COMMAND JSON`, which prints one line of JSON.

`describe` reports what a launch needs to know about the host. `signal` signals the ranks of a launch. Both run here or
over ssh.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import signal
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import psutil

from sfd_scale import config
from sfd_scale.launch import status
from sfd_scale.runtime import network
from sfd_scale.runtime.environment import text

RANK_FILE = str(Path(__file__).with_name("rank.py"))
# These must have the same version on all hosts: otherwise results may differ, or collectives may hang.
COMPARED_PACKAGES = ("torch", "deepspeed", "mosaicml-streaming")


def describe(recipe: str | None, overrides: list[str], log_folder: str, peer: str | None) -> dict[str, Any]:
    """This host's address and interface, recipe digest, versions and GPUs, and whether it sees the log folder.

    Args:
        peer: a name or address of another host of the launch; None for a launch on one host.
    """
    found: dict[str, Any] = {"host": socket.gethostname(), "python": sys.version.split()[0], "recipe": None}
    found["packages"] = {name: importlib.metadata.version(name) for name in COMPARED_PACKAGES}
    found["shared"] = Path(log_folder).is_dir()
    found["gpus"] = gpu_count()
    try:
        if recipe is not None:
            found["recipe"] = config.digest(config.tree(recipe, overrides))
        if peer is not None:
            found["address"] = network.source_address(peer)
            found["interface"] = network.interface_of(found["address"])
    except ValueError as error:
        found["problem"] = str(error)
    return found


def gpu_count() -> int:
    """Number of GPUs of this host, without loading CUDA. Some containers show GPUs only as device files."""
    listed = Path("/proc/driver/nvidia/gpus")
    return max(len(list(listed.iterdir())) if listed.is_dir() else 0, len(list(Path("/dev").glob("nvidia[0-9]*"))))


def find_ranks(launch: str, node: int | None = None) -> list[psutil.Process]:
    """The rank processes of a launch on this host, without their child processes.

    Args:
        node: only ranks of this node; needed if several nodes share one process table.
    """
    return _without_children(process for process in psutil.process_iter() if _is_rank(process, launch, node))


def _without_children(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    found = {process.pid: process for process in processes}
    return [process for process in found.values() if _parent(process) not in found]


def _is_rank(process: psutil.Process, launch: str, node: int | None) -> bool:
    try:
        words = process.cmdline()[1:]
        if words[:1] != [RANK_FILE] and words[:2] != ["-u", RANK_FILE]:  # a launcher has it among its later arguments
            return False
        environment = process.environ()
    except (psutil.Error, OSError):
        return False
    if environment.get(status.LAUNCH_ID) != launch:
        return False
    own = text("CROSS_RANK", environment) or text("GROUP_RANK", environment)
    return node is None or own is None or own == str(node)


def _parent(process: psutil.Process) -> int:
    try:
        return process.ppid()
    except psutil.Error:
        return 0


def signal_ranks(launch: str, signum: int, node: int | None = None) -> int:
    """Signal every rank of a launch on this host; returns their number. Signal 0 only counts. SIGKILL kills their
    child processes too."""
    found = find_ranks(launch, node)
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            if signum == signal.SIGKILL:
                for child in process.children(recursive=True):
                    child.kill()
            process.send_signal(signum)
    return len(found)


def signal_srun(launch: str, signum: int) -> int:
    """Signal Slurm's srun of a launch; returns the number of srun processes. Signal 0 only counts.

    srun forwards signals to its tasks. If srun itself is killed, a child of srun kills the tasks. So the child must not
    be signalled.
    """
    found = _without_children(process for process in psutil.process_iter() if _is_srun(process, launch))
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signum)
    return len(found)


def _is_srun(process: psutil.Process, launch: str) -> bool:
    try:
        return process.name() == "srun" and process.environ().get(status.LAUNCH_ID) == launch
    except (psutil.Error, OSError):
        return False


def main() -> None:
    command, arguments = sys.argv[1], json.loads(sys.argv[2])
    answer: Any = describe(**arguments) if command == "describe" else signal_ranks(**arguments)
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
