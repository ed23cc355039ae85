"""Commands on several ranks, to be broken: forked from this process, or under a real launcher.

A forked rank has everything imported already, so that a hundred kills take minutes. It runs the same command line
with the same environment, in a process of its own; like a launcher, the job ends the other ranks when one has failed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch

RANKS = 2
ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        return int(reserved.getsockname()[1])


class Job:
    """A command under way."""

    log: Path

    def ranks(self) -> list[psutil.Process]:
        """The ranks that are alive, in order."""
        raise AssertionError("of the subclasses")

    def running(self) -> bool:
        raise AssertionError("of the subclasses")

    def end(self) -> int:
        """The exit code, once all is over."""
        raise AssertionError("of the subclasses")

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait(self, timeout: float = 900.0) -> int:
        deadline = time.monotonic() + timeout
        while self.running() and time.monotonic() < deadline:
            time.sleep(0.01)
        if self.running():
            self.kill_all()
            raise TimeoutError(f"still running after {timeout:.0f} s: {self.output()[-2000:]}")
        return self.end()

    def kill_all(self) -> None:
        for process in self.ranks():
            send(process, signal.SIGKILL)


def send(process: psutil.Process, signum: int) -> None:
    try:
        process.send_signal(signum)
    except psutil.NoSuchProcess:
        return


class Forked(Job):
    """`work` on forked ranks; exit codes are those of the command line. `hook` is called first in each rank."""

    def __init__(
        self, work: Callable[[], object], log: Path, ranks: int = RANKS, environment: dict[str, str] | None = None,
        hook: Callable[[int], None] = lambda rank: None,
    ) -> None:  # fmt: skip
        self.log, port = log, str(free_port())
        self.codes: dict[int, int] = {}
        self.grace: float | None = None
        sys.stdout.flush()

        def hooked(rank: int) -> None:
            hook(rank)
            work()

        self.pids = [self._fork(partial(hooked, rank), rank, ranks, port, environment or {}) for rank in range(ranks)]

    def _fork(self, work: Callable[[], object], rank: int, ranks: int, port: str, environment: dict[str, str]) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            os.setsid()
            with self.log.open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            if ranks > 1:
                os.environ |= {
                    "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank),
                    "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                }  # fmt: skip
            os.environ |= environment
            # After a fork PyTorch makes its pool of threads anew at the first product. Here, by one thread: gloo's two,
            # where they come first, may find it gone ("Invalid thread pool") and end the process.
            torch.set_num_threads(1)
            work()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:  # noqa: BLE001  the log has it
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _collect(self) -> None:
        for pid in self.pids:
            if pid in self.codes:
                continue
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
        failed = any(code not in (0, 75) for code in self.codes.values())
        if failed and self.grace is None:
            self.grace = time.monotonic() + 15.0  # the others have seen it, or hear of it now
        if self.grace is not None and time.monotonic() > self.grace:
            self.kill_all()

    def ranks(self) -> list[psutil.Process]:
        alive = [pid for pid in self.pids if pid not in self.codes and psutil.pid_exists(pid)]
        return [psutil.Process(pid) for pid in alive]

    def running(self) -> bool:
        self._collect()
        return len(self.codes) < len(self.pids)

    def end(self) -> int:
        return next((code for code in self.codes.values() if code), 0)


class Launched(Job):
    """A command of a real launcher in a process group of its own."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str] | None = None) -> None:
        self.log = log
        binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        settings = {
            "PATH": binaries, "DS_ACCELERATOR": "cpu", "RANKS": str(RANKS), "OMP_NUM_THREADS": "1",
            "MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT), "SHUTDOWN_TIMEOUT": "60",
        }  # fmt: skip
        with log.open("a") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **settings, **(environment or {})}, stdout=file, stderr=file,
                start_new_session=True,
            )  # fmt: skip
        self.launcher = psutil.Process(self.process.pid)
        self._seen: dict[int, psutil.Process] = {}

    def ranks(self) -> list[psutil.Process]:
        """Also those that a killed launcher has left behind."""
        if self.launcher.is_running():
            with contextlib.suppress(psutil.NoSuchProcess):
                self._seen |= {p.pid: p for p in self.launcher.children(recursive=True)}
        found = {}
        for process in self._seen.values():
            try:
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE and "RANK" in process.environ():
                    command = process.cmdline()
                    if "sfd_scale" in command or "eval" in command:
                        found[int(process.environ()["RANK"])] = process
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return [found[rank] for rank in sorted(found)]

    def running(self) -> bool:
        return self.process.poll() is None or bool(self.ranks())

    def end(self) -> int:
        return self.process.wait()

    def kill_all(self) -> None:
        for process in [self.launcher, *self.ranks()]:
            send(process, signal.SIGKILL)


@dataclass(frozen=True)
class Result:
    """Of one case: how often a fault was made, how often all was well afterwards, and what was not."""

    times: int
    survived: int
    problems: tuple[str, ...] = ()

    @classmethod
    def of(cls, *problems: str | None) -> Result:
        found = tuple(problem for problem in problems if problem)
        return cls(1, int(not found), found)
