"""The parts of the launchers: hostfiles, exported variables, commands, rank files, exit codes, addresses."""

import base64
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from sfd_scale import config
from sfd_scale.launch import agent, check, commands, environment, status
from sfd_scale.launch.hosts import Host, ask, read_hostfile
from sfd_scale.launch.rank import set_rank_variables
from sfd_scale.runtime import network

ROOT = Path(__file__).resolve().parents[3]
CPU = {"DS_ACCELERATOR": "cpu", "PATH": os.environ["PATH"]}
TRAIN = ("train", "quickstart/vision")


def write(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "name", ["10.0.0.1", "user@node-a.example.org", "fe80::1%eth0", "::1", "me@2001:db8::2", "n_1"]
)
def test_a_hostfile_takes_names_and_addresses(tmp_path: Path, name: str) -> None:
    assert read_hostfile(write(tmp_path, f"{name} slots=2\n")) == [Host(name, 2)]


@pytest.mark.parametrize("name", ["node:22", "-oProxyCommand=x", "a;rm", "a,b", "node[1-4]", "$(x)", "ssh://a", "@a"])
def test_a_hostfile_takes_neither_ports_nor_options_of_ssh(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"line 2: '{re.escape(name)}'; allowed: a name or an address"):
        read_hostfile(write(tmp_path, f"# hosts\n{name} slots=2\n"))


def test_a_hostfile_may_hold_comments_and_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "# two hosts\n\nnode-a slots=4\nnode-b   slots=4  # the other\n")
    assert read_hostfile(path) == [Host("node-a", 4), Host("node-b", 4)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no hosts; write one line per host"),
        ("node-a\n", "line 1: 'node-a'; allowed: NAME slots=GPUS"),
        ("a slots=4\nb slots=8\n", r"different numbers of slots \(a has 4, b has 8\); give every host 4"),
        ("a slots=0\n", "a has 0 slots; allowed: 1 and up"),
        ("a slots=2\na slots=2\n", "line 2: a occurs twice"),
    ],
)
def test_a_bad_hostfile_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_hostfile(write(tmp_path, text))


