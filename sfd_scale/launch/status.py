"""What became of each rank: one small file a rank in the log folder, and the summary of a launch that is made of them.

A rank writes `rank-N.json` when it starts and when it ends. One that is killed leaves it at `running`, which is how a
host that went away shows.
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
from pathlib import Path
from typing import Literal

from sfd_scale.runtime.files import write_json
from sfd_scale.runtime.signals import REQUEUE_EXIT_CODE as REQUEUE_EXIT_CODE

# The environment of everything that one launch starts.
LAUNCH_ID = "SFD_LAUNCH_ID"
LOG_FOLDER = "SFD_LOG_FOLDER"
SHUTDOWN_TIMEOUT = "SFD_SHUTDOWN_TIMEOUT"

# What torchrun listens to, in place of the stop signals: a scheduler may send those to every process, and torchrun
# serves the store that the ranks need to save.
TORCHRUN_SIGNAL = signal.SIGQUIT
USER_ERROR_EXIT_CODE = 2
# What a rank meets when another one is gone: the consequence of a failure and hardly ever the first one.
_ECHOES = (
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
    """A rank's life; times are seconds since 1970 by the clock of its host."""

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
        """This status at the end of the rank."""
        text = None if error is None else f"{type(error).__name__}: {error}"
        trace = None if error is None else "".join(traceback.format_exception(error))
        return dataclasses.replace(self, state=state, ended=time.time(), error=text, traceback=trace)

    @property
    def is_echo(self) -> bool:
        return self.error is not None and any(word in self.error.lower() for word in _ECHOES)


def read(folder: Path, launch: str) -> list[RankStatus]:
    """The ranks of one launch that have started, by rank."""
    found = []
    for path in folder.glob("rank-*.json"):
        try:
            status = RankStatus(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue  # being replaced at this moment, on a file system without atomic renames
        if status.launch == launch:
            found.append(status)
    return sorted(found, key=lambda status: status.rank)


def first_failure(ranks: Sequence[RankStatus]) -> RankStatus | None:
    """The failure that the others follow from: the first one, and before those that only lost a connection."""
    failed = [status for status in ranks if status.state == "failed"]
    return min(failed, key=lambda status: (status.is_echo, status.ended or 0.0), default=None)


def vanished(ranks: Sequence[RankStatus]) -> list[RankStatus]:
    """Once a launch is over: ranks that ended without a word."""
    return [status for status in ranks if status.state == "running"]


def exit_code(ranks: Sequence[RankStatus], launcher: int, stop_requested: bool) -> int:
    """The exit code of a launch, whatever the launcher made of those of its ranks.

    75 where ranks stopped on request (also before their first step, when only a signal ended them), so that a
    scheduler starts the same command again.
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
    """One paragraph on a launch that failed: which rank came first, where, with what, and where its log is."""
    lines = []
    gone = vanished(ranks)
    first = first_failure(ranks)
    if gone and (first is None or first.is_echo):
        hosts = sorted({status.host for status in gone})
        listed = ", ".join(str(status.rank) for status in gone)
        lines.append(
            f"rank {listed} on {', '.join(hosts)} ended without a word: killed (out of memory?), or the host is gone; "
            f"last lines in {folder / f'rank-{gone[0].rank}.log'}"
        )
    if first is not None:
        lines.append(
            f"rank {first.rank} on {first.host} failed {'after that' if lines else 'first'}: {first.error} "
            f"({folder / f'rank-{first.rank}.log'})"
        )
    others = [status.rank for status in ranks if status.state == "failed" and status is not first]
    if others:
        lines.append(f"after it failed rank {', '.join(map(str, others))}")
    missing = sorted(set(range(world_size)) - {status.rank for status in ranks})
    if missing:
        lines.append(f"never started: rank {', '.join(map(str, missing))} of {world_size}")
    return "\n".join(lines)


def now(launch: str, environment: os._Environ[str] | dict[str, str], host: str) -> RankStatus:
    """The status of a rank that starts in this process."""
    rank, local = int(environment["RANK"]), int(environment["LOCAL_RANK"])
    per_node = int(environment["LOCAL_WORLD_SIZE"])
    node = (rank - local) // max(per_node, 1)
    return RankStatus(
        launch, rank, int(environment["WORLD_SIZE"]), host, node, os.getpid(), "running", started=time.time()
    )
