"""Worker processes of the dataloader: limits of the machine, deaths, stalls, and stop requests during a wait."""

from __future__ import annotations

import gc
import multiprocessing.util
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from sfd_scale.data import waiting, workers
from sfd_scale.data.waiting import DataWaitStopped, PatientBatches
from sfd_scale.data.workers import explained_deaths, worker_batches
from tests.faults.cases import small_disk
from tests.helpers import small_run

ROOT = Path(__file__).resolve().parents[3]
OTHER_REQUESTS = ("SIGUSR1", "time limit")
ADVICE = "raise train.timeout_s"


def numbers(keys: list[int]) -> torch.Tensor:
    return torch.tensor(keys)


def unpicklable(keys: list[int]) -> Any:
    """The thread that sends the batch fails, prints a traceback and sends nothing."""
    return lambda: keys


def missing(keys: list[int]) -> torch.Tensor:
    if keys[0] == 2:
        raise FileNotFoundError(2, "No such file", "shard.7")
    return numbers(keys)


def sleepy(keys: list[int]) -> torch.Tensor:
    time.sleep(600 if keys[0] == 2 else 0)
    return numbers(keys)


def read(fetch: Any, num_workers: int = 1, **options: Any) -> Iterator[Any]:
    keys = ([number, number + 10] for number in count())
    return worker_batches(fetch, keys, num_workers=num_workers, setting="data.num_workers", **options)


def children(before: set[psutil.Process]) -> list[psutil.Process]:
    return sorted(set(psutil.Process().children()) - before, key=lambda process: process.pid)


@pytest.fixture(autouse=True)
def no_workers_are_left() -> Iterator[None]:
    """A failure ends the process, so it leaves PyTorch's handler of dead workers unset."""
    handler = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    workers.kill_workers()
    gc.collect()
    workers._WORKERS.clear()
    signal.signal(signal.SIGCHLD, handler)


# ------------------------------------------------------------------------------------- limits of the machine


def set_tmpdir(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Like TMPDIR, but multiprocessing does not remove its folder at the end of the tests."""
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(multiprocessing.util, "get_temp_dir", lambda: tempfile.mkdtemp(prefix="pymp-"))


@pytest.mark.parametrize("length", [70, 80, 99, 150])
def test_a_long_tmpdir_is_found_before_a_worker_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, length: int
) -> None:
    """A socket's path has at most 107 characters on Linux; multiprocessing adds 32 to TMPDIR."""
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        folder = Path(short, "x" * (length - len(short) - 1))
        folder.mkdir()
        set_tmpdir(monkeypatch, folder)
        if length <= 75:
            assert workers.socket_problem() is None
            return
        with pytest.raises(ValueError, match=rf"data\.num_workers: 1, but TMPDIR: {folder} \({length} characters\)"):
            read(numbers)
        assert next(read(numbers, num_workers=0)).tolist() == [0, 10], "workers alone need the socket"


def test_shared_memory_must_hold_the_batches_of_all_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    needed = "8 MiB free, but the batches that worker processes read ahead need 12 MiB"
    if os.geteuid() == 0:
        with small_disk(tmp_path / "shm", "8m"):
            monkeypatch.setattr(workers, "SHARED_MEMORY", tmp_path / "shm")
            with pytest.raises(ValueError, match=rf"{needed}; start the container with --ipc=host"):
                read(numbers, 3, batch_bytes=2 * 2**20)  # two of each worker
            workers.require_workers("data.num_workers", 2, 2 * 2**20, 1)
    monkeypatch.setattr(workers, "SHARED_MEMORY", tmp_path / "none")
    with pytest.raises(ValueError, match="none: missing, and worker processes hand over batches in it"):
        read(numbers)


@pytest.mark.parametrize(("spare", "num_workers", "enough"), [(40, 1, False), (100, 1, True), (100, 8, False)])
def test_open_files_are_counted_before_a_worker_starts(spare: int, num_workers: int, enough: bool) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + spare, hard))
    try:
        if enough:
            workers.require_workers("data.num_workers", num_workers, 0, 4)
            return
        with pytest.raises(ValueError, match=r"open files: \d+ of at most \d+ are open.*ulimit -n \d+"):
            workers.require_workers("data.num_workers", num_workers, 0, 4)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --------------------------------------------------------------------------------------------- deaths, stalls


@pytest.mark.parametrize(
    ("signum", "cause"), [(signal.SIGKILL, "the machine has no memory left"), (signal.SIGBUS, "no room is left in")]
)
def test_a_worker_that_dies_is_reported_with_its_cause(signum: signal.Signals, cause: str) -> None:
    before = set(psutil.Process().children())
    batches = read(numbers)
    next(batches)
    (worker,) = children(before)
    said = rf"worker process {worker.pid} of the dataloader.*{cause}"
    with pytest.raises(ChildProcessError, match=said), explained_deaths():
        worker.send_signal(signum)
        for _ in batches:
            time.sleep(0.01)


