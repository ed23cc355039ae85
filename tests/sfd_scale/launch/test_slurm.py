"""launchers/slurm.sbatch on a real Slurm of two nodes, one rank on each: training, requeue, time limit, scancel."""

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sfd_scale.launch import status
from tests.helpers.slurm import ENDED, Slurm, slurm
from tests.helpers.vision_run import QUIET, RECIPE, ROOT, SETTINGS, alone, encode_images, environment, losses

pytestmark = pytest.mark.full

# No checkpoint but the ones that a stop and the end of the training make.
LONGER = ["train.steps=150", "checkpoint.every=100000"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm(2, tmp_path_factory.mktemp("slurm")) as made:
        yield made


@pytest.fixture(scope="module")
def images(cluster: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode_images(tmp_path_factory.mktemp("data") / "images")


def submit(cluster: Slurm, images: Path, run: Path, *more: str, limit: str = "60") -> int:
    """Submit a training on both nodes; returns the number of the job."""
    options = ["--parsable", "--nodes=2", f"--time={limit}", f"--output={run}.out"]
    training = ["train", RECIPE, *SETTINGS, *QUIET, f"data.path={images}", *more, "--run", str(run)]
    return int(
        cluster.run("sbatch", *options, "launchers/slurm.sbatch", *training, cwd=ROOT, environment=environment())
    )


def wait_for_step(cluster: Slurm, number: int, run: Path, step: int, timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while max(losses(run), default=0) < step:
        assert time.monotonic() < deadline and cluster.job(number)["JobState"] not in ENDED, output(run)
        time.sleep(0.2)


def wait_for_end(cluster: Slurm, number: int, run: Path, state: str, restarts: int) -> None:
    """Wait for the end of the job; nothing of it is left on the nodes."""
    job = cluster.wait_for(number, ENDED)
    assert (job["JobState"], job["Restarts"]) == (state, str(restarts)), output(run)
    assert cluster.processes() == []


def output(run: Path) -> str:
    return Path(f"{run}.out").read_text()


def saved_steps(run: Path) -> list[int]:
    """The steps of the whole checkpoints."""
    return [int(path.parent.name.removeprefix("step-")) for path in sorted(run.glob("checkpoints/step-*/COMMIT"))]


@pytest.fixture(scope="module")
def undisturbed(cluster: Slurm, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a job that trained to its end."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    number = submit(cluster, images, run, *LONGER)
    wait_for_end(cluster, number, run, "COMPLETED", restarts=0)
    return run


def test_a_job_on_two_nodes_trains_as_one_process_does(undisturbed: Path, images: Path, tmp_path: Path) -> None:
    assert losses(undisturbed) == pytest.approx(alone(images, tmp_path / "alone", *LONGER), rel=1e-4)
    ranks = [json.loads((undisturbed / f"logs/rank-{n}.json").read_text()) for n in range(2)]
    assert [(rank["host"], rank["state"]) for rank in ranks] == [("node-a", "done"), ("node-b", "done")]
    assert saved_steps(undisturbed) == [150]


def test_a_requeued_job_saves_and_goes_on_from_its_checkpoint(
    cluster: Slurm, images: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    number = submit(cluster, images, run, *LONGER)
    wait_for_step(cluster, number, run, 7)
    cluster.run("scontrol", "requeue", str(number))
    cluster.wait_for(number, {"PENDING"})
    (saved,) = saved_steps(run)
    assert 7 <= saved < 150 and max(losses(run)) == saved
    wait_for_end(cluster, number, run, "COMPLETED", restarts=1)
    assert f"resumed from {run}/checkpoints/step-{saved:08d}" in output(run)
    assert losses(run) == losses(undisturbed)


def test_before_its_time_limit_a_job_saves_and_requeues_itself(cluster: Slurm, images: Path, tmp_path: Path) -> None:
    """The script asks for SIGUSR1 300 s before the limit. Slurm sends it up to 30 s earlier, here after 150 to 180."""
    # With a constant learning rate the losses do not depend on train.steps: this run cannot end before the signal.
    constant = ["lr={kind: constant}", "train.global_batch=96", "checkpoint.every=100000"]
    run = tmp_path / "run"
    number = submit(cluster, images, run, *constant, "train.steps=1000000", limit="8")
    cluster.wait_for(number, {"RUNNING"})
    assert cluster.wait_for(number, {"PENDING"})["Restarts"] == "1"
    (saved,) = saved_steps(run)
    assert saved == max(losses(run)) > 0
    steps = saved + 5
    wait_for_step(cluster, number, run, steps)
    assert f"resumed from {run}/checkpoints/step-{saved:08d}" in output(run)
    cluster.run("scancel", str(number))
    wait_for_end(cluster, number, run, "CANCELLED", restarts=1)

    # Two ranks of one machine, never stopped.
    straight = tmp_path / "straight"
    training = ["train", RECIPE, *SETTINGS, *QUIET, f"data.path={images}", *constant, f"train.steps={steps}"]
    subprocess.run(
        ["launchers/torchrun.sh", *training, "--run", str(straight)],
        cwd=ROOT, env=environment(RANKS="2"), check=True, timeout=600,
    )  # fmt: skip
    assert {step: loss for step, loss in losses(run).items() if step <= steps} == losses(straight)


def test_scancel_saves_and_ends_the_job_for_good(
    cluster: Slurm, images: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    number = submit(cluster, images, run, *LONGER)
    wait_for_step(cluster, number, run, 7)
    cluster.run("scancel", str(number))
    wait_for_end(cluster, number, run, "CANCELLED", restarts=0)
    assert cluster.job(number)["ExitCode"] == f"{status.REQUEUE_EXIT_CODE}:0"
    assert cluster.run("squeue", "--noheader") == ""
    (saved,) = saved_steps(run)
    assert 7 <= saved < 150 and max(losses(run)) == saved

    # The same command, as a new job, goes on.
    number = submit(cluster, images, run, *LONGER)
    wait_for_end(cluster, number, run, "COMPLETED", restarts=0)
    assert losses(run) == losses(undisturbed)