def test_variables_go_to_other_hosts_by_a_list_and_secrets_by_name_only() -> None:
    given = {"NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "eth1", "OMP_NUM_THREADS": "4", "DS_ACCELERATOR": "cpu"}
    given |= {"WANDB_MODE": "offline", "HF_HOME": "/data/hf", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}
    kept = {"HOME": "/root", "CUDA_VISIBLE_DEVICES": "0", "WANDB_API_KEY": "x", "HF_TOKEN": "y", "AWS_SECRET": "z"}
    assert environment.exported({**given, **kept}) == given
    assert environment.exported({**given, **kept}, ["HF_TOKEN"]) == {**given, "HF_TOKEN": "y"}
    with pytest.raises(ValueError, match="EXPORT: WANDB_KEY is not set"):
        environment.exported(given, ["WANDB_KEY"])
    with pytest.raises(ValueError, match="NCCL_X: its value has several lines"):
        environment.exported({"NCCL_X": "1\n2"})


NASTY = [
    "plain",
    "two words",
    'a "quoted" word',
    "$HOME",
    "`id`",
    "a;b",
    "back\\slash $x",
    "[0.9,0.999]",
    "it's",
    "{a: 1}",
]


def test_deepspeed_reads_the_file_that_we_write_and_a_shell_gives_back_every_value(tmp_path: Path) -> None:
    from deepspeed.launcher.multinode_runner import PDSHRunner

    values = {f"NCCL_{index}": value for index, value in enumerate(NASTY)}
    environment.write_env_file(tmp_path / "env", values)
    assert (tmp_path / "env").stat().st_mode & 0o077 == 0
    runner = PDSHRunner.__new__(PDSHRunner)
    runner.exports = {}
    for line in (tmp_path / "env").read_text().splitlines(keepends=True):
        runner.add_export(*line.split("=", maxsplit=1))  # what deepspeed.launcher.runner does with a line
    script = "".join(f"export {name}={value}; " for name, value in runner.exports.items())
    shown = subprocess.run(["bash", "-c", f"{script} env -0"], capture_output=True, text=True, check=True).stdout
    found = dict(entry.split("=", 1) for entry in shown.split("\0") if "=" in entry)
    assert {name: found[name] for name in values} == values


def test_arguments_arrive_through_pdsh_as_they_were_typed() -> None:
    from types import SimpleNamespace

    from deepspeed.launcher.multinode_runner import PDSHRunner

    runner = PDSHRunner.__new__(PDSHRunner)
    runner.args = SimpleNamespace(user_args=[environment.quoted_for_pdsh(a) for a in NASTY])
    line = " ".join(runner.parse_user_args())  # pdsh joins its arguments with blanks, and a shell reads them
    code = "import json, sys; print(json.dumps(sys.argv[1:]))"
    shown = subprocess.run(
        ["bash", "-c", f"{sys.executable} -c {shlex.quote(code)} {line}"], capture_output=True, text=True, check=True
    )
    assert json.loads(shown.stdout) == NASTY


def test_a_users_deepspeed_env_may_hold_comments(tmp_path: Path) -> None:
    path = tmp_path / ".deepspeed_env"
    path.write_text('# ours\n\nNCCL_DEBUG=INFO\nexport NCCL_IB_HCA="mlx5_0"\n')
    assert environment.read_env_file(path) == {"NCCL_DEBUG": "INFO", "NCCL_IB_HCA": "mlx5_0"}
    path.write_text("NCCL_DEBUG\n")
    with pytest.raises(ValueError, match=r"line 1: 'NCCL_DEBUG'; allowed: NAME=VALUE"):
        environment.read_env_file(path)


@pytest.mark.parametrize(
    ("launcher", "variables", "arguments", "message"),
    [
        ("deepspeed", {"RANKS": "0"}, TRAIN, "RANKS: '0'; allowed: a whole number from 1 to 1024"),
        (
            "deepspeed",
            {"RANKS": "3"},
            TRAIN,
            r"train.global_batch: 64 does not divide over 3 ranks.*nearest: 2 or 4",
        ),
        ("deepspeed", {"RANKS": "2"}, ("train", "quickstart/visoin"), "did you mean quickstart/vision"),
        ("deepspeed", {"RANKS": "2"}, (), "nothing to run; give a command and a recipe"),
        ("deepspeed", {"HOSTFILE": "/nowhere/hosts"}, TRAIN, "no such hostfile"),
        ("deepspeed", {"NO_SSH": "1", "NODE_RANK": "0"}, TRAIN, "NO_SSH: needs HOSTFILE"),
        ("mpi", {}, TRAIN, "--launcher: 'mpi'; allowed: auto, deepspeed, torchrun"),
        ("auto", {"SLURM_JOB_NUM_NODES": "2"}, TRAIN, "NODES: not set, but SLURM_JOB_NUM_NODES is 2"),
        ("torchrun", {"RANKS": "1", "NODES": "2", "MASTER_PORT": "1"}, TRAIN, "MASTER_ADDR: 127.0.0.1 with NODES=2"),
        ("torchrun", {"RANKS": "1", "NODES": "2", "NODE_RANK": "2"}, TRAIN, "NODE_RANK: '2'; allowed with NODES=2"),
        ("torchrun", {"RANKS": "1", "RENDEZVOUS": "etcd"}, TRAIN, "RENDEZVOUS: 'etcd'; allowed: static, c10d"),
        ("torchrun", {"RANKS": "1", "RENDEZVOUS": "c10d", "NODES": "4:2"}, TRAIN, "NODES: '4:2'; allowed"),
        ("torchrun", {"RANKS": "1", "RENDEZVOUS": "c10d", "NODES": "2:4"}, TRAIN, "does not divide over 3 ranks"),
    ],
)
def test_what_cannot_run_is_told_before_anything_starts(
    launcher: str, variables: dict[str, str], arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    work = commands.RankCommand("sfd_scale", arguments)
    with pytest.raises(ValueError, match=message):
        commands.make_launch(launcher, work, {**CPU, "LOG_FOLDER": str(tmp_path), **variables})


@pytest.mark.parametrize(
    ("module", "arguments", "folder"),
    [
        ("sfd_scale", ("train", "quickstart/sfd", "--run", "a"), "a"),
        ("sfd_scale", ("train", "quickstart/sfd", "run=b"), "b"),
        ("sfd_scale", ("encode", "quickstart/encode"), "runs/logs/encode-quickstart-encode"),
        ("eval", ("generate", "eval/sfd_xl", "--out=c"), "c"),
        # Not a folder of the file's name, and not among the logs of the training that it watches.
        ("eval", ("score", "eval/sfd_xl", "--out", "d.json"), "runs/logs/score-eval-sfd_xl"),
        ("eval", ("watch", "eval/sfd_xl", "--run", "a"), "a/evaluations"),
        ("eval", ("watch", "eval/sfd_xl", "--run", "a", "--out", "e"), "e"),
    ],
)
def test_logs_lie_in_the_folder_that_the_command_fills(module: str, arguments: Sequence[str], folder: str) -> None:
    found = commands.RankCommand(module, arguments).log_folder()
    assert found == Path(folder).absolute() / ("" if folder.startswith("runs/logs") else "logs")


def test_a_recipe_check_that_says_much_does_not_wait_for_a_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "talkative.py").write_text("import sys\nsys.stderr.write('x' * 300_000)\nsys.exit(2)\n")
    monkeypatch.setitem(check.COMMANDS, "talkative", ("train",))
    asked = check.RecipeCheck("talkative", ("train",), {**os.environ, "PYTHONPATH": str(tmp_path), "HOSTFILE": "h"})
    assert asked.wait() and len(asked.error()) == 300_000


def test_the_scripts_exit_with_2_and_one_sentence(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [ROOT / "launchers/deepspeed.sh", *TRAIN], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, **CPU, "PATH": path, "RANKS": "5", "LOG_FOLDER": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: train.global_batch: 64 does not divide over 5 ranks")


def test_whoever_asks_for_the_cpu_gets_it_beside_gpus_too() -> None:
    program = "import os, sfd_scale; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    for asked, seen in (({"DS_ACCELERATOR": "cpu"}, ""), ({}, "0")):
        given = {"CUDA_VISIBLE_DEVICES": "0", **asked}
        out = subprocess.run([sys.executable, "-c", program], env=given, cwd=ROOT, capture_output=True, text=True)
        assert out.stdout.strip() == seen


def test_no_launcher_knows_a_training_option() -> None:
    names = [path for path in (ROOT / "launchers").iterdir() if path.name != "quickstart.sh"]
    assert {path.name for path in names} >= {"deepspeed.sh", "torchrun.sh", "slurm.sbatch", "kubernetes.yaml"}
    sections = ("train.", "model.", "optimizer.", "engine.", "data.", "checkpoint.", "lr.", "ema.", "objective.")
    for path in names:
        code = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))
        assert not [s for s in sections if f" {s}" in code or f'"{s}' in code], path


