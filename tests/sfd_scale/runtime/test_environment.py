"""Environment variables: empty is not set, nonsense is one sentence, and one module reads them all."""

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sfd_scale.launch import commands
from sfd_scale.launch.rank import set_rank_variables
from sfd_scale.runtime import environment

ROOT = Path(__file__).resolve().parents[3]
NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT", "OMP_NUM_THREADS", "MAX_JOBS")


def sfd(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "sfd_scale", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, **variables},
    )  # fmt: skip


def test_no_other_module_reads_or_sets_a_variable() -> None:
    pattern = re.compile(r"(?<!process\.)\benviron\b|getenv\b")
    files = [*ROOT.glob("sfd_scale/**/*.py"), *ROOT.glob("eval/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]
    assert len(files) > 150
    found = [
        f"{file.relative_to(ROOT)}:{number}"
        for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line.replace("process.environ()", "")) and file.name != "environment.py"
    ]
    assert not found


def test_an_empty_rank_is_no_rank_and_another_text_is_one_sentence() -> None:
    done = sfd("show", "quickstart/sfd", RANK="", WORLD_SIZE=" ", LOCAL_RANK="", OMP_NUM_THREADS="", MASTER_PORT="")
    assert (done.returncode, done.stderr) == (0, "")
    done = sfd("show", "quickstart/sfd", RANK="zero", WORLD_SIZE="2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: [rank zero] RANK: 'zero'; allowed: a whole number, 0 and up\n"


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["two", "-1", "1.5", "1_0", "²", "0x1", "1e400", "9" * 40])
def test_a_number_that_libraries_read_is_checked_before_they_do(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{name}: {value!r}; allowed: ")):
        environment.check({name: value})


@pytest.mark.parametrize("empty", ["", " ", "\t\n"])
def test_empty_is_not_set_whatever_the_variable(empty: str) -> None:
    environment.check(dict.fromkeys((*NUMBERS, "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"), empty))
    assert environment.text("X", {"X": empty}) is None
    assert environment.whole_number("X", {"X": empty}, least=5) is None
    assert not environment.flag("X", {"X": empty})


def test_a_switch_may_be_off_by_a_word() -> None:
    assert [environment.flag("X", {"X": text}) for text in ("1", "True", "on", "0", "false", "no")] == [True] * 3 + [
        False
    ] * 3
    with pytest.raises(ValueError, match="X: 'maybe'; allowed: 1 or 0"):
        environment.flag("X", {"X": "maybe"})


@pytest.mark.parametrize(
    ("given", "devices"),
    [
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("3, 5", ["3", "5"]),
        ("0,1,", ["0", "1"]),
        ("0,-1,1", ["0"]),  # CUDA shows the entries before the first one that is not valid
        ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", ["GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"]),
        ("MIG-GPU-8932f937/1/0,MIG-1b2", ["MIG-GPU-8932f937/1/0", "MIG-1b2"]),
    ],
)
def test_gpus_are_numbers_and_names_by_place(given: str, devices: list[str]) -> None:
    assert environment.visible_devices({"CUDA_VISIBLE_DEVICES": given}) == devices
    assert environment.visible_devices({}) is None


@pytest.mark.parametrize("given", ["all", "0,,1", "0,0", "1.5", "gpu0", "GPU-", "0;1", "MIG-1 MIG-2"])
def test_other_entries_are_refused(given: str) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"CUDA_VISIBLE_DEVICES: {given!r}; allowed: numbers of GPUs, or names")
    ):
        environment.visible_devices({"CUDA_VISIBLE_DEVICES": given})


