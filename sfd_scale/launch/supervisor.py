"""Runs a launcher, passes stop requests on to the ranks, and says at the end what happened.

DeepSpeed's runner dies of a signal and leaves its ranks behind; its per-host launcher signals them one after another;
torchrun knows no SIGUSR1 and turns every exit code into 1. So the ranks get the signal from here, all at once, and the
exit code comes from what they wrote.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from sfd_scale.launch import agent, status
from sfd_scale.launch.check import RecipeCheck
from sfd_scale.launch.hosts import Host, ask_each

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
# Seconds that the other ranks get to end by themselves once one has failed.
GRACE_S = 30.0
# By how many seconds the clocks of hosts may differ.
CLOCKS_S = 60.0
# Seconds that the launcher gets to notice that its ranks were killed.
KILL_WAIT_S = 15.0


@dataclass(frozen=True)
class Launch:
    """One start of ranks.

    hosts: those that ssh reaches; empty where this process only starts ranks of its own host.
    end_signal: what ends the launcher itself. Where it is no stop signal, the launcher is told of a stop by it too, and
        hears no stop signal.
    """

    launch_id: str
    command: Sequence[str]
    environment: dict[str, str]
    log_folder: Path
    world_size: int
    shutdown_timeout_s: float
    hosts: Sequence[Host] = ()
    ssh: str = ""
    node: int | None = None
    end_signal: signal.Signals = signal.SIGTERM

    def signal_ranks(self, signum: int) -> int:
        """Signal all ranks on all hosts; returns how many there are (signal 0 only counts)."""
        if not self.hosts:
            return agent.send(self.launch_id, signum, self.node)
        arguments = [{"launch": self.launch_id, "signum": int(signum), "node": n} for n in range(len(self.hosts))]
        answers = ask_each(self.hosts, self.ssh, "signal", arguments)
        for answer in answers:
            if isinstance(answer, ValueError):
                logger.warning("%s", answer)
        return sum(answer for answer in answers if isinstance(answer, int))


class Supervisor:
    """See the module; `run` returns the exit code.

    Args:
        check: of the recipe; once it refuses, everything is ended, and all that is said is the sentence that says why.
    """

    def __init__(self, launch: Launch, check: RecipeCheck | None = None) -> None:
        self.launch, self.check, self._began = launch, check, time.time()
        self.requests: list[tuple[int, float]] = []

    def run(self) -> int:
        # What was ignored already stays so: nohup's SIGHUP.
        previous = {s: signal.signal(s, self._remember) for s in STOP_SIGNALS if signal.getsignal(s) != signal.SIG_IGN}
        launch = self.launch
        # A session of its own, so that Ctrl-C in a terminal comes here alone.
        deaf = _ignore_stop_signals if self._apart else None
        process = subprocess.Popen(launch.command, env=launch.environment, start_new_session=True, preexec_fn=deaf)
        try:
            code = self._watch(process)
            if self.check is not None and code != 0 and not self.stopping and self.check.wait():
                sys.stderr.write(self.check.sentence())
                return status.USER_ERROR_EXIT_CODE
            self._sweep()
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)
        return self._report(code)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self.requests.append((signum, time.monotonic()))

    @property
    def _apart(self) -> bool:
        """Whether what ends the launcher is no stop signal."""
        return self.launch.end_signal not in STOP_SIGNALS

    @property
    def stopping(self) -> bool:
        return bool(self.requests)

    def _watch(self, process: subprocess.Popen[bytes]) -> int:
        """Wait for the launcher: pass a stop request on, and end what hangs."""
        asked, failed_at, killed_at = False, math.inf, math.inf
        while (code := process.poll()) is None:
            time.sleep(0.2)
            if self.check is not None and self.check.refused:
                self._end_at_once(process)
            now = time.monotonic()
            if self.stopping and not asked:
                asked = True
                name = signal.Signals(self.requests[0][0]).name
                logger.info("%s: the ranks save and stop; once more ends them at once", name)
                self._ask_to_stop(process)
            # An elastic launcher starts ranks again, which then have not failed any more.
            failed = any(rank.state == "failed" for rank in self._ranks())
            failed_at = min(failed_at, now) if failed else math.inf
            hung = now - failed_at > GRACE_S
            if killed_at == math.inf and (hung or self._impatient()):
                killed_at = now
                logger.warning("%s: ending all ranks", "a rank has failed" if hung else "told to stop at once")
                self.launch.signal_ranks(signal.SIGKILL)
                process.send_signal(self.launch.end_signal)
            if now - killed_at > KILL_WAIT_S:
                process.kill()
        return code

    def _end_at_once(self, process: subprocess.Popen[bytes]) -> None:
        """No rank has begun its work, and none shall: first what would start more of them."""
        os.killpg(process.pid, signal.SIGKILL)
        self.launch.signal_ranks(signal.SIGKILL)
        process.wait()

    def _impatient(self) -> bool:
        """Whether it was asked again more than a second later, or the time for a save is over."""
        if not self.stopping:
            return False
        first, last = self.requests[0][1], self.requests[-1][1]
        return last - first > 1.0 or time.monotonic() - first > self.launch.shutdown_timeout_s

    def _ask_to_stop(self, process: subprocess.Popen[bytes]) -> None:
        if self._apart:
            # It must know that it is a stop: with elastic restarts it would start the stopped ranks again.
            process.send_signal(self.launch.end_signal)
        self.launch.signal_ranks(signal.SIGUSR1)

    def _ranks(self) -> list[status.RankStatus]:
        """Those of this start: an earlier one may have had the same name, which a user gives, and more ranks."""
        found = status.read(self.launch.log_folder, self.launch.launch_id)
        found = [rank for rank in found if rank.started > self._began - CLOCKS_S]
        world = max(found, key=lambda rank: rank.started).world_size if found else 0
        return [rank for rank in found if rank.rank < world]

    def _sweep(self) -> None:
        """The launcher is gone: nothing of it may stay behind. Ranks that are saving get their time."""
        started = time.monotonic()
        patience = self.launch.shutdown_timeout_s if self.stopping else GRACE_S
        states = {rank.state for rank in self._ranks()}
        if states == {"done"}:
            return
        killed_at = math.inf
        while self.launch.signal_ranks(0) and time.monotonic() - killed_at < KILL_WAIT_S:
            late = time.monotonic() - started > patience or (self.stopping and self._impatient())
            if late and killed_at == math.inf:
                self.launch.signal_ranks(signal.SIGKILL)
                killed_at = time.monotonic()
            time.sleep(0.1 if late else 0.5)  # a killed process is there for as long as its memory is given back

    def _report(self, code: int) -> int:
        ranks = self._ranks()
        out = status.exit_code(ranks, code, self.stopping)
        if out == status.REQUEUE_EXIT_CODE:
            logger.info("stopped on request; the same command goes on from the last checkpoint (exit code %d)", out)
        elif out != 0:
            # Of other nodes, which were started there, nothing is known here.
            world = self.launch.world_size if self.launch.node is None else 0
            text = status.summary(ranks, world, self.launch.log_folder)
            for line in text.splitlines() or [f"the launcher ended with code {code} before any rank had started"]:
                logger.error("%s", line)
        return out


def _ignore_stop_signals() -> None:
    """In torchrun, before it begins; the ranks take the signals again (`rank.main`)."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    signal.signal(status.TORCHRUN_SIGNAL, signal.SIG_DFL)  # bash ignores it in what it starts in the background


def new_launch_id() -> str:
    """A name for one launch: time and process."""
    return f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
