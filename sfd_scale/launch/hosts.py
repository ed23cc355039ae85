"""The hosts of a launch: read from a hostfile, and asked over ssh whether they can take part."""

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

AGENT = str(Path(__file__).with_name("agent.py"))
# A host that loses its power is noticed within a minute.
SSH_OPTIONS = "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=4"


@dataclass(frozen=True)
class Host:
    name: str
    slots: int


def read_hostfile(path: Path) -> list[Host]:
    """Lines of `host slots=N`; comments and blank lines are allowed.

    Raises:
        ValueError: for a missing file, a bad or repeated line, no slots, or hosts with different numbers of them.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such hostfile; write one line a host: NAME slots=GPUS")
    hosts: list[Host] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)", line)
        if match is None:
            raise ValueError(f"{path}, line {number}: {line!r}; allowed: NAME slots=GPUS")
        name, slots = match[1], int(match[2])
        if slots < 1:
            raise ValueError(f"{path}, line {number}: {name} has 0 slots; allowed: 1 and up, or leave the host out")
        if name in {host.name for host in hosts}:
            raise ValueError(f"{path}, line {number}: {name} is there twice; give it one line with all its slots")
        hosts.append(Host(name, slots))
    if not hosts:
        raise ValueError(f"{path}: no hosts; write one line a host: NAME slots=GPUS")
    counts = {host.slots for host in hosts}
    if len(counts) > 1:
        listed = ", ".join(f"{host.name} has {host.slots}" for host in hosts)
        raise ValueError(
            f"{path}: hosts with different numbers of slots ({listed}); give every host {min(counts)}: groups of ranks "
            "(HSDP, ZeRO++) are made of whole hosts of one size"
        )
    return hosts


def ssh_arguments(environment: Mapping[str, str]) -> str:
    """Options of every ssh of a launch, pdsh's too: the user's PDSH_SSH_ARGS_APPEND, then ours."""
    return f"{environment.get('PDSH_SSH_ARGS_APPEND', '')} {SSH_OPTIONS}".strip()


def ask(host: Host, ssh: str, command: str, arguments: Mapping[str, Any], timeout_s: float = 60.0) -> Any:
    """One answer of the agent on a host.

    Raises:
        ValueError: with the reason, where the host or what has to be on it is not there.
    """
    folder, here = shlex.quote(os.getcwd()), shlex.quote(str(Path(AGENT).parents[2]))
    call = shlex.join([sys.executable, AGENT, command, json.dumps(arguments)])
    remote = f"cd {folder} && PYTHONPATH={here} {call}"
    try:
        done = subprocess.run(
            ["ssh", *shlex.split(ssh), host.name, remote],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ValueError(
            f"{host.name}: no answer over ssh within {timeout_s:.0f} s; take it out of the hosts"
        ) from error
    said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if done.returncode == 255:
        raise ValueError(
            f"{host.name}: not reachable by ssh without a password ({said}); check `ssh {host.name}`, or take it out"
        )
    if done.returncode != 0:
        raise ValueError(
            f"{host.name}: cannot run {sys.executable} in {os.getcwd()} ({said}); every host needs the checkout and "
            "its environment at the same path"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def ask_each(hosts: Sequence[Host], ssh: str, command: str, arguments: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The answers of all hosts at once, by host; in the place of an answer, the ValueError of a host without one."""

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
    """Ask every host whether it can take part; returns the address of the first one that the others reach it by.

    Raises:
        ValueError: naming the hosts that cannot, and why.
    """
    if shutil.which("ssh") is None:
        raise ValueError("ssh: not installed here; install openssh-client, or start each host with NO_SSH=1")
    names = [_ssh_name(host, ssh) for host in hosts]
    # The first host towards the second, the others towards the first: no host has to know its own name.
    towards = [names[min(1, len(names) - 1)], *[names[0]] * (len(names) - 1)]
    shared = {"recipe": recipe, "overrides": list(overrides), "log_folder": str(log_folder)}
    answers = ask_each(hosts, ssh, "probe", [{**shared, "towards": name} for name in towards])
    problems = [str(answer) for answer in answers if isinstance(answer, ValueError)]
    if problems:
        raise ValueError("; ".join(problems))
    first = answers[0]
    for host, answer in zip(hosts, answers, strict=True):
        if "problem" in answer:
            problems.append(f"{host.name}: {answer['problem']}")
        elif answer["recipe"] != first["recipe"]:
            problems.append(f"{host.name}: another {recipe} than on {hosts[0].name}; bring the checkouts in line")
        if answer["packages"] != first["packages"] or answer["python"] != first["python"]:
            problems.append(f"{host.name}: {_versions(answer)}, but {hosts[0].name} has {_versions(first)}")
        if not answer["shared"]:
            problems.append(f"{host.name}: does not see {log_folder}; put the run folder on a shared file system")
        if not cpu and answer["gpus"] < host.slots:
            problems.append(f"{host.name}: slots={host.slots}, but it has {answer['gpus']} GPUs (DS_ACCELERATOR=cpu?)")
    if problems:
        raise ValueError("; ".join(problems))
    address: str = first["address"]
    return address


def _versions(answer: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {version}" for name, version in {"python": answer["python"], **answer["packages"]}.items()
    )


def _ssh_name(host: Host, ssh: str) -> str:
    """The host name behind an alias of ssh_config."""
    done = subprocess.run(
        ["ssh", *shlex.split(ssh), "-G", host.name], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    lines = (line.split(maxsplit=1) for line in done.stdout.splitlines())
    return next((words[1] for words in lines if len(words) == 2 and words[0] == "hostname"), host.name)
