"""Runs a launcher, forwards stop signals to the ranks, and reports how the launch ended.

The launchers' own signal handling does not suffice. DeepSpeed's runner dies of a signal and leaves its ranks running,
and its per-host launcher signals them one after another. torchrun ignores SIGUSR1 and turns every exit code into 1. So
the supervisor signals all ranks at once, and takes the exit code from the status files of the ranks.
"""

from __future__ import annotations

import contextlib
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
from sfd_scale.runtime.signals import STOP_SIGNALS

logger = logging.getLogger(__name__)

GRACE_S = 30.0  # after a rank has failed, before the others are killed
MAX_CLOCK_SKEW_S = 60.0  # between the clocks of two hosts
KILL_WAIT_S = 15.0  # after the ranks were killed, before the launcher is killed too


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The command and environment of a launcher, and how its ranks are signalled.

    environment: of the launcher; holds the launch id, the log folder and the shutdown timeout (`status`).
    hosts: hosts of the ranks, signalled over ssh. If empty, the ranks run on this host or below srun.
    srun: Slurm's srun starts the ranks; srun forwards signals to them.
    node: this node's number, if the same command starts on every node.
    end_signal: ends the launcher itself. If it is not one of STOP_SIGNALS, the launcher ignores STOP_SIGNALS, and gets
        this signal also at a stop request.
    """

    command: Sequence[str]
    environment: dict[str, str]
    world_size: int
    hosts: Sequence[Host] = ()
    ssh: str = ""
    srun: bool = False
    node: int | None = None
    end_signal: signal.Signals = signal.SIGTERM

    @property
    def launch_id(self) -> str:
        return self.environment[status.LAUNCH_ID]

    @property
    def log_folder(self) -> Path:
        return Path(self.environment[status.LOG_FOLDER])

    @property
    def shutdown_timeout_s(self) -> float:
        """The longest time for a save after a stop request."""
        return float(self.environment[status.SHUTDOWN_TIMEOUT])

    def signal_ranks(self, signum: int) -> int:
        """Signal all ranks on all hosts; returns the number of signalled processes (signal 0 only counts)."""
        if self.srun:
            return agent.signal_srun(self.launch_id, signum)
        if not self.hosts:
            return agent.signal_ranks(self.launch_id, signum, self.node)
        arguments = [{"launch": self.launch_id, "signum": int(signum), "node": n} for n in range(len(self.hosts))]
        answers = ask_each(self.hosts, self.ssh, "signal", arguments)
        for answer in answers:
            if isinstance(answer, ValueError):
                logger.warning("%s", answer)
        return sum(answer for answer in answers if isinstance(answer, int))


class Supervisor:
    """Runs one launch to its end.

    Args:
        check: a running check of the recipe. If it finds an error, the launch ends, and only that error is printed.
    """

    def __init__(self, launch: Launch, check: RecipeCheck | None = None) -> None:
        self.launch, self.check, self._began = launch, check, time.time()
        self.requests: list[tuple[int, float]] = []

    def run(self) -> int:
        """Run the launcher; returns the exit code of the launch."""
        # Signals that are ignored stay ignored: nohup ignores SIGHUP.
        previous = {s: signal.signal(s, self._remember) for s in STOP_SIGNALS if signal.getsignal(s) != signal.SIG_IGN}
        launch = self.launch
        # In a new session, so that Ctrl-C in a terminal reaches the supervisor only.
        process = subprocess.Popen(
            launch.command, env=launch.environment, start_new_session=True,
            preexec_fn=_ignore_stop_signals if self._ignores_stop_signals else None,
        )  # fmt: skip
        try:
            code = self._watch(process)
            if self.check is not None and code != 0 and not self.stopping and self.check.wait():
                sys.stderr.write(self.check.error())
                return status.USER_ERROR_EXIT_CODE
            self._end_left_ranks()
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)
        return self._report(code)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self.requests.append((signum, time.monotonic()))

    @property
    def _ignores_stop_signals(self) -> bool:
        """Whether the launcher ignores stop signals, and ends by a signal of its own."""
        return self.launch.end_signal not in STOP_SIGNALS

    @property
    def stopping(self) -> bool:
        return bool(self.requests)

    def _watch(self, process: subprocess.Popen[bytes]) -> int:
        """Wait for the launcher. Forward a stop request to the ranks, and kill a launch that hangs."""
        forwarded, failed_at, killed_at = False, math.inf, math.inf
        while (code := process.poll()) is None:
            time.sleep(0.2)
            if self.check is not None and self.check.failed:
                self._kill(process)
            if self._launcher_is_idle():
                process.kill()  # DeepSpeed's launcher looks at its ranks once a second, and takes a second to end
                process.wait()
                return 0  # the code of the launch follows from the ranks
            now = time.monotonic()
            if self.stopping and not forwarded:
                forwarded = True
                name = signal.Signals(self.requests[0][0]).name
                logger.info("%s: the ranks save and stop; send it again to kill them", name)
                self._forward_stop(process)
            # An elastic launcher restarts failed ranks; their status then is running again.
            failed = any(rank.state == "failed" for rank in self._ranks())
            failed_at = min(failed_at, now) if failed else math.inf
            hung = now - failed_at > GRACE_S
            if killed_at == math.inf and (hung or self._impatient()):
                killed_at = now
                reason = "a rank has failed" if hung else "second stop signal, or no save in time"
                logger.warning("%s: killing all ranks", reason)
                self.launch.signal_ranks(signal.SIGKILL)
                process.send_signal(self.launch.end_signal)
            if now - killed_at > KILL_WAIT_S:
                process.kill()
        return code

    def _launcher_is_idle(self) -> bool:
        """Whether DeepSpeed's launcher of one host has no ranks left, and all of them have ended well."""
        launch = self.launch
        if launch.hosts or launch.srun or launch.node is not None or self._ignores_stop_signals:
            return False
        ranks = self._ranks()
        ended = len(ranks) == launch.world_size and all(rank.state in ("done", "stopped") for rank in ranks)
        return ended and not launch.signal_ranks(0)

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        """Kill the launcher, which might start more ranks, and then the ranks."""
        os.killpg(process.pid, signal.SIGKILL)
        self.launch.signal_ranks(signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(KILL_WAIT_S)

    def _impatient(self) -> bool:
        """Whether a second stop signal came more than a second later, or the shutdown timeout is over."""
        if not self.stopping:
            return False
        first, last = self.requests[0][1], self.requests[-1][1]
        return last - first > 1.0 or time.monotonic() - first > self.launch.shutdown_timeout_s

    def _forward_stop(self, process: subprocess.Popen[bytes]) -> None:
        if self._ignores_stop_signals:
            # Otherwise an elastic launcher would restart the stopped ranks.
            process.send_signal(self.launch.end_signal)
        self.launch.signal_ranks(signal.SIGUSR1)

    def _ranks(self) -> list[status.RankStatus]:
        """The ranks of this start. An earlier start may have had the same JOB_ID, and more ranks."""
        found = status.read(self.launch.log_folder, self.launch.launch_id)
        found = [rank for rank in found if rank.started > self._began - MAX_CLOCK_SKEW_S]
        world = max(found, key=lambda rank: rank.started).world_size if found else 0
        return [rank for rank in found if rank.rank < world]

    def _end_left_ranks(self) -> None:
        """Kill ranks that outlive their launcher, after the time for a save."""
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
            time.sleep(0.1 if late else 0.5)  # a killed process still exists while its memory is freed

    def _report(self, code: int) -> int:
        ranks = self._ranks()
        out = status.exit_code(ranks, code, self.stopping)
        if out == status.REQUEUE_EXIT_CODE:
            logger.info("stopped on request; the same command resumes from the last checkpoint (exit code %d)", out)
        elif out != 0:
            # With one command per node, this node does not know which ranks started elsewhere.
            world = self.launch.world_size if self.launch.node is None else 0
            text = status.summary(ranks, world, self.launch.log_folder)
            for line in text.splitlines() or [f"the launcher exited with code {code} before a rank started"]:
                logger.error("%s", line)
        return out


def _ignore_stop_signals() -> None:
    """Runs in torchrun's process before torchrun. The ranks restore the default handlers (`rank.main`)."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    signal.signal(status.TORCHRUN_SIGNAL, signal.SIG_DFL)  # bash ignores SIGQUIT in background jobs


def new_launch_id() -> str:
    """A new id of a launch: time and process id."""
    return f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
