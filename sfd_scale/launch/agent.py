"""What the launcher does on one host, here or over ssh: `python agent.py COMMAND JSON`, answered by one line of JSON.

`probe` says whether the host can take part, before anything starts; `signal` reaches the ranks of a launch.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import psutil

from sfd_scale import config
from sfd_scale.launch import status
from sfd_scale.runtime import network

RANK_FILE = str(Path(__file__).with_name("rank.py"))
# Another release of one of these on one host is another numeric result at best, and a hang at worst.
COMPARED = ("torch", "deepspeed", "mosaicml-streaming")


def probe(recipe: str | None, overrides: list[str], log_folder: str, towards: str | None) -> dict[str, Any]:
    """This host's share of a launch: address and interface, recipe, versions, GPUs, and whether it sees the log folder.

    Args:
        towards: a host or address of the others; None on one host alone.
    """
    found: dict[str, Any] = {"host": socket.gethostname(), "python": sys.version.split()[0], "recipe": None}
    found["packages"] = {name: importlib.metadata.version(name) for name in COMPARED}
    found["shared"] = Path(log_folder).is_dir()
    found["gpus"] = gpu_count()
    try:
        if recipe is not None:
            found["recipe"] = config.digest(config.tree(recipe, overrides))
        if towards is not None:
            found["address"] = network.source_address(towards)
            found["interface"] = network.interface_of(found["address"])
    except ValueError as error:
        found["problem"] = str(error)
    return found


def gpu_count() -> int:
    """GPUs of this host, without loading CUDA; some containers show them only as devices."""
    listed = Path("/proc/driver/nvidia/gpus")
    return max(len(list(listed.iterdir())) if listed.is_dir() else 0, len(list(Path("/dev").glob("nvidia[0-9]*"))))


def ranks(launch: str, node: int | None = None) -> list[psutil.Process]:
    """The ranks of a launch on this host, not the processes that they started; of one node, where hosts share one
    table of processes."""
    found = {process.pid: process for process in psutil.process_iter() if _is_rank(process, launch, node)}
    return [process for process in found.values() if _parent(process) not in found]


def _is_rank(process: psutil.Process, launch: str, node: int | None) -> bool:
    try:
        words = process.cmdline()[1:]
        if words[:1] != [RANK_FILE] and words[:2] != ["-u", RANK_FILE]:  # launchers have it further on
            return False
        environment = process.environ()
    except (psutil.Error, OSError):
        return False
    if environment.get(status.LAUNCH_ID) != launch:
        return False
    own = environment.get("CROSS_RANK", environment.get("GROUP_RANK"))
    return node is None or own is None or int(own) == node


def _parent(process: psutil.Process) -> int:
    try:
        return process.ppid()
    except psutil.Error:
        return 0


def send(launch: str, signum: int, node: int | None = None) -> int:
    """Signal every rank of a launch on this host, all at once; returns how many there are. Signal 0 only counts."""
    found = ranks(launch, node)
    for process in found:
        try:
            if signum == signal.SIGKILL:
                for child in process.children(recursive=True):
                    child.kill()
            process.send_signal(signum)
        except psutil.NoSuchProcess:
            pass
    return len(found)


def main() -> None:
    command, arguments = sys.argv[1], json.loads(sys.argv[2])
    answer: Any = probe(**arguments) if command == "probe" else send(**arguments)
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