def test_auto_takes_torchrun_where_something_starts_one_command_a_node() -> None:
    assert commands.auto_launcher({}) == "deepspeed"
    assert commands.auto_launcher({"SLURM_JOB_NUM_NODES": "4"}) == "torchrun"
    assert commands.auto_launcher({"PET_NNODES": "2"}) == "torchrun"
    assert commands.auto_launcher({"NODES": "2", "HOSTFILE": "hosts"}) == "deepspeed"


def read_by_deepspeed(command: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> tuple[Namespace, list[Any]]:
    """What DeepSpeed's launcher of one host makes of its command: options, and each host's name and slots."""
    from deepspeed.launcher import launch

    monkeypatch.setattr(sys, "argv", list(command[command.index("deepspeed.launcher.launch") :]))
    options = launch.parse_args()
    return options, list(json.loads(base64.urlsafe_b64decode(options.world_info)).items())


def test_torchrun_hears_of_a_stop_by_a_signal_that_no_scheduler_sends(tmp_path: Path) -> None:
    asked = {**CPU, "RANKS": "1", "LOG_FOLDER": str(tmp_path)}
    made = commands.make_launch("torchrun", commands.RankCommand("sfd_scale", TRAIN), asked)
    assert made.end_signal == signal.SIGQUIT
    at = list(made.command).index("--signals-to-handle")
    assert list(made.command)[at + 1 : at + 3] == ["SIGQUIT", "--"]


def test_one_host_gets_the_gpus_that_are_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"PATH": os.environ["PATH"], "RANKS": "2", "LOG_FOLDER": str(tmp_path), "MASTER_PORT": "29512"}
    work = commands.RankCommand("eval", ("generate", "quickstart/eval", "--out", "x y"))
    for visible, slots in (("", [0, 1]), ("3,5,6", [3, 5])):
        made = commands.make_launch("deepspeed", work, {**given, "CUDA_VISIBLE_DEVICES": visible})
        options, hosts = read_by_deepspeed(made.command, monkeypatch)
        assert (hosts, made.world_size, options.master_port) == ([("localhost", slots)], 2, 29512)
        assert options.no_local_rank and not options.module
        assert [options.training_script, *options.training_script_args] == [agent.RANK_FILE, "eval", *work.arguments]
    with pytest.raises(ValueError, match=r"CUDA_VISIBLE_DEVICES: '3'; allowed with RANKS=2: 2 GPUs"):
        commands.make_launch("deepspeed", work, {**given, "CUDA_VISIBLE_DEVICES": "3"})