NAMES = ["GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "MIG-11111111-aaaa-bbbb-cccc-222222222222", "MIG-GPU-1/7/0"]


GENERATE = ("generate", "quickstart/eval")
TRAIN = ("train", "quickstart/sfd")


def launch(
    tmp_path: Path, words: tuple[str, ...] = GENERATE, launcher: str = "deepspeed", **variables: str
) -> commands.Launch:
    work = commands.RankCommand("eval", (*words, "--out", str(tmp_path)))
    return commands.make_launch(launcher, work, {"PATH": os.environ["PATH"], "LOG_FOLDER": str(tmp_path), **variables})


def slots(made: commands.Launch) -> dict[str, list[int | str]]:
    (world,) = [word.partition("=")[2] for word in made.command if word.startswith("--world_info=")]
    found: dict[str, list[int | str]] = json.loads(base64.urlsafe_b64decode(world))
    return found


@pytest.mark.parametrize(("visible", "expected"), [(NAMES[:1], NAMES[:1]), (NAMES, NAMES), (["2", "0"], [2, 0])])
def test_deepspeed_gives_the_named_gpus_to_the_ranks_in_their_order(
    tmp_path: Path, visible: list[str], expected: list[int | str]
) -> None:
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    made = launch(tmp_path, CUDA_VISIBLE_DEVICES=",".join(visible))  # one rank per GPU, without RANKS
    assert slots(made) == {"localhost": expected} and made.world_size == len(visible)
    ranks: dict[str, str] = {}
    CUDA_Accelerator.set_visible_devices_envs(CUDA_Accelerator.__new__(CUDA_Accelerator), ranks, expected)
    assert ranks == {"CUDA_VISIBLE_DEVICES": ",".join(visible)}
    fewer = launch(tmp_path, CUDA_VISIBLE_DEVICES=",".join(visible), RANKS="1")
    assert slots(fewer) == {"localhost": expected[:1]}
    with pytest.raises(ValueError, match=r"allowed with RANKS=4: 4 GPUs, by number or by name"):
        launch(tmp_path, CUDA_VISIBLE_DEVICES=",".join(visible), RANKS="4")


def test_a_host_that_is_started_without_ssh_takes_the_gpus_that_its_scheduler_names(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\n")
    given = {"HOSTFILE": str(tmp_path / "hosts"), "NO_SSH": "1", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "29512"}
    made = launch(tmp_path, **given, NODE_RANK="1", CUDA_VISIBLE_DEVICES=",".join(NAMES[:2]))
    assert slots(made) == {"a": [0, 1], "b": NAMES[:2]}


def test_hidden_gpus_stay_hidden_from_the_ranks(tmp_path: Path) -> None:
    for hidden in ("", "-1"):
        made = launch(tmp_path, CUDA_VISIBLE_DEVICES=hidden, RANKS="2")
        assert slots(made) == {"localhost": [0, 1]} and made.environment["DS_ACCELERATOR"] == "cpu"
        with pytest.raises(ValueError, match="RANKS: not set, and CUDA_VISIBLE_DEVICES hides all GPUs"):
            launch(tmp_path, CUDA_VISIBLE_DEVICES=hidden)


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_training_on_several_mig_instances_is_refused(tmp_path: Path, launcher: str) -> None:
    """NCCL does not connect the instances of a GPU (NVIDIA/nccl#1716)."""
    said = r"allowed for a training: whole GPUs, or one MIG instance with RANKS=1, because NCCL does not connect MIG"
    for visible in (NAMES[1:], NAMES[:2], [NAMES[1].lower(), "0"]):
        with pytest.raises(ValueError, match=said):
            launch(tmp_path, TRAIN, launcher, CUDA_VISIBLE_DEVICES=",".join(visible))
        assert launch(tmp_path, GENERATE, launcher, CUDA_VISIBLE_DEVICES=",".join(visible)).world_size == 2
    one = launch(tmp_path, TRAIN, launcher, CUDA_VISIBLE_DEVICES=",".join(NAMES[1:]), RANKS="1")
    assert one.world_size == 1
    assert launch(tmp_path, TRAIN, launcher, CUDA_VISIBLE_DEVICES="GPU-1,GPU-2").world_size == 2
    assert launch(tmp_path, TRAIN, launcher, CUDA_VISIBLE_DEVICES="MIG-1,MIG-2", DS_ACCELERATOR="cpu", RANKS="2")


def test_a_rank_sees_its_own_mig_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = ((NAMES, "1", NAMES[1]), (NAMES, "0", ",".join(NAMES)), (["0", "1"], "1", "0,1"))
    # More ranks than devices: CUDA will say so.
    for visible, local, seen in (*cases, (NAMES, "3", ",".join(NAMES))):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(visible))
        monkeypatch.setenv("LOCAL_RANK", local)
        environment.see_own_device()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


def test_what_an_outer_launcher_left_does_not_reach_new_ranks(tmp_path: Path) -> None:
    left = {"RANK": "3", "LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "8", "GROUP_RANK": "1"}
    left |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "x"}
    made = launch(tmp_path, **left, DS_ACCELERATOR="cpu", RANKS="2")
    assert not left.keys() & made.environment.keys()


def test_empty_variables_of_a_launch_are_not_set(tmp_path: Path) -> None:
    names = (
        "HOSTFILE",
        "NO_SSH",
        "NODES",
        "NODE_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "LAUNCHER",
        "RENDEZVOUS",
        "EXPORT",
    )
    names += ("SHUTDOWN_TIMEOUT", "SLURM_JOB_NUM_NODES", "PET_NNODES", "JOB_ID", "SLURM_JOB_ID")
    work = commands.RankCommand("sfd_scale", ("train", "quickstart/vision"))
    for launcher in ("auto", "deepspeed", "torchrun"):
        given = {"DS_ACCELERATOR": "cpu", "RANKS": "2", "LOG_FOLDER": str(tmp_path), **dict.fromkeys(names, "")}
        assert commands.make_launch(launcher, work, given).world_size == 2
    with pytest.raises(ValueError, match="SHUTDOWN_TIMEOUT: 'soon'; allowed: a whole number from 1 to 31536000"):
        commands.make_launch(
            "auto", work, {"DS_ACCELERATOR": "cpu", "LOG_FOLDER": str(tmp_path), "SHUTDOWN_TIMEOUT": "soon"}
        )


def test_a_rank_reads_past_empty_variables_and_names_the_one_that_is_no_number() -> None:
    found = {"RANK": "", "OMPI_COMM_WORLD_RANK": "", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4"}
    found["SLURM_NTASKS_PER_NODE"] = "2"
    set_rank_variables(found)
    assert [found[n] for n in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")] == ["3", "1", "4", "2"]
    with pytest.raises(ValueError, match=r"SLURM_NTASKS: '4\(x2\)'; allowed: a whole number, 1 and up"):
        set_rank_variables({"RANK": "0", "LOCAL_RANK": "0", "SLURM_NTASKS": "4(x2)"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"RANK": "1"}, "RANK: 1, but WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE: 4, but RANK is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK: 2 with WORLD_SIZE=2; allowed: 0 to 1"),
        (
            {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"},
            "LOCAL_RANK: 2 with LOCAL_WORLD_SIZE=2; allowed: 0 to 1",
        ),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "MASTER_ADDR: not set, but RANK and WORLD_SIZE are"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "h"}, "MASTER_PORT: not set, but RANK and WORLD_SIZE are"),
    ],
)
def test_the_numbers_of_a_rank_belong_together(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], message: str
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    environment.check_rank()  # a single process
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        environment.check_rank()


