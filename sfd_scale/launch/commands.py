"""From the environment and `COMMAND RECIPE [key=value ...]` to a launch, with everything checked that can be before.

No training option lives here: what a rank runs is passed on as it was given.
"""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from sfd_scale import config
from sfd_scale.launch import agent, status
from sfd_scale.launch.environment import exported, quoted_for_pdsh, read_env_file, write_env_file
from sfd_scale.launch.hosts import Host, preflight, read_hostfile, ssh_arguments
from sfd_scale.launch.supervisor import Launch, new_launch_id
from sfd_scale.runtime import network
from sfd_scale.runtime.batch_split import split_batch
from sfd_scale.runtime.run_paths import LOGS, RunPaths

LAUNCHERS = ("auto", "deepspeed", "torchrun")
RUNNERS = ("pdsh", "openmpi", "slurm")
_NODE_COUNTS = ("SLURM_JOB_NUM_NODES", "PET_NNODES")  # by which others say that they start one command a node
NAME_WAIT_S = 120.0  # for the name of a first node, which Kubernetes makes known when its pod is up


@dataclass(frozen=True)
class Work:
    """What the ranks run: a module and its arguments, and what can be read from those without loading anything."""

    module: str
    arguments: Sequence[str]

    @property
    def recipe(self) -> str | None:
        named = [a for a in self.arguments[1:2] if not a.startswith("-")]
        return named[0] if named else None

    @property
    def overrides(self) -> list[str]:
        return [a for a in self.arguments[2:] if "=" in a and not a.startswith("-")]

    def tree(self) -> dict[str, Any]:
        return {} if self.recipe is None else config.tree(self.recipe, self.overrides)

    def log_folder(self) -> Path:
        """`logs` in the folder that the command fills; beside the runs for one that writes a file."""
        filled: str | None = None
        match self.arguments[0]:
            case "train":
                filled = self.option("--run") or self.tree().get("run")
            case "watch" if self.option("--out") is None and (run := self.option("--run")) is not None:
                filled = str(RunPaths(Path(run)).evaluations.path)  # not among the logs of the training
            case "generate" | "sweep" | "watch":
                filled = self.option("--out")
        if isinstance(filled, str):
            return Path(filled).absolute() / LOGS
        return Path("runs/logs").absolute() / "-".join(self.arguments[:2]).replace("/", "-")

    def option(self, name: str) -> str | None:
        """The value of an option among the arguments, after a space or an equals sign."""
        for argument, following in zip(self.arguments, [*self.arguments[1:], None], strict=True):
            if argument == name:
                return following
            if argument.startswith(f"{name}="):
                return argument.removeprefix(f"{name}=")
        return None

    def check_world_size(self, world_size: int) -> None:
        """Raises ValueError where a training run's global batch does not divide over the ranks."""
        train = self.tree().get("train")
        batch = train.get("global_batch") if isinstance(train, Mapping) and self.arguments[0] == "train" else None
        if isinstance(batch, int) and batch > 0:
            micro = train.get("micro_batch") if isinstance(train, Mapping) else None
            split_batch(batch, micro if isinstance(micro, int) and micro > 0 else None, world_size)


def number(environment: Mapping[str, str], name: str, default: int) -> int:
    """A positive whole number of the environment.

    Raises:
        ValueError: naming the variable.
    """
    text = environment.get(name, "") or str(default)
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"{name}: {text!r}; allowed: a whole number, 1 and up")
    return int(text)


def choose(environment: Mapping[str, str]) -> str:
    """What `auto` means here: torchrun where something starts one command a node, otherwise deepspeed."""
    one_command_a_node = any(environment.get(name, "1") != "1" for name in ("NODES", *_NODE_COUNTS))
    return "torchrun" if one_command_a_node and not environment.get("HOSTFILE") else "deepspeed"