def test_a_host_that_is_started_without_ssh_knows_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        **CPU, "HOSTFILE": str(write(tmp_path, "b slots=3\na slots=3\n")), "NO_SSH": "1", "NODE_RANK": "1",
        "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "29512", "LOG_FOLDER": str(tmp_path),
    }  # fmt: skip
    work = commands.RankCommand("sfd_scale", ("train", "quickstart/vision", "train.global_batch=120"))
    made = commands.make_launch("deepspeed", work, given)
    options, hosts = read_by_deepspeed(made.command, monkeypatch)
    assert hosts == [("b", [0, 1, 2]), ("a", [0, 1, 2])]
    assert (options.node_rank, options.master_addr, options.master_port) == (1, "192.0.2.1", 29512)
    assert (made.node, made.world_size) == (1, 6)


def test_elastic_torchrun_is_told_who_hosts_the_rendezvous_and_by_which_address() -> None:
    own = network.source_address("192.0.2.1")
    given = {**CPU, "RANKS": "2", "RENDEZVOUS": "c10d", "NODES": "1:2", "JOB_ID": "a", "MASTER_PORT": "29500"}
    for master, here in ((own, "is_host=1"), ("192.0.2.77", "is_host=0")):
        command = list(
            commands.make_launch(
                "torchrun", commands.RankCommand("sfd_scale", TRAIN), {**given, "MASTER_ADDR": master}
            ).command
        )
        assert command[command.index("--rdzv-conf") + 1] == here
        assert command[command.index("--local-addr") + 1] == own


