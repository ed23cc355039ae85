"""Two hosts on one cable: each rank in a network namespace of its own. Needs root and iproute2."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INTERFACE = "cable"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Cable:
    """The link between the hosts, whose addresses are 10.77.3.1 and 10.77.3.2."""

    def __init__(self, names: tuple[str, str]) -> None:
        self.names = names

    @property
    def environment(self) -> dict[str, str]:
        """Of the ranks; rank 0 is on the first host."""
        return {"MASTER_ADDR": "10.77.3.1", "GLOO_SOCKET_IFNAME": INTERFACE, "TP_SOCKET_IFNAME": INTERFACE}

    def enter(self) -> None:
        """Move this process to the host of its rank."""
        with Path("/var/run/netns", self.names[int(os.environ["RANK"])]).open() as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0):
                raise OSError(ctypes.get_errno(), "setns")

    def cut(self) -> None:
        _ip("-n", self.names[1], "link", "set", INTERFACE, "down")

    def mend(self) -> None:
        _ip("-n", self.names[1], "link", "set", INTERFACE, "up")


@contextmanager
def cable() -> Iterator[Cable]:
    names = (f"sfd-a-{os.getpid()}", f"sfd-b-{os.getpid()}")
    try:
        for name in names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", names[0], "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", names[1])
        for number, name in enumerate(names, 1):
            _ip("-n", name, "addr", "add", f"10.77.3.{number}/24", "dev", INTERFACE)
            _ip("-n", name, "link", "set", INTERFACE, "up")
        yield Cable(names)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