def make_launch(launcher: str, work: Work, environment: Mapping[str, str]) -> Launch:
    """Everything that a launch needs.

    Raises:
        ValueError: one sentence that says what to change, before anything is started.
    """
    if not work.arguments:
        raise ValueError("nothing to run; give a command and a recipe, such as `train quickstart/sfd`")
    work.tree()  # an unknown recipe or a file that is not YAML is told here, once
    if launcher not in LAUNCHERS:
        raise ValueError(f"--launcher: {launcher!r}; allowed: {', '.join(LAUNCHERS)}")
    kind = choose(environment) if launcher == "auto" else launcher
    several = [name for name in _NODE_COUNTS if environment.get(name, "1") != "1"]
    if kind == "torchrun" and several and not environment.get("NODES"):
        raise ValueError(
            f"NODES: not set, but {several[0]} is {environment[several[0]]}; use launchers/slurm.sbatch, or set "
            "NODES=1 for this node alone, or NODES, NODE_RANK, MASTER_ADDR and MASTER_PORT"
        )
    folder = Path(environment.get("LOG_FOLDER") or work.log_folder()).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    ready = {
        **environment,
        status.LAUNCH_ID: environment.get("JOB_ID") or environment.get("SLURM_JOB_ID", "") + new_launch_id(),
        status.LOG_FOLDER: str(folder),
        status.SHUTDOWN_TIMEOUT: str(number(environment, "SHUTDOWN_TIMEOUT", 300)),
    }
    ready["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}"
    if kind == "torchrun":
        return _torchrun(work, ready, folder)
    return _deepspeed(work, ready, folder)


def _port(environment: Mapping[str, str]) -> int:
    return number(environment, "MASTER_PORT", random.Random(os.urandom(8)).randrange(20000, 32000))


def _launch(command: Sequence[str], environment: dict[str, str], folder: Path, ranks: int, **more: Any) -> Launch:
    timeout = float(environment[status.SHUTDOWN_TIMEOUT])
    return Launch(environment[status.LAUNCH_ID], command, environment, folder, ranks, timeout, **more)


# ---------------------------------------------------------------------------------------------- deepspeed


def _deepspeed(work: Work, environment: dict[str, str], folder: Path) -> Launch:
    if environment.get("HOSTFILE"):
        return _deepspeed_hosts(work, environment, folder)
    if environment.get("NO_SSH"):
        raise ValueError("NO_SSH: needs HOSTFILE, a file with a line for each host: NAME slots=GPUS")
    ranks = number(environment, "RANKS", 1) if _on_cpu(environment) or environment.get("RANKS") else _gpus(environment)
    work.check_world_size(ranks)
    slots = list(range(ranks))
    if visible := environment.get("CUDA_VISIBLE_DEVICES", ""):
        # DeepSpeed's launcher sets the variable of a rank from the slots that it is given.
        chosen = visible.split(",")
        if len(chosen) < ranks or not all(device.strip().isdigit() for device in chosen):
            raise ValueError(f"CUDA_VISIBLE_DEVICES: {visible!r}; allowed with RANKS={ranks}: numbers of {ranks} GPUs")
        slots = [int(device) for device in chosen[:ranks]]
    return _launch(_one_host(environment, work, {"localhost": slots}), environment, folder, ranks)


def _deepspeed_hosts(work: Work, environment: dict[str, str], folder: Path) -> Launch:
    path = Path(environment["HOSTFILE"])
    hosts, runner, ssh = read_hostfile(path), environment.get("LAUNCHER") or "pdsh", ssh_arguments(environment)
    if runner not in RUNNERS:
        raise ValueError(f"LAUNCHER: {runner!r}; allowed: {', '.join(RUNNERS)}")
    ranks = sum(host.slots for host in hosts)
    work.check_world_size(ranks)
    options = ["--hostfile", str(path), "--no_ssh_check"]
    if environment.get("NO_SSH"):
        return _deepspeed_no_ssh(work, environment, folder, hosts)
    if runner == "slurm":
        address = environment.get("MASTER_ADDR") or network.resolve(hosts[0].name)
    else:
        address = preflight(hosts, ssh, work.recipe, work.overrides, folder, _on_cpu(environment))
        address = environment.get("MASTER_ADDR") or address
    if len(hosts) > 1 and network.is_loopback(address):
        raise ValueError(f"MASTER_ADDR: {address} is this host's own loopback; set it to an address the others reach")
    environment |= {"MASTER_ADDR": address, "MASTER_PORT": str(_port(environment)), "PDSH_SSH_ARGS_APPEND": ssh}
    _write_exports(environment, folder / "deepspeed_env")
    options += ["--launcher", runner, "--master_addr", address, "--force_multi"]
    arguments = [quoted_for_pdsh(a) for a in work.arguments] if runner == "pdsh" else list(work.arguments)
    if runner == "openmpi":
        given, interface = environment.get("LAUNCHER_ARGS", ""), network.interface_of(network.source_address(address))
        environment["LAUNCHER_ARGS"] = f"{given} --mca btl_tcp_if_include {interface}" if interface else given
    if runner == "slurm":
        # DeepSpeed's runner gives srun the number of ranks alone, and Slurm then does not tell how many a node has.
        given = environment.get("LAUNCHER_ARGS", "")
        environment["LAUNCHER_ARGS"] = f"{given} --nodes {len(hosts)} --ntasks-per-node {hosts[0].slots}".strip()
    if environment.get("LAUNCHER_ARGS"):
        options += [f"--launcher_args={environment['LAUNCHER_ARGS']}"]
    command = _runner(environment, options, arguments, work.module)
    if runner == "slurm":
        return _launch(command, environment, folder, ranks, stop=_signal_srun)
    return _launch(command, environment, folder, ranks, hosts=hosts, ssh=ssh)


def _deepspeed_no_ssh(work: Work, environment: dict[str, str], folder: Path, hosts: list[Host]) -> Launch:
    """One command a node, without ssh: NODE_RANK says which line of the hostfile this is."""
    node, address = environment.get("NODE_RANK", ""), environment.get("MASTER_ADDR", "")
    if not node.isdigit() or int(node) >= len(hosts):
        raise ValueError(f"NODE_RANK: {node!r}; allowed with NO_SSH: 0 to {len(hosts) - 1}, the line of the hostfile")
    if not address or not environment.get("MASTER_PORT"):
        raise ValueError("MASTER_ADDR: with MASTER_PORT, both needed with NO_SSH: an address of the first host, a port")
    slots = {host.name: list(range(host.slots)) for host in hosts}
    command = _one_host(environment, work, slots, ["--node_rank", node, "--master_addr", address])
    return _launch(command, environment, folder, sum(map(len, slots.values())), node=int(node))


def _one_host(
    environment: dict[str, str], work: Work, slots: Mapping[str, Sequence[int]], options: Sequence[str] = ()
) -> list[str]:
    """DeepSpeed's launcher of one host. Its runner would only import DeepSpeed, for seconds, to start it.

    Args:
        slots: of each host, the numbers of its GPUs, or of its ranks on the CPU.
    """
    world = base64.urlsafe_b64encode(json.dumps(slots).encode()).decode()
    return [
        sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}", *options,
        "--master_port", environment.setdefault("MASTER_PORT", str(_port(environment))),
        "--no_local_rank", "--log_level", "warning", agent.RANK_FILE, work.module, *work.arguments,
    ]  # fmt: skip


