"""Builds the command and environment of a launch from environment variables and `COMMAND RECIPE [key=value ...]`.

All errors that can be found before the ranks start are raised here. Launchers know no training options: the ranks get
their arguments unchanged.
"""

from __future__ import annotations

import base64
import json
import os
import random
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfd_scale import config
from sfd_scale.launch import agent, status
from sfd_scale.launch.environment import exported, quoted_for_pdsh, read_env_file, write_env_file
from sfd_scale.launch.hosts import MOST_NODES, MOST_RANKS, Host, preflight, read_hostfile, ssh_arguments
from sfd_scale.launch.supervisor import Launch, new_launch_id
from sfd_scale.runtime import network
from sfd_scale.runtime.batch_split import split_batch
from sfd_scale.runtime.environment import (
    ACCELERATORS,
    choice,
    flag,
    is_mig,
    on_cpu,
    text,
    visible_devices,
    whole_number,
    without_rank,
)
from sfd_scale.runtime.run_paths import LOGS, RunPaths
from sfd_scale.runtime.settings import YEAR_S

LAUNCHERS = ("auto", "deepspeed", "torchrun")
RUNNERS = ("pdsh", "openmpi", "slurm")
_NODE_COUNTS = ("SLURM_JOB_NUM_NODES", "PET_NNODES")  # set by schedulers that start one command per node
# The options without a value of the commands that ranks run; the commands whose first word is not a recipe.
FLAGS = ("--allow-foreign", "--prc-fp16", "--once", "--help")
WITHOUT_RECIPE = ("compare",)
NAME_WAIT_S = 120.0  # Kubernetes publishes the name of the first node when its pod runs


@dataclass(frozen=True)
class RankCommand:
    """The command that every rank runs: `python -m MODULE ARGUMENTS`. The recipe is read as YAML, without torch."""

    module: str
    arguments: Sequence[str]

    @property
    def words(self) -> list[str]:
        """The arguments after the command that are neither options nor values of options."""
        found, rest = [], iter(self.arguments[1:])
        for argument in rest:
            if not argument.startswith("-"):
                found.append(argument)
            elif argument == "--":
                return [*found, *rest]
            elif "=" not in argument and argument not in FLAGS:
                next(rest, None)
        return found

    @property
    def recipe(self) -> str | None:
        return self.words[0] if self.words and self.arguments[0] not in WITHOUT_RECIPE else None

    @property
    def overrides(self) -> list[str]:
        return [word for word in self.words[1:] if config.is_override(word)]

    def tree(self) -> dict[str, Any]:
        return {} if self.recipe is None else config.tree(self.recipe, self.overrides)

    def log_folder(self) -> Path:
        """`logs` in the command's output folder; below runs/logs for commands that write a file."""
        output: str | None = None
        match self.arguments[0]:
            case "train":
                output = self.option("--run") or self.tree().get("run")
            case "watch" if self.option("--out") is None and (run := self.option("--run")) is not None:
                output = str(RunPaths(Path(run)).evaluations.path)  # the run folder has the logs of the training
            case "generate" | "sweep" | "solvers" | "guide" | "watch":
                output = self.option("--out")
        if isinstance(output, str):
            return config.local_path(output).absolute() / LOGS
        return Path("runs/logs").absolute() / "-".join(self.arguments[:2]).replace("/", "-")

    def check_devices(self, ranks: int, environment: Mapping[str, str]) -> None:
        """Raises ValueError for a training on several MIG instances of this host: NCCL does not connect them."""
        visible = [] if on_cpu(environment) else (visible_devices(environment) or [])[:ranks]
        if self.arguments[0] == "train" and len(visible) > 1 and any(map(is_mig, visible)):
            raise ValueError(
                f"CUDA_VISIBLE_DEVICES: {environment['CUDA_VISIBLE_DEVICES']!r}; allowed for a training: whole GPUs, "
                "or one MIG instance with RANKS=1, because NCCL does not connect MIG instances"
            )

    def option(self, name: str) -> str | None:
        """The value of an option: `--name value` or `--name=value`."""
        for argument, following in zip(self.arguments, [*self.arguments[1:], None], strict=True):
            if argument == name:
                return following
            if argument.startswith(f"{name}="):
                return argument.removeprefix(f"{name}=")
        return None

    def check_world_size(self, world_size: int) -> None:
        """Raises ValueError if the global batch of a training does not divide over the ranks."""
        train = self.tree().get("train")
        batch = train.get("global_batch") if isinstance(train, Mapping) and self.arguments[0] == "train" else None
        if isinstance(batch, int) and batch > 0:
            micro = train.get("micro_batch") if isinstance(train, Mapping) else None
            split_batch(batch, micro if isinstance(micro, int) and micro > 0 else None, world_size)


