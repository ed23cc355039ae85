"""What runs in every rank, under every launcher: `python rank.py MODULE ARGS...`.

It gives the rank its number where only the scheduler's variables say it, keeps what it prints in `rank-N.log`, runs
the module as `python -m` would, and writes how it ended to `rank-N.json`. A file, not a module, because DeepSpeed's
Slurm runner can start nothing else.
"""

from __future__ import annotations

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
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":  # this file's folder is no place to import from; the checkout is
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from sfd_scale.launch import status

# Launcher's variable → ours. DeepSpeed's MPI and Slurm runners set no RANK.
_ADOPTED = {
    "RANK": ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"),
    "LOCAL_RANK": ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"),
    "WORLD_SIZE": ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS"),
    "LOCAL_WORLD_SIZE": ("LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE"),
}


def adopt_rank(environment: os._Environ[str] | dict[str, str]) -> None:
    """Set RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE from what the launcher set.

    Raises:
        ValueError: naming what is missing.
    """
    for name, sources in _ADOPTED.items():
        if name not in environment:
            source = next((s for s in sources if s in environment), None)
            if source is None:
                raise ValueError(f"{name}: not set, nor any of {', '.join(sources)}; start this with `sfd launch`")
            environment[name] = environment[source]


def copy_output(path: Path) -> Callable[[], None]:
    """Copy standard output and error to a file, native libraries' included; returns what ends it.

    A process of its own does it, which outlives the rank and ignores what stops the rank: so the last lines of a crash
    are kept. A terminal stays a terminal; there only Python's log goes to the file (`SFD_RANK_LOG`).
    """
    with path.open("a", encoding="utf-8") as stream:
        stamp = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        stream.write(f"--- {stamp} rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} on {socket.gethostname()}\n")
    if sys.stderr.isatty():
        os.environ["SFD_RANK_LOG"] = str(path)
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
            os.dup2(original, fd)
            # Later where a child of the rank still holds the pipe: the copier ends with that child.
            with contextlib.suppress(subprocess.TimeoutExpired):
                copier.wait(timeout=2)

    return finish


def wait_for_peers(own: status.RankStatus, folder: Path, timeout_s: float) -> None:
    """Wait until no rank of this host is still at work.

    Launchers end the others as soon as one rank is gone with a code, and the first rank may still be writing.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        peers = [s for s in status.read(folder, own.launch) if s.node == own.node]
        if all(s.state != "running" for s in peers):
            return
        time.sleep(0.1)


def run_module(module: str, arguments: list[str]) -> tuple[int, BaseException | None]:
    """`python -m module arguments`; its exit code, and the exception that it ended with."""
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        return code, end.__context__ if code else None
    except BaseException as error:  # noqa: BLE001  it is recorded, printed, and ends the rank
        traceback.print_exc()
        return 1, error
    return 0, None


def main() -> None:
    # The launcher ignores what a scheduler sends to all; told to stop, it passes its own signal on to its ranks.
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_DFL)
    signal.signal(status.TORCHRUN_SIGNAL, signal.SIG_IGN)
    adopt_rank(os.environ)
    folder = Path(os.environ[status.LOG_FOLDER])
    folder.mkdir(parents=True, exist_ok=True)
    own = status.now(os.environ[status.LAUNCH_ID], os.environ, socket.gethostname())
    own.write(folder)
    finish = copy_output(folder / f"rank-{own.rank}.log")
    faulthandler.enable()
    code, error = run_module(sys.argv[1], sys.argv[2:])
    if code == 0:
        own.ending("done").write(folder)
    elif code == status.REQUEUE_EXIT_CODE:
        own.ending("stopped").write(folder)
        wait_for_peers(own, folder, float(os.environ[status.SHUTDOWN_TIMEOUT]))
    else:
        own.ending("failed", error or RuntimeError(f"exit code {code}")).write(folder)
    finish()
    if code not in (0, status.REQUEUE_EXIT_CODE):
        os._exit(code)  # an orderly end would wait for communication that the other ranks no longer take part in
    sys.exit(code)


if __name__ == "__main__":
    main()