def _runner(environment: dict[str, str], options: list[str], arguments: Sequence[str], module: str) -> list[str]:
    port = environment.setdefault("MASTER_PORT", str(_port(environment)))
    return [
        sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank", "--log_level", "warning",
        "--master_port", port, *options, agent.RANK_FILE, module, *arguments,
    ]  # fmt: skip


def _write_exports(environment: dict[str, str], path: Path) -> None:
    own: dict[str, str] = {}
    for file in (Path.home() / ".deepspeed_env", Path(".deepspeed_env")):
        if file.is_file():
            own |= read_env_file(file)
    write_env_file(path, {**exported(environment, environment.get("EXPORT", "").split()), **own})
    environment["DS_ENV_FILE"] = str(path)


def _signal_srun(process: subprocess.Popen[bytes]) -> None:
    """srun passes signals on to its tasks; DeepSpeed's runner does not pass them on to srun."""
    for child in psutil.Process(process.pid).children(recursive=True):
        if child.name() == "srun":
            child.send_signal(signal.SIGUSR1)


def _on_cpu(environment: Mapping[str, str]) -> bool:
    return environment.get("DS_ACCELERATOR") == "cpu"


def _gpus(environment: Mapping[str, str]) -> int:
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    found = len(visible.split(",")) if visible else agent.gpu_count()
    if found == 0:
        raise ValueError("RANKS: no GPU here to count; set RANKS, and DS_ACCELERATOR=cpu to train on the CPU")
    return found


