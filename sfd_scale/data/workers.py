"""Worker processes of a dataloader: checked before they start, and heard when they fail.

A worker hands over a batch through shared memory and a socket in TMPDIR. If one of them fails, PyTorch's worker prints
a traceback and the main process waits for ever. So the limits of the machine are checked first, and what workers print
is recorded for the error message.
"""

from __future__ import annotations

import functools
import io
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Listener
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Generic, TextIO, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from sfd_scale.runtime import distributed

K = TypeVar("K")
B = TypeVar("B")
PREFETCH = 2  # batches that each worker reads ahead; DataLoader's default
SHARED_MEMORY = Path("/dev/shm")
_FILES_PER_WORKER, _FREE_FILES = 8, 64  # pipes and sockets of one worker; for everything else
_WORKERS: list[BaseProcess] = []


# ------------------------------------------------------------------------------------- limits of the machine


def socket_problem() -> str | None:
    """Why workers cannot use a socket in TMPDIR; None if they can. It makes such a socket as multiprocessing does."""
    try:
        Listener(family="AF_UNIX").close()
    except OSError as error:
        folder = tempfile.gettempdir()
        return (
            f"TMPDIR: {folder} ({len(folder)} characters) has no place for a socket, which worker processes need "
            f"({error}); set TMPDIR to a short path on a local disk, such as /tmp"
        )
    return None


def memory_problem(needed: int) -> str | None:
    """Why `needed` bytes of batches do not fit in shared memory; None if they do."""
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except FileNotFoundError:
        return f"{SHARED_MEMORY}: missing, and worker processes hand over batches in it; mount a tmpfs there"
    if free >= needed:
        return None
    return (
        f"{SHARED_MEMORY}: {free / 2**20:.0f} MiB free, but the batches that worker processes read ahead need "
        f"{needed / 2**20:.0f} MiB; start the container with --ipc=host or a larger --shm-size (on Kubernetes, an "
        "emptyDir of medium Memory)"
    )


def files_problem(needed: int) -> str | None:
    """Why a process cannot open `needed` more files; None if it can."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    if limit == resource.RLIM_INFINITY or used + needed <= limit:
        return None
    return (
        f"open files: {used} of at most {limit} are open, and worker processes need about {needed} more; raise the "
        f"limit by `ulimit -n {max(most, 65536)}`"
    )


def require_workers(setting: str, num_workers: int, batch_bytes: int, batch_tensors: int) -> None:
    """Check that this machine can run the workers of all its ranks.

    Args:
        setting: the key of `num_workers`, for the error message.
        batch_bytes, batch_tensors: of one batch, which a worker hands over.

    Raises:
        ValueError: naming the limit, and what to change.
    """
    ahead = num_workers * PREFETCH
    files = num_workers * _FILES_PER_WORKER + ahead * batch_tensors + _FREE_FILES
    problems = [
        socket_problem(), memory_problem(distributed.local_world_size() * ahead * batch_bytes), files_problem(files)
    ]  # fmt: skip
    if found := [problem for problem in problems if problem]:
        raise ValueError(f"{setting}: {num_workers}, but {'; '.join(found)}; or lower {setting} (0: no workers)")


# ------------------------------------------------------------------------------------------------ the workers


class _Raised:
    """The error of a user's file in a worker, in place of a batch. DataLoader would add the worker's traceback."""

    def __init__(self, error: Exception) -> None:
        self.text = str(error)


class _Fetching(Dataset[Any], Generic[K, B]):
    """`fetch` as a dataset that reads whole batches."""

    def __init__(self, fetch: Callable[[list[K]], B], in_worker: bool) -> None:
        self.fetch, self.in_worker = fetch, in_worker

    def __getitem__(self, key: K) -> Any:
        return self.__getitems__([key])

    def __getitems__(self, keys: list[K]) -> Any:
        if not self.in_worker:
            return self.fetch(keys)
        try:
            return self.fetch(keys)
        except (ValueError, OSError) as error:
            return _Raised(error)


def _identity(batch: Any) -> Any:
    """collate_fn: the dataset returns whole batches."""
    return batch


class _Start:
    """worker_init_fn: what the worker prints as an error is recorded too."""

    def __init__(self, record: int | None, survive_stop: bool) -> None:
        self.record, self.survive_stop = record, survive_stop

    def __call__(self, worker: int) -> None:
        if self.survive_stop:
            _ignore_stop_signals()
        if self.record is not None:
            sys.stderr = _Recorded(sys.stderr, self.record)


class _Recorded(io.TextIOBase):
    """A stream that also writes to a descriptor."""

    def __init__(self, stream: TextIO, descriptor: int) -> None:
        self.stream, self.descriptor = stream, descriptor

    def write(self, text: str) -> int:
        os.write(self.descriptor, text.encode(errors="replace"))
        return self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()

    def fileno(self) -> int:
        return self.stream.fileno()


def _ignore_stop_signals() -> None:
    """Make a worker process ignore the stop signals of a scheduler, which reach every process of a job.

    The rank still needs its workers to finish the step before it saves. SIGTERM from the rank itself ends the worker.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS has no sigwaitinfo, and no such schedulers either
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


