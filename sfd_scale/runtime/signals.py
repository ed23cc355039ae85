"""Stop requests: SIGTERM, SIGUSR1 and a time limit, agreed on by all ranks at a step boundary.

Launchers signal ranks one after another (deepspeed) or several times (pdsh), so a handler only sets a flag; the trainer
reduces the flag over ranks once a step and every rank then saves the same step.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Self

# EX_TEMPFAIL of sysexits.h, "try again later": of a rank after a stop request, and of its launcher; schedulers requeue
# on it.
REQUEUE_EXIT_CODE = 75


class StopRequest:
    """Within it a stop request is remembered; a second signal more than a second later exits at once.

    Args:
        max_duration_s: seconds after which the run stops by itself, or None.

    Attributes:
        saved: whether all that counts is on disk and the process is about to leave with the requeue code. Then it does
            so at the next signal, even after the block, which else puts the former handlers back.
    """

    def __init__(self, max_duration_s: float | None = None) -> None:
        self._deadline = None if max_duration_s is None else time.monotonic() + max_duration_s
        self._signalled_at: float | None = None
        self.saved = False

    def __enter__(self) -> Self:
        self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, *error: object) -> None:
        if not self.saved:
            for signum, handler in self._previous.items():
                signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.saved:
            # A launcher that saw another rank leave, or an impatient user.
            os._exit(REQUEUE_EXIT_CODE)
        now = time.monotonic()
        if self._signalled_at is not None and now - self._signalled_at > 1.0:
            os._exit(128 + signum)
        self._signalled_at = self._signalled_at or now

    def requested(self) -> bool:
        """Whether this rank was asked to stop. The ranks must agree before they act on it."""
        late = self._deadline is not None and time.monotonic() > self._deadline
        return late or self._signalled_at is not None
