"""One command in several processes of this machine, as one: stopped together, and failed together."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from types import FrameType

from sfd_scale.runtime.signals import REQUEUE_EXIT_CODE


def run_beside(command: Sequence[str], jobs: int) -> int:
    """The same command in `jobs` processes, a core each; returns the exit code of the first that fails, or 0.

    A request to stop is passed on, and then each may end in its own time: the exit code is that of a stop. A process
    that fails ends the others, which lose at most what is not checkpointed.
    """
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs)), **os.environ}
    workers = [subprocess.Popen(command, env=environment) for _ in range(jobs)]
    stopping = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True
        for worker in workers:
            worker.send_signal(signum)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        while None in [worker.poll() for worker in workers] and (stopping or not _failed(workers)):
            time.sleep(0.2)
    finally:
        failed = _failed(workers)
        for worker in workers:
            if worker.poll() is None and not stopping:
                worker.terminate()
        for worker in workers:
            worker.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    if not stopping:
        return failed
    # A worker that is stopped outside of a training, which alone has something to save, ends by the signal.
    errors = [w.returncode for w in workers if 0 < w.returncode < 128 and w.returncode != REQUEUE_EXIT_CODE]
    return next(iter(errors), REQUEUE_EXIT_CODE if any(worker.returncode for worker in workers) else 0)


def _failed(workers: Sequence[subprocess.Popen[bytes]]) -> int:
    """The exit code, as a shell tells it, of a process that has ended with another than 0; else 0."""
    codes = [worker.returncode for worker in workers if worker.returncode]
    return next((128 - code if code < 0 else code for code in codes), 0)
