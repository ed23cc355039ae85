"""One command in several processes of this machine. They stop together, and fail together."""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from types import FrameType

from sfd_scale.runtime import environment
from sfd_scale.runtime.signals import REQUEUE_EXIT_CODE

logger = logging.getLogger(__name__)
KILL_AFTER_S = 120.0  # after SIGTERM; a training may still save
STOP_LIMIT = "SHUTDOWN_TIMEOUT"  # seconds after a stop request, as for `sfd launch`


def run_in_parallel(command: Sequence[str], jobs: int) -> int:
    """Run the same command in `jobs` processes, which share the cores.

    SIGTERM and SIGUSR1 are passed on to all processes, which then end by themselves. They are killed after
    SHUTDOWN_TIMEOUT, 300 s by default. If a process fails, the others are terminated; they lose the work since their
    last checkpoint.

    Returns:
        0; or REQUEUE_EXIT_CODE after a signal; or the exit code of the first process that failed.
    """
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    workers = [subprocess.Popen(command, env={**threads, **environment.snapshot()}) for _ in range(jobs)]
    stopping, patience = False, float(environment.whole_number(STOP_LIMIT, least=1) or 300)
    deadline = math.inf

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal stopping, deadline
        stopping, deadline = True, min(deadline, time.monotonic() + patience)
        for worker in workers:
            worker.send_signal(signum)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        while None in [worker.poll() for worker in workers] and (stopping or not _failed(workers)):
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)
    finally:
        failed = _failed(workers)
        for worker in workers:
            if worker.poll() is None and not stopping:
                worker.terminate()
        for worker in workers:
            _wait(worker, max(0.0, deadline - time.monotonic()) if stopping else KILL_AFTER_S)
        for number, handler in before.items():
            signal.signal(number, handler)
    if not stopping:
        return failed
    # Only a training catches the signal, to save a checkpoint. Elsewhere the signal ends the process: no error.
    errors = [w.returncode for w in workers if 0 < w.returncode < 128 and w.returncode != REQUEUE_EXIT_CODE]
    return next(iter(errors), REQUEUE_EXIT_CODE if any(worker.returncode for worker in workers) else 0)


def _wait(worker: subprocess.Popen[bytes], limit_s: float) -> None:
    """Wait for a process, and kill it after the limit."""
    try:
        worker.wait(limit_s)
    except subprocess.TimeoutExpired:
        logger.warning("process %d goes on after the signal; it is killed", worker.pid)
        worker.kill()
        worker.wait()


def _failed(workers: Sequence[subprocess.Popen[bytes]]) -> int:
    """The exit code of a process that failed, as a shell reports it (128 + signal); 0 if none has."""
    codes = [worker.returncode for worker in workers if worker.returncode]
    return next((128 - code if code < 0 else code for code in codes), 0)
