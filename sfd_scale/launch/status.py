"""The status of each rank, kept in `rank-N.json` in the log folder, and the summary of a launch.

A rank writes its file when it starts and when it ends. The file of a killed rank still says `running`; this reveals a
dead host.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from sfd_scale.runtime import environment
from sfd_scale.runtime.files import write_json
from sfd_scale.runtime.signals import REQUEUE_EXIT_CODE as REQUEUE_EXIT_CODE

# Environment variables of a launcher and its ranks.
LAUNCH_ID = "SFD_LAUNCH_ID"
LOG_FOLDER = "SFD_LOG_FOLDER"
SHUTDOWN_TIMEOUT = "SFD_SHUTDOWN_TIMEOUT"
_LISTED = 16  # ranks that a message names

# The only signal that torchrun handles. A scheduler may send stop signals to every process, but torchrun must not end
# before its ranks: it serves the store that they need to save.
TORCHRUN_SIGNAL = signal.SIGQUIT
USER_ERROR_EXIT_CODE = 2
# Errors of a rank that lost its connection to a failed rank: consequences, hardly ever the first failure.
_CONSEQUENCES = (
    "connection closed by peer",
    "connection reset",
    "broken pipe",
    "socket timeout",
    "timed out",
    "nccl",
    "gloo",
)


@dataclass(frozen=True)
class RankStatus:
    """The status of a rank. Times are seconds since 1970, by the clock of its host."""

    launch: str
    rank: int
    world_size: int
    host: str
    node: int
    pid: int
    state: Literal["running", "done", "stopped", "failed"]
    started: float
    ended: float | None = None
    error: str | None = None  # type and message of the exception
    traceback: str | None = None

    def write(self, folder: Path) -> None:
        write_json(folder / f"rank-{self.rank}.json", dataclasses.asdict(self))

    def ending(self, state: Literal["done", "stopped", "failed"], error: BaseException | None = None) -> RankStatus:
        """The final status of this rank."""
        text = None if error is None else f"{type(error).__name__}: {error}"
        trace = None if error is None else "".join(traceback.format_exception(error))
        return dataclasses.replace(self, state=state, ended=time.time(), error=text, traceback=trace)

    @property
    def is_consequence(self) -> bool:
        return self.error is not None and any(word in self.error.lower() for word in _CONSEQUENCES)


def read(folder: Path, launch: str) -> list[RankStatus]:
    """The status of every rank of a launch that has started, sorted by rank."""
    found = []
    for path in folder.glob("rank-*.json"):
        try:
            status = RankStatus(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue  # half-written, on a file system without atomic renames
        if status.launch == launch:
            found.append(status)
    return sorted(found, key=lambda status: status.rank)


def first_failure(ranks: Sequence[RankStatus]) -> RankStatus | None:
    """The first failed rank; ranks that only lost a connection come last."""
    failed = [status for status in ranks if status.state == "failed"]
    return min(failed, key=lambda status: (status.is_consequence, status.ended or 0.0), default=None)


def killed(ranks: Sequence[RankStatus]) -> list[RankStatus]:
    """After the end of a launch: ranks that wrote no final status."""
    return [status for status in ranks if status.state == "running"]


def exit_code(ranks: Sequence[RankStatus], launcher: int, stop_requested: bool) -> int:
    """The exit code of a launch, from the status of its ranks and the exit code of its launcher.

    75 if the ranks stopped on request, so that a scheduler starts the same command again. This includes ranks that a
    stop signal ended before their first step.
    """
    states = {status.state for status in ranks}
    if "failed" in states or (not ranks and not stop_requested):
        return launcher if launcher > 0 and launcher != REQUEUE_EXIT_CODE else 1 if "failed" in states else launcher
    if "stopped" in states or (stop_requested and launcher != 0):
        return REQUEUE_EXIT_CODE
    if "running" in states:
        return launcher if launcher > 0 else 1
    return 0 if states == {"done"} else launcher


def summary(ranks: Sequence[RankStatus], world_size: int, folder: Path) -> str:
    """A summary of a failed launch: the first failed rank, its host, error and log file."""
    lines = []
    gone = killed(ranks)
    first = first_failure(ranks)
    if gone and (first is None or first.is_consequence):
        hosts = sorted({status.host for status in gone})
        listed = ", ".join(str(status.rank) for status in gone)
        lines.append(
            f"rank {listed} on {', '.join(hosts)} was killed (out of memory?), or the host is down; "
            f"log: {folder / f'rank-{gone[0].rank}.log'}"
        )
    if first is not None:
        lines.append(
            f"rank {first.rank} on {first.host} failed {'after that' if lines else 'first'}: {first.error}; "
            f"log: {folder / f'rank-{first.rank}.log'}"
        )
    others = [status.rank for status in ranks if status.state == "failed" and status is not first]
    if others:
        lines.append(f"later failures: rank {', '.join(map(str, others))}")
    started = {status.rank for status in ranks}
    first_missing = list(islice((rank for rank in range(world_size) if rank not in started), _LISTED))
    if first_missing:
        more = world_size - len(started) - len(first_missing)
        listed = ", ".join([*map(str, first_missing), *([f"{more} more"] if more > 0 else [])])
        lines.append(f"never started: rank {listed} of {world_size}")
    return "\n".join(lines)


def started(launch: str, host: str) -> RankStatus:
    """The status of this process, a rank that starts now."""
    rank, local = environment.rank(), environment.whole_number("LOCAL_RANK") or 0
    count = environment.whole_number("WORLD_SIZE", least=1) or 1
    node = (rank - local) // (environment.whole_number("LOCAL_WORLD_SIZE", least=1) or 1)
    return RankStatus(launch, rank, count, host, node, os.getpid(), "running", started=time.time())