ODD = st.one_of(
    st.sampled_from(
        ["", " ", "0", "1", "-1", "2:4", "4(x2)", "node[1-3]", "True", "none", "0,1", "GPU-1", "MIG-1/0/1"]
    ),
    st.integers().map(str),
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12),
)
READ = (
    *NUMBERS, "NODES", "NODE_RANK", "RANKS", "LOCAL_SIZE", "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "MAX_RESTARTS",
    "SHUTDOWN_TIMEOUT", "SLURM_JOB_NUM_NODES", "PET_NNODES", "RENDEZVOUS", "NO_SSH", "JOB_ID", "TORCHELASTIC_RUN_ID",
)  # fmt: skip


@example({"RANKS": "6700146877"}, "deepspeed")
@example({"RANKS": "6700146877"}, "torchrun")
@example({"NODES": "6700146877", "NODE_RANK": "0"}, "torchrun")
@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(READ), ODD, max_size=6), st.sampled_from(["auto", "deepspeed", "torchrun"]))
def test_odd_environments_start_or_are_refused_in_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, odd: dict[str, str], launcher: str
) -> None:
    folder = tmp_path_factory.getbasetemp()
    work = commands.RankCommand("eval", ("generate", "quickstart/eval", "--out", str(folder)))
    given = {"LOG_FOLDER": str(folder), "RANKS": "2", "MASTER_ADDR": "127.0.0.1", **odd}
    try:
        environment.check(given)
        made = commands.make_launch(launcher, work, given)
    except ValueError as error:
        assert re.match(r"[A-Z_]+: .*(allowed|set|needs|use) ?", str(error), re.DOTALL), error
        assert "invalid literal" not in str(error)
    else:
        assert made.world_size >= 1 and all(isinstance(word, str) for word in made.command)
        assert "RANK" not in made.environment


@pytest.mark.parametrize("count", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_a_training_that_srun_or_mpirun_starts_several_times_is_refused(
    monkeypatch: pytest.MonkeyPatch, count: str
) -> None:
    """`srun -n 8 sfd train` trained eight times the same, or wrote to one folder where files have no locks."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(count, "8")
    with pytest.raises(ValueError, match=f"^{count}: 8, but RANK is not set, so 8 processes would each train this run"):
        environment.check_alone()
    monkeypatch.setenv(count, "1")
    environment.check_alone()
    monkeypatch.setenv(count, "8")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    environment.check_alone()