def positive(environment: Mapping[str, str], name: str, default: int, most: int | None = None) -> int:
    """The value of an environment variable, a whole number from 1 up; `default` if it is not set or empty."""
    value = whole_number(name, environment, least=1, most=most)
    return default if value is None else value


def auto_launcher(environment: Mapping[str, str]) -> str:
    """The launcher for `auto`: torchrun if a scheduler starts one command per node, otherwise deepspeed."""
    one_command_per_node = any((text(name, environment) or "1") != "1" for name in ("NODES", *_NODE_COUNTS))
    return "torchrun" if one_command_per_node and text("HOSTFILE", environment) is None else "deepspeed"


def make_launch(launcher: str, run: RankCommand, environment: Mapping[str, str]) -> Launch:
    """Build a launch. Starts nothing.

    Raises:
        ValueError: one sentence that says what to change.
    """
    if not run.arguments:
        raise ValueError("nothing to run; give a command and a recipe, such as `train quickstart/sfd`")
    run.tree()  # raises for an unknown recipe or a file that is not YAML
    if launcher not in LAUNCHERS:
        raise ValueError(f"--launcher: {launcher!r}; allowed: {', '.join(LAUNCHERS)}")
    kind = auto_launcher(environment) if launcher == "auto" else launcher
    environment = without_rank(environment)
    choice("DS_ACCELERATOR", ACCELERATORS, environment)
    several = [name for name in _NODE_COUNTS if (text(name, environment) or "1") != "1"]
    if kind == "torchrun" and several and text("NODES", environment) is None:
        raise ValueError(
            f"NODES: not set, but {several[0]} is {environment[several[0]]}; use launchers/slurm.sbatch, or set "
            "NODES=1 for this node alone, or NODES, NODE_RANK, MASTER_ADDR and MASTER_PORT"
        )
    folder = Path(text("LOG_FOLDER", environment) or run.log_folder()).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    ready = {
        **environment,
        status.LAUNCH_ID: text("JOB_ID", environment) or (text("SLURM_JOB_ID", environment) or "") + new_launch_id(),
        status.LOG_FOLDER: str(folder),
        status.SHUTDOWN_TIMEOUT: str(positive(environment, "SHUTDOWN_TIMEOUT", 300, most=YEAR_S)),
    }
    ready["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{text('PATH', environment) or os.defpath}"
    if kind == "torchrun":
        return _torchrun(run, ready)
    hosts = text("HOSTFILE", environment)
    return _deepspeed_one_host(run, ready) if hosts is None else _deepspeed_hosts(run, ready, Path(hosts))


def _port(environment: Mapping[str, str]) -> int:
    return positive(environment, "MASTER_PORT", random.Random(os.urandom(8)).randrange(20000, 32000), most=65535)


# ---------------------------------------------------------------------------------------------- deepspeed


def _deepspeed_one_host(run: RankCommand, environment: dict[str, str]) -> Launch:
    if flag("NO_SSH", environment):
        raise ValueError("NO_SSH: needs HOSTFILE, a file with one line per host: NAME slots=GPUS")
    given = on_cpu(environment) or text("RANKS", environment) is not None
    ranks = positive(environment, "RANKS", 1, most=MOST_RANKS) if given else _gpus(environment)
    run.check_world_size(ranks)
    run.check_devices(ranks, environment)
    command = _deepspeed_launch(environment, run, {"localhost": _slots(environment, ranks, f"RANKS={ranks}")})
    return Launch(command=command, environment=environment, world_size=ranks)


def _slots(environment: dict[str, str], ranks: int, count: str) -> list[int | str]:
    """The GPUs of the ranks of this host, by place: DeepSpeed's launcher writes them to CUDA_VISIBLE_DEVICES.

    If CUDA_VISIBLE_DEVICES hides all GPUs, that list would show them again. So DS_ACCELERATOR asks for the CPU.

    Args:
        count: the setting that gives the number of ranks, for the error message.
    """
    visible = None if on_cpu(environment) else visible_devices(environment)
    if visible is None:
        return list(range(ranks))
    if not visible:
        environment["DS_ACCELERATOR"] = "cpu"
        return list(range(ranks))
    if len(visible) < ranks:
        given = environment["CUDA_VISIBLE_DEVICES"]
        raise ValueError(f"CUDA_VISIBLE_DEVICES: {given!r}; allowed with {count}: {ranks} GPUs, by number or by name")
    return [int(device) if device.isdigit() else device for device in visible[:ranks]]


def _deepspeed_hosts(run: RankCommand, environment: dict[str, str], path: Path) -> Launch:
    """One command for all hosts of a hostfile: DeepSpeed's runner reaches them by pdsh, mpirun or srun."""
    folder, hosts, ssh = Path(environment[status.LOG_FOLDER]), read_hostfile(path), ssh_arguments(environment)
    runner = choice("LAUNCHER", RUNNERS, environment) or "pdsh"
    world_size = sum(host.slots for host in hosts)
    run.check_world_size(world_size)
    if flag("NO_SSH", environment):
        return _deepspeed_no_ssh(run, environment, hosts)
    if runner == "slurm":
        address = text("MASTER_ADDR", environment) or network.resolve(hosts[0].name)
    else:
        address = preflight(hosts, ssh, run.recipe, run.overrides, folder, on_cpu(environment))
        address = text("MASTER_ADDR", environment) or address
    if len(hosts) > 1 and network.is_loopback(address):
        raise ValueError(
            f"MASTER_ADDR: {address} is the loopback address of this host; set an address that the other hosts reach"
        )
    environment |= {"MASTER_ADDR": address, "MASTER_PORT": str(_port(environment)), "PDSH_SSH_ARGS_APPEND": ssh}
    _write_exports(environment, folder / "deepspeed_env")
    extra = _launcher_args(runner, text("LAUNCHER_ARGS", environment) or "", hosts, address)
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank", "--log_level", "warning",
        "--hostfile", str(path), "--no_ssh_check", "--force_multi", "--launcher", runner,
        "--master_addr", address, "--master_port", environment["MASTER_PORT"],
        *([f"--launcher_args={extra}"] if extra else []), agent.RANK_FILE, run.module,
        *(map(quoted_for_pdsh, run.arguments) if runner == "pdsh" else run.arguments),
    ]  # fmt: skip
    if runner == "slurm":
        return Launch(command=command, environment=environment, world_size=world_size, srun=True)
    return Launch(command=command, environment=environment, world_size=world_size, hosts=hosts, ssh=ssh)


