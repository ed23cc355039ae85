"""Hosts for multi-node tests: network namespaces on one bridge, each with its own address and name.

`network` also starts an sshd on each host.

The name of a host resolves to its own loopback address, as on Debian and many clusters.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def why_not(programs: Sequence[str], packages: str) -> str | None:
    """Why this machine cannot run such hosts, or None if it can.

    Args:
        programs: needed in addition to `ip` and `unshare`.
        packages: the Debian packages of the programs.
    """
    missing = [name for name in ("ip", "unshare", *programs) if not shutil.which(name)]
    if missing:
        return f"not installed: {', '.join(missing)}; install the packages iproute2 {packages}"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"sfd-try-{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if done.returncode:
        return f"network namespaces are not allowed here: {done.stderr.strip()}"
    entered = subprocess.run(["ip", "netns", "exec", name, "true"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], check=False)
    return f"network namespaces cannot be entered here: {entered.stderr.strip()}" if entered.returncode else None


@dataclass(frozen=True)
class NetworkHost:
    name: str
    address: str
    namespace: str

    def command(self, *words: str) -> list[str]:
        """The command that runs `words` on this host."""
        inside = ["unshare", "--uts", "sh", "-c", f'hostname {self.name}; exec "$@"', "sh", *words]
        return ["ip", "netns", "exec", self.namespace, *inside]

    def kill(self) -> None:
        """Kill all processes of the host, also its sshd."""
        for pid in _run("ip", "netns", "pids", self.namespace).split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue


@dataclass(frozen=True)
class Network:
    """private: a folder that is empty on all hosts but the first."""

    hosts: Sequence[NetworkHost]
    ssh_config: Path
    private: Path

    def hostfile(self, path: Path, slots: int = 1, count: int | None = None) -> Path:
        path.write_text("".join(f"{host.name} slots={slots}\n" for host in self.hosts[:count]))
        return path


@contextmanager
def network(count: int, folder: Path) -> Iterator[Network]:
    """Start `count` hosts with an sshd each; skips the test if this machine cannot run them."""
    private = folder / "private"
    private.mkdir()
    with linked_hosts(count, ("sshd", "ssh", "ssh-keygen", "pdsh"), "openssh-server pdsh") as hosts:
        config = _ssh(folder, hosts)
        for number, host in enumerate(hosts):
            start = f'exec "{shutil.which("sshd")}" -f "{folder / host.name}.sshd"'
            hidden = f'mount -t tmpfs none "{private}"; ' if number else ""
            subprocess.run(host.command("sh", "-c", f"{hidden}{start}"), check=True)
        for host in hosts:
            _wait_for(hosts[0], host, config)
        yield Network(hosts, config, private)


@contextmanager
def linked_hosts(count: int, programs: Sequence[str], packages: str) -> Iterator[list[NetworkHost]]:
    """`count` hosts, node-a, node-b, …; skips the test where there can be none (arguments: see `why_not`)."""
    reason = why_not(programs, packages)
    if reason is not None:
        pytest.skip(reason)
    tag = f"sfd{os.getpid()}"
    switch = f"{tag}-switch"
    hosts = [NetworkHost(f"node-{'abcdefgh'[n]}", f"10.77.0.{n + 1}", f"{tag}-{n}") for n in range(count)]
    try:
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        for number, host in enumerate(hosts):
            _attach(host, switch, f"port{number}")
        yield hosts
    finally:
        for host in hosts:
            if Path("/run/netns", host.namespace).exists():
                host.kill()
            subprocess.run(["ip", "netns", "del", host.namespace], check=False, capture_output=True)
            shutil.rmtree(Path("/etc/netns", host.namespace), ignore_errors=True)
        subprocess.run(["ip", "netns", "del", switch], check=False, capture_output=True)


def _attach(host: NetworkHost, switch: str, port: str) -> None:
    _run("ip", "netns", "add", host.namespace)
    own = Path("/etc/netns", host.namespace)  # `ip netns exec` mounts the files of this folder over /etc
    own.mkdir(parents=True)
    (own / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {host.name}\n")
    _run("ip", "-n", switch, "link", "add", port, "type", "veth", "peer", "name", "fab0", "netns", host.namespace)
    _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
    for command in (["link", "set", "lo", "up"], ["addr", "add", f"{host.address}/24", "dev", "fab0"]):
        _run("ip", "-n", host.namespace, *command)
    _run("ip", "-n", host.namespace, "link", "set", "fab0", "up")


def _ssh(folder: Path, hosts: Sequence[NetworkHost]) -> Path:
    """Write keys, an sshd configuration for each host, and an ssh configuration for all."""
    Path("/run/sshd").mkdir(exist_ok=True)
    for name in ("host_key", "user_key"):
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
    for host in hosts:
        (folder / f"{host.name}.sshd").write_text(
            f"Port 22\nListenAddress {host.address}\nHostKey {folder}/host_key\nPidFile {folder}/{host.name}.pid\n"
            f"AuthorizedKeysFile {folder}/user_key.pub\nStrictModes no\nUsePAM no\nPermitRootLogin yes\n"
            "PasswordAuthentication no\nMaxStartups 100\n"
        )
    entries = [f"Host {host.name}\n  HostName {host.address}\n" for host in hosts]
    config = folder / "ssh_config"
    config.write_text(
        f"{''.join(entries)}Host *\n  User root\n  IdentityFile {folder}/user_key\n  StrictHostKeyChecking no\n"
        "  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    )
    return config


def _wait_for(first: NetworkHost, host: NetworkHost, config: Path) -> None:
    deadline = time.monotonic() + 60
    command = first.command(
        "ssh", "-F", str(config), "-o", "ConnectTimeout=5", "-o", "BatchMode=yes", host.name, "true"
    )
    while (done := subprocess.run(command, capture_output=True, text=True)).returncode:
        assert time.monotonic() < deadline, done.stderr
        time.sleep(0.2)
