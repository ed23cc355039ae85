"""The hosts of a launch: read from a hostfile, and checked over ssh before the launch."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfd_scale.runtime.environment import text
from sfd_scale.runtime.files import read_text

# A launch keeps lists of its ranks: a number that cannot be is refused before they take the memory of the host.
MOST_RANKS, MOST_NODES = 1024, 100_000  # ranks of a host; hosts of a launch
# ssh would take a leading dash for an option. IPv6 addresses have colons, a port has one.
_NAME = re.compile(r"([\w.-]+@)?(\w[\w.-]*|[0-9A-Fa-f]*:[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(%\w+)?)")
AGENT = str(Path(__file__).with_name("agent.py"))
# With these a dead host is noticed within a minute.
SSH_OPTIONS = "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=4"


@dataclass(frozen=True)
class Host:
    name: str
    slots: int


def read_hostfile(path: Path) -> list[Host]:
    """Read a hostfile: lines of `host slots=N`, comments and blank lines.

    Raises:
        ValueError: if the file is missing, a line is malformed or repeated, or the hosts have different slot counts.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such hostfile; write one line per host: NAME slots=GPUS")
    hosts: list[Host] = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\d{1,9})", line)
        if match is None:
            raise ValueError(f"{path}, line {number}: {line!r}; allowed: NAME slots=GPUS")
        name, slots = match[1], int(match[2])
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"{path}, line {number}: {name!r}; allowed: a name or an address, perhaps after USER@; ports and other "
                "options of ssh stand in ~/.ssh/config"
            )
        if slots < 1:
            raise ValueError(f"{path}, line {number}: {name} has 0 slots; allowed: 1 and up, or leave the host out")
        if slots > MOST_RANKS:
            raise ValueError(f"{path}, line {number}: {name} has {slots} slots; allowed: 1 to {MOST_RANKS}")
        if name in {host.name for host in hosts}:
            raise ValueError(f"{path}, line {number}: {name} occurs twice; give it one line with all its slots")
        hosts.append(Host(name, slots))
    if not hosts:
        raise ValueError(f"{path}: no hosts; write one line per host: NAME slots=GPUS")
    counts = {host.slots for host in hosts}
    if len(counts) > 1:
        listed = ", ".join(f"{host.name} has {host.slots}" for host in hosts)
        raise ValueError(
            f"{path}: hosts with different numbers of slots ({listed}); give every host {min(counts)}: the rank groups "
            "of HSDP and ZeRO++ need hosts of equal size"
        )
    return hosts


def ssh_arguments(environment: Mapping[str, str]) -> str:
    """The options of every ssh and pdsh call of a launch: the user's PDSH_SSH_ARGS_APPEND, then SSH_OPTIONS."""
    return f"{text('PDSH_SSH_ARGS_APPEND', environment) or ''} {SSH_OPTIONS}".strip()


def ask(host: Host, ssh: str, command: str, arguments: Mapping[str, Any], timeout_s: float = 60.0) -> Any:
    """Run a command of the agent (launch/agent.py) on a host; returns its answer.

    Raises:
        ValueError: if the host is not reachable, or has no checkout or Python environment at this path.
    """
    folder, here = shlex.quote(os.getcwd()), shlex.quote(str(Path(AGENT).parents[2]))
    call = shlex.join([sys.executable, AGENT, command, json.dumps(arguments)])
    remote = f"cd {folder} && PYTHONPATH={here} {call}"
    try:
        done = subprocess.run(
            ["ssh", *shlex.split(ssh), host.name, remote],
            stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace",
            timeout=timeout_s,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ValueError(
            f"{host.name}: no answer over ssh within {timeout_s:.0f} s; remove it from the hostfile"
        ) from error
    said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if done.returncode == 255:
        raise ValueError(
            f"{host.name}: not reachable by ssh without a password ({said}); check `ssh {host.name}`, or remove it "
            "from the hostfile"
        )
    if done.returncode != 0:
        raise ValueError(
            f"{host.name}: cannot run {sys.executable} in {os.getcwd()} ({said}); every host needs the checkout and "
            "its environment at the same path"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def ask_each(hosts: Sequence[Host], ssh: str, command: str, arguments: Sequence[Mapping[str, Any]]) -> list[Any]:
    """`ask` all hosts in parallel; returns their answers, or a ValueError for a host that does not answer."""

    def answer(host: Host, argument: Mapping[str, Any]) -> Any:
        try:
            return ask(host, ssh, command, argument)
        except ValueError as error:
            return error

    with ThreadPoolExecutor(max_workers=min(len(hosts), 64)) as pool:
        return list(pool.map(answer, hosts, arguments))


def preflight(
    hosts: Sequence[Host], ssh: str, recipe: str | None, overrides: Sequence[str], log_folder: Path, cpu: bool
) -> str:
    """Check every host before a launch; returns the address at which the others reach the first host.

    Raises:
        ValueError: names each host that cannot run the launch, and the reason.
    """
    if shutil.which("ssh") is None:
        raise ValueError("ssh: not installed here; install openssh-client, or start each host with NO_SSH=1")
    names = [_ssh_name(host, ssh) for host in hosts]
    # The first host looks up its route to the second, the others theirs to the first. Own names are not resolved.
    peers = [names[min(1, len(names) - 1)], *[names[0]] * (len(names) - 1)]
    shared = {"recipe": recipe, "overrides": list(overrides), "log_folder": str(log_folder)}
    answers = ask_each(hosts, ssh, "describe", [{**shared, "peer": name} for name in peers])
    problems = [str(answer) for answer in answers if isinstance(answer, ValueError)]
    if problems:
        raise ValueError("; ".join(problems))
    first = answers[0]
    for host, answer in zip(hosts, answers, strict=True):
        if "problem" in answer:
            problems.append(f"{host.name}: {answer['problem']}")
        elif answer["recipe"] != first["recipe"]:
            problems.append(f"{host.name}: its {recipe} differs from that of {hosts[0].name}; update the checkouts")
        if answer["packages"] != first["packages"] or answer["python"] != first["python"]:
            problems.append(f"{host.name}: {_versions(answer)}, but {hosts[0].name} has {_versions(first)}")
        if not answer["shared"]:
            problems.append(f"{host.name}: does not see {log_folder}; put the run folder on a shared file system")
        if not cpu and answer["gpus"] < host.slots:
            problems.append(
                f"{host.name}: slots={host.slots}, but it has {answer['gpus']} GPUs; to train on the CPU set "
                "DS_ACCELERATOR=cpu"
            )
    if problems:
        raise ValueError("; ".join(problems))
    address: str = first["address"]
    return address


def _versions(answer: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {version}" for name, version in {"python": answer["python"], **answer["packages"]}.items()
    )


def _ssh_name(host: Host, ssh: str) -> str:
    """The host name that ssh_config gives for an alias."""
    command = ["ssh", *shlex.split(ssh), "-G", host.name]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace", timeout=60
        )
    except subprocess.TimeoutExpired as error:  # ssh_config may run commands
        raise ValueError(f"{host.name}: `{shlex.join(command)}` does not end; check ssh_config") from error
    lines = (line.split(maxsplit=1) for line in done.stdout.splitlines())
    return next((words[1] for words in lines if len(words) == 2 and words[0] == "hostname"), host.name)