def _launcher_args(runner: str, given: str, hosts: Sequence[Host], address: str) -> str:
    """Options for mpirun or srun: the user's LAUNCHER_ARGS and what DeepSpeed's runner leaves out."""
    if runner == "openmpi":
        interface = network.interface_of(network.source_address(address))
        given = f"{given} --mca btl_tcp_if_include {interface}" if interface else given
    if runner == "slurm":
        # DeepSpeed gives srun only the number of ranks. Without these, Slurm sets no SLURM_NTASKS_PER_NODE.
        given = f"{given} --nodes {len(hosts)} --ntasks-per-node {hosts[0].slots}"
    return given.strip()


def _deepspeed_no_ssh(run: RankCommand, environment: dict[str, str], hosts: Sequence[Host]) -> Launch:
    """One command per node, without ssh. NODE_RANK is the line of this node in the hostfile."""
    node, address = whole_number("NODE_RANK", environment), text("MASTER_ADDR", environment)
    if node is None or node >= len(hosts):
        given = text("NODE_RANK", environment) or ""
        raise ValueError(f"NODE_RANK: {given!r}; allowed with NO_SSH: 0 to {len(hosts) - 1}, the line of the hostfile")
    if address is None or text("MASTER_PORT", environment) is None:
        raise ValueError(
            "MASTER_ADDR: NO_SSH needs MASTER_ADDR and MASTER_PORT, an address and a port of the first host"
        )
    slots: dict[str, list[int | str]] = {host.name: list(range(host.slots)) for host in hosts}
    own = hosts[node]
    run.check_devices(own.slots, environment)
    slots[own.name] = _slots(environment, own.slots, f"slots={own.slots} in the hostfile")
    command = _deepspeed_launch(environment, run, slots, ["--node_rank", str(node), "--master_addr", address])
    world_size = sum(host.slots for host in hosts)
    return Launch(command=command, environment=environment, world_size=world_size, node=node)


def _deepspeed_launch(
    environment: dict[str, str], run: RankCommand, slots: Mapping[str, Sequence[int | str]], options: Sequence[str] = ()
) -> list[str]:
    """The command of DeepSpeed's per-host launcher. On one host the runner, which takes seconds, is not needed.

    Args:
        slots: for each host its GPUs, or the numbers of its ranks on the CPU.
    """
    environment["MASTER_PORT"] = str(_port(environment))
    world = base64.urlsafe_b64encode(json.dumps(slots).encode()).decode()
    return [
        sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}", *options,
        "--master_port", environment["MASTER_PORT"],
        "--no_local_rank", "--log_level", "warning", agent.RANK_FILE, run.module, *run.arguments,
    ]  # fmt: skip


