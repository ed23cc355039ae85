"""The address and network interface of this host on the route to another host.

A host's own name often resolves to the loopback address; gloo and NCCL would then offer that to other hosts. So the
interface is taken from the route to rank 0, not from a name.
"""

from __future__ import annotations

import ipaddress
import socket
import sys
import time
from collections.abc import MutableMapping

from sfd_scale.runtime import environment as variables

# Any port: connecting a UDP socket only looks up the route and sends nothing.
_PORT = 9


def resolve(host: str, patience_s: float = 0.0) -> str:
    """The address of a host name, or the address itself.

    Args:
        patience_s: retry for so long; some names resolve only when their host is up.

    Raises:
        ValueError: if the name does not resolve.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return str(socket.getaddrinfo(host, _PORT, type=socket.SOCK_DGRAM)[0][4][0])
        except OSError as error:
            if time.monotonic() >= deadline:
                raise ValueError(
                    f"{host}: this host name does not resolve ({error}); use an address, or add the name to /etc/hosts"
                ) from error
        time.sleep(1)


def is_loopback(host: str) -> bool:
    return ipaddress.ip_address(resolve(host).split("%")[0]).is_loopback


def source_address(peer: str) -> str:
    """The address of this host on the route to `peer`.

    Raises:
        ValueError: if there is no route.
    """
    address = resolve(peer)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as udp:
        try:
            udp.connect((address, _PORT))
        except OSError as error:
            raise ValueError(f"{peer}: no route from {socket.gethostname()} ({error})") from error
        return str(udp.getsockname()[0])


def interface_of(address: str) -> str | None:
    """The network interface of this host that has the address, or None."""
    import psutil  # here, because benchmarks/gpu imports this package on machines without psutil

    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.split("%")[0] == address for entry in entries):
            return name
    return None


def is_here(host: str) -> bool:
    """Whether a host name or address belongs to this host."""
    return interface_of(resolve(host)) is not None


def set_interfaces(environment: MutableMapping[str, str]) -> None:
    """Set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface that reaches MASTER_ADDR, unless they are set.

    Does nothing if MASTER_ADDR is a loopback address: all ranks are then on this host.
    """
    master = variables.text("MASTER_ADDR", environment) or "127.0.0.1"
    if is_loopback(master):
        return
    # On the host of rank 0 the route to MASTER_ADDR is the loopback; take the interface that has the address.
    name = interface_of(resolve(master)) or interface_of(source_address(master))
    if name is not None:
        # For NCCL a bare name is a prefix: eth1 would also be eth10.
        for variable, value in (("GLOO_SOCKET_IFNAME", name), ("NCCL_SOCKET_IFNAME", f"={name}")):
            if variables.text(variable, environment) is None:
                environment[variable] = value


if __name__ == "__main__":  # for launchers/slurm.sbatch: prints this host's address on the route to HOST
    sys.stdout.write(f"{source_address(sys.argv[1])}\n")
