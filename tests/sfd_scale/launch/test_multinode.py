"""Real runs over several hosts: the deepspeed launcher with a hostfile, pdsh and ssh, on network namespaces."""

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.hosts import Network, network
from tests.helpers.vision_run import QUIET, RECIPE, ROOT, SETTINGS, alone, encode_images, environment, losses


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    with network(3, tmp_path_factory.mktemp("network")) as made:
        yield made


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode_images(tmp_path_factory.mktemp("data") / "images")


def start(
    hosts: Network, hostfile: Path, images: Path, run: Path, *more: str, recipe: str = RECIPE
) -> "subprocess.Popen[str]":
    variables = environment(HOSTFILE=str(hostfile), PDSH_SSH_ARGS_APPEND=f"-F {hosts.ssh_config}")
    script = [str(ROOT / "launchers/deepspeed.sh"), "train", recipe, *SETTINGS, *QUIET, f"data.path={images}"]
    return subprocess.Popen(
        hosts.hosts[0].command(*script, "--run", str(run), *more), cwd=ROOT, env=variables, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process: "subprocess.Popen[str]", timeout: float = 600) -> tuple[int, str]:
    out, _ = process.communicate(timeout=timeout)
    return process.returncode, out


@pytest.mark.full
def test_two_hosts_train_as_one_process_does(trio: Network, images: Path, tmp_path: Path) -> None:
    hostfile = trio.hostfile(tmp_path / "hosts", count=2)
    code, out = finish(start(trio, hostfile, images, tmp_path / "run"))
    assert code == 0, out
    assert losses(tmp_path / "run") == pytest.approx(alone(images, tmp_path / "alone"), rel=1e-5)
    ranks = [json.loads((tmp_path / f"run/logs/rank-{n}.json").read_text()) for n in range(2)]
    assert [(rank["host"], rank["state"]) for rank in ranks] == [("node-a", "done"), ("node-b", "done")]
    assert "rank 1 of 2 on node-b" in (tmp_path / "run/logs/rank-1.log").read_text()


def test_what_is_wrong_with_a_host_is_told_before_anything_starts(trio: Network, tmp_path: Path) -> None:
    images = tmp_path / "not read"
    hostfile = trio.hostfile(tmp_path / "hosts", count=2)
    # A recipe, and a run folder, that only the first host has.
    own = trio.private / "own.yaml"
    own.write_text(f"extends: {RECIPE}\n")
    code, out = finish(start(trio, hostfile, images, trio.private / "run", recipe=str(own)))
    assert code == 2
    assert f"node-b: {own}: no such recipe or file" in out
    assert f"node-b: does not see {trio.private / 'run/logs'}; put the run folder on a shared file system" in out

    with hostfile.open("a") as stream:
        stream.write("node-x slots=1\n")
    code, out = finish(start(trio, hostfile, images, tmp_path / "run"))
    assert code == 2
    assert "error: node-x: not reachable by ssh without a password" in out
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.full
def test_a_host_is_killed_and_the_run_goes_on_with_one_fewer(trio: Network, images: Path, tmp_path: Path) -> None:
    longer = ["train.steps=40", "checkpoint.every=5"]
    expected = alone(images, tmp_path / "alone", *longer)
    run = tmp_path / "run"
    process = start(trio, trio.hostfile(tmp_path / "three", count=3), images, run, *longer)
    deadline = time.monotonic() + 600
    while len(losses(run)) < 7 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    trio.hosts[2].kill()
    code, out = finish(process)
    assert code not in (0, 75), out
    assert "rank 2 on node-c was killed (out of memory?), or the host is down" in out
    assert 5 <= max(losses(run)) < 40, "the run ended before the host was killed"

    code, out = finish(start(trio, trio.hostfile(tmp_path / "two", count=2), images, run, *longer))
    assert code == 0, out
    assert losses(run) == pytest.approx(expected, rel=1e-4)