def test_the_interface_is_the_one_that_reaches_the_first_rank_and_never_the_loopback() -> None:
    own = network.source_address("192.0.2.1")
    # On the host of rank 0 itself, whose route to its own address is the loopback, and on another one.
    for master in (own, "192.0.2.1"):
        found = {"MASTER_ADDR": master}
        network.set_interfaces(found)
        assert found["GLOO_SOCKET_IFNAME"] == network.interface_of(own) != "lo"
        assert found["NCCL_SOCKET_IFNAME"] == f"={network.interface_of(own)}"
    chosen = {"MASTER_ADDR": own, "GLOO_SOCKET_IFNAME": "ib0"}
    network.set_interfaces(chosen)
    assert chosen["GLOO_SOCKET_IFNAME"] == "ib0"
    alone = {"MASTER_ADDR": "127.0.0.1"}
    network.set_interfaces(alone)
    assert set(alone) == {"MASTER_ADDR"}
    with pytest.raises(ValueError, match="does not resolve"):
        network.set_interfaces({"MASTER_ADDR": "no-such-host.invalid"})


RANK = status.RankStatus("one", 0, 4, "host-a", 0, 1, "running", 100.0)
NONE = RANK.ending("done")
STOPPED = replace(RANK, rank=1, state="stopped")
CAUSE = replace(RANK, rank=3, host="host-b", state="failed", ended=104.0, error="ValueError: bad shard")
ECHO = replace(RANK, rank=0, state="failed", ended=103.0, error="RuntimeError: Connection closed by peer")


@pytest.mark.parametrize(
    ("ranks", "launcher", "asked", "expected"),
    [
        ([NONE], 0, False, 0),
        ([NONE], 0, True, 0),  # the stop came with the last step: nothing is left to do
        ([STOPPED, STOPPED], 1, True, 75),  # torchrun makes 1 of every code
        ([STOPPED, NONE], 75, False, 75),
        ([RANK], -15, True, 75),  # stopped before its first step
        ([CAUSE, STOPPED], 1, True, 1),
        ([CAUSE, ECHO], 75, False, 1),
        ([RANK], 137, False, 137),
        ([RANK], 0, False, 1),  # killed, and the launcher did not see it
        ([], 127, False, 127),
    ],
)
def test_the_exit_code_follows_what_the_ranks_wrote(
    ranks: list[status.RankStatus], launcher: int, asked: bool, expected: int
) -> None:
    assert status.exit_code(ranks, launcher, asked) == expected


def test_the_summary_names_the_first_failure_and_not_its_echo(tmp_path: Path) -> None:
    silent = replace(RANK, rank=2, host="host-b")
    for rank in (ECHO, CAUSE, replace(NONE, rank=2), replace(CAUSE, launch="before", rank=7)):
        rank.write(tmp_path)
    ranks = status.read(tmp_path, "one")
    assert [rank.rank for rank in ranks] == [0, 2, 3]
    first = status.first_failure(ranks)
    assert first == CAUSE
    text = status.summary(ranks, 4, tmp_path)
    assert f"rank 3 on host-b failed first: ValueError: bad shard; log: {tmp_path / 'rank-3.log'}" in text
    assert "later failures: rank 0" in text
    assert "never started: rank 1 of 4" in text
    many = status.summary(ranks, 100_000_000, tmp_path)
    assert "never started: rank 1, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 99999981 more of 1000" in many
    gone = status.summary([ECHO, silent], 2, tmp_path)
    assert gone.startswith("rank 2 on host-b was killed (out of memory?), or the host is down")
    assert "rank 0 on host-a failed after that: RuntimeError: Connection closed by peer" in gone


