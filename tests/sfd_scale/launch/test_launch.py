"""Whole commands under the deepspeed launcher: two ranks, a kill, and a resume that changes nothing."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = [
    "train.steps=24",
    "train.global_batch=32",
    "train.log_every=1",
    "checkpoint.every=6",
    "checkpoint.keep_last=2",
]


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # A W&B service that another test of this process has started would take the killed run for one that goes on.
    inherited = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    return {**inherited, "PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "RANKS": "2"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "images"
    command = [sys.executable, "-m", "sfd_scale", "encode", "quickstart/images", "source.num_images=256", f"out={out}"]
    subprocess.run([*command, "store.chunk=100"], cwd=ROOT, env=environment(), check=True, timeout=120)
    return out


def start(images: Path, run: Path) -> "subprocess.Popen[bytes]":
    command = [str(ROOT / "launchers/deepspeed.sh"), "train", "quickstart/vision", *SETTINGS, f"data.path={images}"]
    return subprocess.Popen(
        [*command, "wandb.mode=offline", "--run", str(run)], cwd=ROOT, env=environment(), start_new_session=True
    )


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())]


def last_step(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_a_killed_run_goes_on_as_if_nothing_had_happened(images: Path, tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert start(images, straight).wait(timeout=200) == 0
    assert [step for step, _ in losses(straight)] == list(range(1, 25))
    values = [loss for _, loss in losses(straight)]
    assert sum(values[-8:]) < sum(values[:8])

    process = start(images, killed)
    deadline = time.monotonic() + 200
    while last_step(killed) < 10 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(["pkill", "-9", "-f", str(killed)], check=False)  # the launcher's ranks are sessions of their own
    assert 10 <= last_step(killed) < 24, "the run ended before it could be killed"
    wandb_id = (killed / "wandb_run_id").read_text()

    assert start(images, killed).wait(timeout=200) == 0
    assert losses(killed) == losses(straight)
    assert (killed / "wandb_run_id").read_text() == wandb_id
    assert json.loads((killed / "environment.json").read_text())["world_size"] == 2

    # Another recipe in the same folder is refused, with the keys that differ, and changes nothing in it.
    recipe = (killed / "recipe.yaml").read_text()
    command = [sys.executable, "-m", "sfd_scale", "train", "quickstart/vision", *SETTINGS, f"data.path={images}"]
    foreign = subprocess.run(
        [*command, "seed=7", "--run", str(killed)], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert foreign.returncode == 2
    assert "recipe.seed: 7, in the checkpoint 0" in foreign.stderr
    assert (killed / "recipe.yaml").read_text() == recipe


def ranks_of(run: Path) -> dict[str, int]:
    """The processes that train in this folder: RANK → process id."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        if str(run) in (process.info["cmdline"] or []):
            with contextlib.suppress(psutil.Error):
                rank = process.environ().get("RANK")
                if rank is not None:
                    found[rank] = process.pid
    return found


@pytest.mark.full
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
@pytest.mark.parametrize("target", ["one rank", "launcher", "every process"])
def test_a_stop_request_to_anyone_saves_one_step_on_all_ranks(
    images: Path, tmp_path: Path, launcher: str, target: str
) -> None:
    run = tmp_path / "run"
    settings = ["train.steps=100000", "train.global_batch=32", "train.log_every=1", "checkpoint.every=100000"]
    command = [str(ROOT / f"launchers/{launcher}.sh"), "train", "quickstart/vision", *settings, f"data.path={images}"]
    process = subprocess.Popen(
        [*command, "wandb.mode=disabled", "--run", str(run)], cwd=ROOT, env=environment(), start_new_session=True
    )
    deadline = time.monotonic() + 300
    while last_step(run) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    ranks = ranks_of(run)
    assert set(ranks) == {"0", "1"} and process.poll() is None
    if target == "every process":  # as Slurm does it: the whole step, workers and torchrun too
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.Error):
                one.send_signal(signal.SIGUSR1)
    else:
        os.kill(ranks["1"] if target == "one rank" else process.pid, signal.SIGTERM)
    assert process.wait(timeout=200) == 75
    saved = sorted(path.parent.name for path in (run / "checkpoints").glob("step-*/COMMIT"))
    assert saved == [f"step-{last_step(run):08d}"], "the last step of all, and that one only"
    assert ranks_of(run) == {}, "nobody is left behind"


def said(launcher: str, *words: str) -> tuple[int, list[str]]:
    """Exit code of a launch, and all the lines that a user sees of it."""
    run = subprocess.run(
        [str(ROOT / f"launchers/{launcher}.sh"), *words], cwd=ROOT, env=environment(), capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    return run.returncode, [line for line in (run.stdout + run.stderr).splitlines() if line.strip()]


@pytest.mark.parametrize(
    ("launcher", "words", "sentence"),
    [
        (
            "deepspeed",
            [
                "train", "quickstart/sfd", "engine.precision=bf16", "engine.offload_optimizer=true",
                "engine.zero_stage=0",
            ],
            "engine.zero_stage: 0; allowed with precision bf16: 1, 2, 3.",
        ),
        (
            "torchrun", ["--module", "eval", "generate", "quickstart/eval", "guidance.kind=autoguidance"],
            "guide: null, with guidance kind autoguidance; allowed: a file of `sfd export`",
        ),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_be_is_one_sentence(
    tmp_path: Path, launcher: str, words: list[str], sentence: str
) -> None:
    out = tmp_path / "out"
    code, lines = said(launcher, *words, "--out" if "eval" in words else "--run", str(out))
    assert code == 2 and len(lines) == 1, lines
    assert lines[0].startswith(f"error: {sentence}") and "(set in " in lines[0]
    assert all(json.loads(path.read_text())["state"] == "running" for path in out.rglob("rank-*.json")), "ended, mute"
    assert ranks_of(out) == {}