@pytest.mark.parametrize("pause", ["SIGSTOP", "a batch that does not come"])
def test_a_worker_that_stalls_is_reported_and_killed(pause: str) -> None:
    before = set(psutil.Process().children())
    batches = PatientBatches(read(sleepy), limit_s=60, advice=ADVICE)
    next(batches)  # on a busy machine a worker takes seconds to start
    batches.limit_s = 1.5
    (worker,) = children(before)
    if pause == "SIGSTOP":
        worker.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="no batch of data for 2 s: 1 worker processes give none"):
        list(batches)
    assert time.monotonic() - began < 60
    psutil.wait_procs([worker], timeout=60)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


def test_the_error_that_a_worker_prints_is_told() -> None:
    """The sending thread of the worker reports its error on the worker's stderr alone."""
    batches = PatientBatches(read(unpicklable), limit_s=6.0, advice=ADVICE)
    with pytest.raises(TimeoutError, match=r"a worker printed: .*[Pp]ickle.*; raise train\.timeout_s"):
        next(batches)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_error_of_a_file_is_one_sentence(num_workers: int) -> None:
    batches = PatientBatches(read(missing, num_workers), limit_s=60.0, advice=ADVICE)
    assert [next(batches).tolist() for _ in range(2)] == [[0, 10], [1, 11]]
    with pytest.raises((ValueError, OSError)) as found:
        next(batches)
    assert str(found.value) == "[Errno 2] No such file: 'shard.7'"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_stop_request_ends_a_wait_for_data(monkeypatch: pytest.MonkeyPatch, num_workers: int) -> None:
    monkeypatch.setattr(waiting, "STOP_WAIT_S", 0.5)
    stop = threading.Event()
    batches = PatientBatches(read(sleepy, num_workers), limit_s=600.0, advice=ADVICE, stop=stop.is_set)
    assert [next(batches).tolist() for _ in range(2)] == [[0, 10], [1, 11]]
    began = time.monotonic()
    threading.Timer(0.5, stop.set).start()
    with pytest.raises(DataWaitStopped):
        next(batches)
    assert 0.9 < time.monotonic() - began < 60
    assert next(PatientBatches(iter([7]), limit_s=60, advice=ADVICE, stop=stop.is_set)) == 7, "a batch that is there"


@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_the_time_until_a_batch_is_there_is_summed(ahead: int) -> None:
    """Batches come in order, whatever is read ahead; a batch that is there costs no wait."""

    def slow() -> Iterator[int]:
        for number in range(6):
            time.sleep(0.2 if number == 3 else 0.0)
            yield number

    batches = PatientBatches(slow(), limit_s=60, advice=ADVICE, ahead=ahead)
    assert list(batches) == list(range(6)) and 0.1 < batches.waited_s < 30
    ready = PatientBatches(iter(range(4)), limit_s=60, advice=ADVICE, ahead=4)
    end = time.monotonic() + 60
    while ready._answers.qsize() < 4 and time.monotonic() < end:
        time.sleep(0.01)
    assert [next(ready) for _ in range(4)] == [0, 1, 2, 3] and ready.waited_s < 1


@pytest.mark.parametrize("request_", ["SIGTERM", *(pytest.param(r, marks=pytest.mark.full) for r in OTHER_REQUESTS)])
def test_a_run_whose_worker_hangs_saves_its_step_when_it_is_stopped(tmp_path: Path, request_: str) -> None:
    run, steps = tmp_path / "run", 400
    recipe = small_run.write_recipe(tmp_path / "r.yaml", small_run.encode(tmp_path / "data"), steps=steps, every=steps)
    words = ["train", str(recipe), "--run", str(run), "data.num_workers=1", "checkpoint.background=false"]
    words += ["train.max_duration_s=8"] if request_ == "time limit" else []
    command = [sys.executable, "-m", "sfd_scale", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        metrics = run / "metrics.jsonl"
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < 3:
            assert process.poll() is None
            time.sleep(0.01)
        (worker,) = psutil.Process(process.pid).children()
        worker.send_signal(signal.SIGSTOP)
        if request_ != "time limit":
            time.sleep(1.0)
            process.send_signal(getattr(signal, request_))
        _, said = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == 75, said
    logged = len(small_run.lines(metrics))
    assert 3 <= logged < steps
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{logged:08d}"], said
    assert f"step {logged} is saved without more data" in said.replace("\n", " ")
