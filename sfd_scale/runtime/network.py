"""Which address and which interface this host has towards another one.

A host's own name often resolves to the loopback address, and gloo and NCCL then offer that to the other hosts: so the
interface is read from the route to the address of rank 0, and never from a name.
"""

from __future__ import annotations

import ipaddress
import socket
import sys
import time
from collections.abc import MutableMapping

# Any port will do: connecting a UDP socket sends nothing, it only asks for the route.
_PORT = 9


def resolve(host: str, patience_s: float = 0.0) -> str:
    """The address of a host name, or the address itself.

    Args:
        patience_s: ask again for so long, where a name comes to be known when its host is up.

    Raises:
        ValueError: for a name that this host does not know.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return str(socket.getaddrinfo(host, _PORT, type=socket.SOCK_DGRAM)[0][4][0])
        except OSError as error:
            if time.monotonic() >= deadline:
                raise ValueError(
                    f"{host}: no such host name here ({error}); use an address, or add it to /etc/hosts"
                ) from error
        time.sleep(1)


def is_loopback(host: str) -> bool:
    return ipaddress.ip_address(resolve(host).split("%")[0]).is_loopback


def source_address(peer: str) -> str:
    """The address of this host from which it reaches `peer`.

    Raises:
        ValueError: where there is no route.
    """
    address = resolve(peer)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, _PORT))
        except OSError as error:
            raise ValueError(f"{peer}: no route from {socket.gethostname()} ({error})") from error
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """The interface of this host that has the address, or None."""
    import psutil  # a GPU machine without the other packages measures speed with this room

    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.split("%")[0] == address for entry in entries):
            return name
    return None


def is_here(host: str) -> bool:
    """Whether a host name or address is one of this host's."""
    return interface_of(resolve(host)) is not None


def set_interfaces(environment: MutableMapping[str, str]) -> None:
    """Set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface towards MASTER_ADDR, where they are not set.

    On one host alone (a loopback MASTER_ADDR) both libraries find their way by themselves.
    """
    master = environment.get("MASTER_ADDR", "127.0.0.1")
    if is_loopback(master):
        return
    # The route of a host to itself is the loopback: there the interface is the one that has the address.
    name = interface_of(resolve(master)) or interface_of(source_address(master))
    if name is not None:
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            environment.setdefault(variable, name)


if __name__ == "__main__":  # for launchers/slurm.sbatch: this host's address towards another one
    sys.stdout.write(f"{source_address(sys.argv[1])}\n")