def _write_exports(environment: dict[str, str], path: Path) -> None:
    own: dict[str, str] = {}
    for file in (Path.home() / ".deepspeed_env", Path(".deepspeed_env")):
        if file.is_file():
            own |= read_env_file(file)
    write_env_file(path, {**exported(environment, (text("EXPORT", environment) or "").split()), **own})
    environment["DS_ENV_FILE"] = str(path)


def _gpus(environment: Mapping[str, str]) -> int:
    visible = visible_devices(environment)
    found = agent.gpu_count() if visible is None else len(visible)
    if found == 0:
        cause = "this host has no GPU" if visible is None else "CUDA_VISIBLE_DEVICES hides all GPUs"
        raise ValueError(f"RANKS: not set, and {cause}; to train on the CPU set RANKS and DS_ACCELERATOR=cpu")
    return found


# ----------------------------------------------------------------------------------------------- torchrun


def _torchrun(run: RankCommand, environment: dict[str, str]) -> Launch:
    ranks = whole_number("RANKS", environment, least=1, most=MOST_RANKS)
    ranks = _gpus(environment) if ranks is None else ranks
    run.check_devices(ranks, environment)
    rendezvous, node = choice("RENDEZVOUS", ("static", "c10d"), environment) or "static", None
    if rendezvous == "static":
        nodes = positive(environment, "NODES", 1, most=MOST_NODES)
        options, node = _static(environment, nodes)
        run.check_world_size(nodes * ranks)
    else:
        options, nodes = _c10d(run, environment, ranks)
    environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = environment[status.SHUTDOWN_TIMEOUT]
    # The `--` keeps torchrun from reading `--run` as an abbreviation of its own option.
    command = [
        sys.executable, "-m", "torch.distributed.run", *options, "--nproc-per-node", str(ranks),
        "--signals-to-handle", status.TORCHRUN_SIGNAL.name, "--", agent.RANK_FILE, run.module, *run.arguments,
    ]  # fmt: skip
    return Launch(
        command=command, environment=environment, world_size=nodes * ranks, node=node, end_signal=status.TORCHRUN_SIGNAL
    )


def _static(environment: Mapping[str, str], nodes: int) -> tuple[list[str], int]:
    node = whole_number("NODE_RANK", environment) or 0
    if node >= nodes:
        raise ValueError(f"NODE_RANK: '{node}'; allowed with NODES={nodes}: 0 to {nodes - 1}")
    address = text("MASTER_ADDR", environment) or "127.0.0.1"
    if nodes > 1 and node != 0:
        network.resolve(address, NAME_WAIT_S)
    if nodes > 1 and network.is_loopback(address):
        raise ValueError(
            f"MASTER_ADDR: {address} with NODES={nodes}; set an address of node 0 that the other nodes reach"
        )
    if nodes > 1 and text("MASTER_PORT", environment) is None:
        raise ValueError(f"MASTER_PORT: needed with NODES={nodes}; give every node the same port")
    options = ["--nnodes", str(nodes), "--node-rank", str(node), "--master-addr", address]
    return [*options, "--master-port", str(_port(environment))], node


def _c10d(run: RankCommand, environment: Mapping[str, str], ranks: int) -> tuple[list[str], int]:
    """Options of an elastic launch, and the least number of nodes.

    NODES=2:4 starts with two to four nodes. If a node is lost, it restarts with the others, up to MAX_RESTARTS times.
    """
    nodes = text("NODES", environment) or "1"
    limits = nodes.split(":")
    if not re.fullmatch("[1-9][0-9]{0,5}(:[1-9][0-9]{0,5})?", nodes) or int(limits[0]) > int(limits[-1]):
        raise ValueError(f"NODES: {nodes!r}; allowed: a number, or MIN:MAX with RENDEZVOUS=c10d")
    for count in range(int(limits[0]), int(limits[-1]) + 1):
        run.check_world_size(count * ranks)
    address, job = text("MASTER_ADDR", environment), text("JOB_ID", environment)
    if address is None or text("MASTER_PORT", environment) is None or job is None:
        raise ValueError(
            "MASTER_ADDR: RENDEZVOUS=c10d needs MASTER_ADDR, MASTER_PORT and JOB_ID, with the same values on every node"
        )
    network.resolve(address, NAME_WAIT_S)
    # is_host and --local-addr: without them, nodes whose names resolve to the loopback wait until the timeout.
    here = network.is_here(address)
    own = network.resolve(address) if here else network.source_address(address)
    options = [
        "--nnodes", nodes, "--max-restarts", str(positive(environment, "MAX_RESTARTS", 3)),
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{address}:{_port(environment)}", "--rdzv-id", job,
        "--rdzv-conf", f"is_host={int(here)}", "--local-addr", own,
    ]  # fmt: skip
    return options, int(limits[0])