# ----------------------------------------------------------------------------------------------- torchrun


def _torchrun(work: Work, environment: dict[str, str], folder: Path) -> Launch:
    ranks = number(environment, "RANKS", 1) if environment.get("RANKS") else _gpus(environment)
    rendezvous, nodes = environment.get("RENDEZVOUS") or "static", environment.get("NODES") or "1"
    if rendezvous == "static":
        count = number(environment, "NODES", 1)
        options, node = _static(environment, count)
        work.check_world_size(count * ranks)
    elif rendezvous == "c10d":
        options, node, count = _c10d(work, environment, nodes, ranks), None, int(nodes.split(":")[0])
    else:
        raise ValueError(f"RENDEZVOUS: {rendezvous!r}; allowed: static, c10d")
    environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = environment[status.SHUTDOWN_TIMEOUT]
    # After `--`, or torchrun takes `--run` for an abbreviation of an option of its own.
    command = [
        sys.executable, "-m", "torch.distributed.run", *options, "--nproc-per-node", str(ranks),
        "--signals-to-handle", status.TORCHRUN_SIGNAL.name, "--", agent.RANK_FILE, work.module, *work.arguments,
    ]  # fmt: skip
    return _launch(command, environment, folder, count * ranks, node=node, end_signal=status.TORCHRUN_SIGNAL)


def _static(environment: Mapping[str, str], nodes: int) -> tuple[list[str], int]:
    node = environment.get("NODE_RANK") or "0"
    if not node.isdigit() or int(node) >= nodes:
        raise ValueError(f"NODE_RANK: {node!r}; allowed with NODES={nodes}: 0 to {nodes - 1}")
    address = environment.get("MASTER_ADDR") or "127.0.0.1"
    if nodes > 1 and node != "0":
        network.resolve(address, NAME_WAIT_S)
    if nodes > 1 and network.is_loopback(address):
        raise ValueError(f"MASTER_ADDR: {address} with NODES={nodes}; set it to an address of node 0 the others reach")
    if nodes > 1 and not environment.get("MASTER_PORT"):
        raise ValueError(f"MASTER_PORT: needed with NODES={nodes}, the same on every node")
    options = ["--nnodes", str(nodes), "--node-rank", node, "--master-addr", address]
    return [*options, "--master-port", str(_port(environment))], int(node)


def _c10d(work: Work, environment: Mapping[str, str], nodes: str, ranks: int) -> list[str]:
    """Elastic: NODES=2:4 starts with two to four nodes, and again with those that are left, MAX_RESTARTS times."""
    limits = nodes.split(":")
    if len(limits) > 2 or not all(n.isdigit() and int(n) > 0 for n in limits) or int(limits[0]) > int(limits[-1]):
        raise ValueError(f"NODES: {nodes!r}; allowed: a number, or MIN:MAX with RENDEZVOUS=c10d")
    for count in range(int(limits[0]), int(limits[-1]) + 1):
        work.check_world_size(count * ranks)
    address, job = environment.get("MASTER_ADDR", ""), environment.get("JOB_ID", "")
    if not address or not environment.get("MASTER_PORT") or not job:
        raise ValueError(
            "MASTER_ADDR: with MASTER_PORT and JOB_ID, all needed with RENDEZVOUS=c10d, equal on every node"
        )
    network.resolve(address, NAME_WAIT_S)
    # Without both of these, nodes whose names resolve to the loopback wait for each other until the timeout.
    here = network.is_here(address)
    own = network.resolve(address) if here else network.source_address(address)
    return [
        "--nnodes", nodes, "--max-restarts", str(number(environment, "MAX_RESTARTS", 3)),
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{address}:{environment['MASTER_PORT']}", "--rdzv-id", job,
        "--rdzv-conf", f"is_host={int(here)}", "--local-addr", own,
    ]  # fmt: skip
