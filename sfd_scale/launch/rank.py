"""The entry point of every rank, under every launcher: `python rank.py MODULE ARGS...`.

It sets RANK and its siblings from the variables of MPI or Slurm, copies the output to `rank-N.log`, runs the module
like `python -m`, and writes the final status to `rank-N.json`. It is started as a file, not as a module, because
DeepSpeed's Slurm runner can start only files.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import faulthandler
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, MutableMapping
from pathlib import Path

if __name__ == "__main__":  # import from the checkout, not from the folder of this file
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from sfd_scale.launch import status
from sfd_scale.runtime import environment

# Our variable → the launcher's. DeepSpeed's MPI and Slurm runners set no RANK.
_SOURCES = {
    "RANK": ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"),
    "LOCAL_RANK": ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"),
    "WORLD_SIZE": ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS"),
    "LOCAL_WORLD_SIZE": ("LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE"),
}


def set_rank_variables(variables: MutableMapping[str, str]) -> None:
    """Set RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE from the variables of the launcher.

    Raises:
        ValueError: names the variable that the launcher did not set, or that is no number.
    """
    for name, sources in _SOURCES.items():
        source = next((s for s in (name, *sources) if environment.text(s, variables) is not None), None)
        if source is None:
            raise ValueError(f"{name}: not set, nor any of {', '.join(sources)}; start this with `sfd launch`")
        variables[name] = str(environment.whole_number(source, variables, least=int(name.endswith("SIZE"))))


def copy_output(path: Path) -> Callable[[], None]:
    """Copy standard output and error to a file, also those of native libraries; returns a function that ends the copy.

    A separate process (tee) copies. It outlives the rank and ignores stop signals, so that the last lines of a crash
    are kept. On a terminal the output is not redirected; there only Python's log is copied (`SFD_RANK_LOG`).
    """
    with path.open("a", encoding="utf-8") as stream:
        stamp = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        count = environment.whole_number("WORLD_SIZE")
        stream.write(f"--- {stamp} rank {environment.rank()} of {count} on {socket.gethostname()}\n")
    if sys.stderr.isatty():
        environment.set_variables({"SFD_RANK_LOG": str(path)})
        return lambda: None
    ends = []
    for fd in (1, 2):
        original = os.dup(fd)
        copier = subprocess.Popen(
            ["sh", "-c", 'trap "" TERM INT HUP USR1; exec tee -a "$0"', str(path)],
            stdin=subprocess.PIPE, stdout=original,
        )  # fmt: skip
        assert copier.stdin is not None
        os.dup2(copier.stdin.fileno(), fd)
        copier.stdin.close()
        ends.append((fd, original, copier))

    def finish() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, original, copier in ends:
            for copy in _copies_of(fd):  # DeepSpeed leaves one of standard error open, and the copier would not end
                os.close(copy)
            os.dup2(original, fd)
            # A child of the rank may still hold the pipe; then tee ends later, with that child.
            with contextlib.suppress(subprocess.TimeoutExpired):
                copier.wait(timeout=2)

    return finish


def _copies_of(fd: int) -> list[int]:
    """The other descriptors of this process that are the same pipe."""
    open_fds = Path("/proc/self/fd")
    if not open_fds.is_dir():
        return []
    found = []
    for entry in open_fds.iterdir():
        with contextlib.suppress(OSError):  # the descriptor of this listing
            if int(entry.name) != fd and os.readlink(entry) == os.readlink(open_fds / str(fd)):
                found.append(int(entry.name))
    return found


def leave_quickly(codes: list[int]) -> None:
    """End this process with the last code of `codes` after the other exit functions.

    The teardown of the modules of torch and DeepSpeed, which nothing needs, takes seconds.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if codes:
        os._exit(codes[-1])


def wait_for_peers(own: status.RankStatus, folder: Path, timeout_s: float) -> None:
    """Wait until no rank of this host is running.

    Launchers kill all ranks when one exits with a nonzero code, and another rank may still write its checkpoint.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        peers = [s for s in status.read(folder, own.launch) if s.node == own.node]
        if all(s.state != "running" for s in peers):
            return
        time.sleep(0.1)


def run_module(module: str, arguments: list[str]) -> tuple[int, BaseException | None]:
    """Run `python -m module arguments`; returns the exit code, and the exception that ended it."""
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        return code, end.__context__ if code else None
    except BaseException as error:  # noqa: BLE001  it is printed, recorded, and ends the rank
        traceback.print_exc()
        return 1, error
    return 0, None


def main() -> None:
    codes: list[int] = []
    atexit.register(leave_quickly, codes)  # what is registered first runs last
    # A rank inherits torchrun's handlers: torchrun ignores the stop signals, and forwards its own signal to the ranks.
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_DFL)
    signal.signal(status.TORCHRUN_SIGNAL, signal.SIG_IGN)
    variables = environment.variables()
    try:
        set_rank_variables(variables)
        environment.see_own_device()
    except ValueError as refused:
        sys.stderr.write(f"error: {refused}\n")
        sys.exit(status.USER_ERROR_EXIT_CODE)
    folder = Path(variables[status.LOG_FOLDER])
    folder.mkdir(parents=True, exist_ok=True)
    own = status.started(variables[status.LAUNCH_ID], socket.gethostname())
    own.write(folder)
    finish = copy_output(folder / f"rank-{own.rank}.log")
    faulthandler.enable()
    code, error = run_module(sys.argv[1], sys.argv[2:])
    if code == 0:
        own.ending("done").write(folder)
    elif code == status.REQUEUE_EXIT_CODE:
        own.ending("stopped").write(folder)
        wait_for_peers(own, folder, environment.whole_number(status.SHUTDOWN_TIMEOUT) or 0)
    else:
        own.ending("failed", error or RuntimeError(f"exit code {code}")).write(folder)
    finish()
    if code not in (0, status.REQUEUE_EXIT_CODE):
        os._exit(code)  # a normal exit would wait for collectives of ranks that have ended
    codes.append(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