@functools.cache
def _record() -> int | None:
    """A file in memory for the errors that workers print. Forked workers inherit its descriptor."""
    if multiprocessing.get_start_method() != "fork" or not hasattr(os, "memfd_create"):
        return None
    return os.memfd_create("sfd-workers")


def worker_batches(
    fetch: Callable[[list[K]], B], keys: Iterable[list[K]], *, num_workers: int, setting: str, batch_bytes: int = 0,
    batch_tensors: int = 1, survive_stop: bool = False,
) -> Iterator[B]:  # fmt: skip
    """The batch of each list of keys, in order, read by worker processes; by this process if `num_workers` is 0.

    Args:
        fetch: reads one batch; picklable.
        setting: the key of `num_workers`, for error messages.
        batch_bytes, batch_tensors: of one batch.
        survive_stop: the workers ignore stop signals, because the main process finishes a step before it saves.

    Raises:
        ValueError: at once, if this machine cannot run the workers; later, the error of a file in a worker.
    """
    if num_workers:
        require_workers(setting, num_workers, batch_bytes, batch_tensors)
    loader: DataLoader[Any] = DataLoader(
        _Fetching(fetch, in_worker=num_workers > 0),
        batch_sampler=keys,  # type: ignore[arg-type] # any iterable of lists
        num_workers=num_workers,
        collate_fn=_identity,
        worker_init_fn=_Start(_record(), survive_stop),
        prefetch_factor=PREFETCH if num_workers else None,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # without it DataLoader draws a seed from the global generator
    )
    before = set(multiprocessing.active_children())
    try:
        batches = iter(loader)
    except OSError as error:
        raise ValueError(
            f"{setting}: {num_workers} worker processes cannot be started ({error}); lower it, or raise the limits of "
            "processes and memory"
        ) from error
    _WORKERS[:] = [*_WORKERS, *set(multiprocessing.active_children()) - before]
    return _unpacked(batches)


def _unpacked(batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        if isinstance(batch, _Raised):
            raise ValueError(batch.text)
        yield batch


# ------------------------------------------------------------------------------------------------- failures


def printed() -> str:
    """The last line of the errors that the workers of this process printed, as an addition to a message, or nothing."""
    record = _record()
    if record is None or not (size := os.fstat(record).st_size):
        return ""
    lines = os.pread(record, 4000, max(0, size - 4000)).decode(errors="replace").strip().splitlines()
    return f"; a worker printed: {lines[-1].strip()[:500]}" if lines else ""


@contextmanager
def explained_deaths() -> Iterator[None]:
    """Turn the error of a worker's death into one that says what it died of.

    PyTorch raises RuntimeError, also from its handler of SIGCHLD, so anywhere in the block. The socket of a dead worker
    raises ConnectionError or EOFError.

    Raises:
        ChildProcessError: if a worker died.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        _unset_handler()
        if not (dead := _dead_worker()):
            raise
        causes = {
            -signal.SIGKILL: "was killed; probably the machine has no memory left: lower the number of workers",
            -signal.SIGBUS: f"was ended by SIGBUS: no room is left in {SHARED_MEMORY}; give the container a larger "
            "--shm-size, or lower the number of workers",
        }
        cause = causes.get(dead.exitcode or 0, f"ended with code {dead.exitcode}")
        kill_workers()
        raise ChildProcessError(f"worker process {dead.pid} of the dataloader {cause}{printed()}") from error


def _dead_worker(within_s: float = 1.0) -> BaseProcess | None:
    """A worker that has failed. Its socket closes a moment before it is gone."""
    deadline = time.monotonic() + within_s
    while _WORKERS:
        for worker in _WORKERS:
            if worker.exitcode not in (None, 0, -signal.SIGTERM):
                return worker
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return None


def kill_workers() -> int:
    """Kill all workers, which may be stopped or stuck, so that this process can exit; returns their number."""
    _unset_handler()
    alive = [worker for worker in _WORKERS if worker.is_alive()]
    for worker in alive:
        worker.kill()
    return len(alive)


def _unset_handler() -> None:
    """PyTorch's handler of SIGCHLD raises its error at every signal, also while the first one is handled."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