def test_ranks_take_their_number_from_mpi_and_slurm() -> None:
    mpi = {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "8"}
    found = {**mpi, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    set_rank_variables(found)
    assert [found[n] for n in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")] == ["5", "1", "8", "4"]
    slurm = {"SLURM_PROCID": "3", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "1"}
    set_rank_variables(slurm)
    assert (slurm["RANK"], slurm["WORLD_SIZE"]) == ("3", "4")
    with pytest.raises(ValueError, match="RANK: not set, nor any of"):
        set_rank_variables({})


LAUNCH = f"test-{os.getpid()}"  # ranks are found by it on the whole machine, where another suite may run too


def start_rank(folder: Path, code: str, rank: int = 0, ranks: int = 1, node: int = 0) -> "subprocess.Popen[bytes]":
    """A rank without torch: what a launcher would start, for a module of a few lines."""
    (folder / f"work{rank}.py").write_text(code)
    variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
    own = {status.LAUNCH_ID: LAUNCH, status.LOG_FOLDER: str(folder / "logs"), status.SHUTDOWN_TIMEOUT: "20"}
    return subprocess.Popen(
        [sys.executable, agent.RANK_FILE, f"work{rank}", "x=1"], cwd=folder, stdout=subprocess.PIPE,
        env={**os.environ, **variables, **own, "PYTHONPATH": str(folder), "CROSS_RANK": str(node)},
    )  # fmt: skip


def test_a_rank_keeps_its_output_and_how_it_ended(tmp_path: Path) -> None:
    process = start_rank(tmp_path, "import os, sys\nos.write(1, b'native\\n')\nprint(sys.argv)\nraise KeyError('lost')")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out.startswith(b"native\n['")
    assert out.endswith(b"work0.py', 'x=1']\n")
    log = (tmp_path / "logs/rank-0.log").read_text()
    assert "native" in log
    assert "KeyError: 'lost'" in log
    (rank,) = status.read(tmp_path / "logs", LAUNCH)
    assert (rank.state, rank.error) == ("failed", "KeyError: 'lost'")
    assert rank.traceback is not None
    assert "work0.py" in rank.traceback


def test_a_rank_that_stopped_waits_for_those_that_still_write(tmp_path: Path) -> None:
    slow = start_rank(tmp_path, "import sys, time\ntime.sleep(3)\nsys.exit(75)", rank=1, ranks=2)
    while not (tmp_path / "logs/rank-1.json").exists():
        time.sleep(0.05)
    quick = start_rank(tmp_path, "import sys\nsys.exit(75)", rank=0, ranks=2)
    assert (quick.wait(timeout=60), slow.wait(timeout=60)) == (75, 75)
    ranks = status.read(tmp_path / "logs", LAUNCH)
    assert [rank.state for rank in ranks] == ["stopped", "stopped"]


def test_signals_reach_the_ranks_of_one_launch_and_node_and_not_their_children(tmp_path: Path) -> None:
    code = "import subprocess, time\nsubprocess.Popen(['sleep', '50'])\nprint('up', flush=True)\ntime.sleep(50)"
    processes = [start_rank(tmp_path, code, rank=n, ranks=2, node=n) for n in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
    children = [psutil.Process(p.pid).children() for p in processes]
    try:
        assert {p.pid for p in agent.find_ranks(LAUNCH)} == {p.pid for p in processes}
        assert [p.pid for p in agent.find_ranks(LAUNCH, node=1)] == [processes[1].pid]
        assert agent.find_ranks("another") == []
        assert agent.signal_ranks(LAUNCH, 10, node=0) == 1
        assert processes[0].wait(timeout=20) == -10
        assert processes[1].poll() is None
    finally:
        agent.signal_ranks(LAUNCH, 9)
        for child in [c for group in children for c in group if c.is_running()]:
            child.kill()
    assert processes[1].wait(timeout=20) == -9


def test_a_host_that_ssh_does_not_reach_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"nowhere\.invalid: not reachable by ssh without a password|ssh: not installed"
    ):
        ask(Host("nowhere.invalid", 1), "-o BatchMode=yes -o ConnectTimeout=3", "probe", {})


def test_a_probe_says_what_a_host_has(tmp_path: Path) -> None:
    found = agent.describe("quickstart/vision", ["train.steps=5"], str(tmp_path), None)
    assert found["shared"]
    assert found["recipe"] == config.digest(config.tree("quickstart/vision", ["train.steps=5"]))
    assert not agent.describe(None, [], str(tmp_path / "other"), None)["shared"]
    assert "no such recipe" in agent.describe("quickstart/none", [], str(tmp_path), None)["problem"]
