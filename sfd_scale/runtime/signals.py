"""Stop requests: SIGTERM, SIGUSR1, SIGINT (Ctrl-C), SIGHUP or a time limit. All ranks stop after the same step.

Launchers signal the ranks one after another (deepspeed) or several times (pdsh). So the handler only sets a flag. The
trainer reduces the flag over ranks once per step, and all ranks save the same step.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Self

from sfd_scale.runtime.environment import launched

# Exit code of a rank, and of its launcher, after a stop request (EX_TEMPFAIL of sysexits.h). Schedulers requeue on it.
REQUEUE_EXIT_CODE = 75

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """A context manager that records stop requests. A second signal, more than a second later, exits at once.

    Args:
        max_duration_s: seconds until the run stops by itself; None for no limit.

    Attributes:
        saved: set it to true when the last checkpoint is complete and the process will exit with the requeue code. From
            then on a signal exits with that code at once, also after the block. If it is false at the end of the block,
            the previous signal handlers are restored.
    """

    def __init__(self, max_duration_s: float | None = None) -> None:
        self._deadline = None if max_duration_s is None else time.monotonic() + max_duration_s
        self._signalled_at: float | None = None
        self.saved = False

    def __enter__(self) -> Self:
        self._previous = {signum: signal.signal(signum, self._handle) for signum in STOP_SIGNALS if _is_taken(signum)}
        return self

    def __exit__(self, *error: object) -> None:
        if not self.saved:
            for signum, handler in self._previous.items():
                signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.saved:
            # From a launcher that saw another rank exit, or from an impatient user.
            os._exit(REQUEUE_EXIT_CODE)
        now = time.monotonic()
        if self._signalled_at is not None and now - self._signalled_at > 1.0:
            os._exit(128 + signum)
        if signum == signal.SIGINT and self._signalled_at is None and not launched():
            os.write(2, b"\nCtrl-C: the run saves after this step and stops; a second Ctrl-C ends it at once\n")
        self._signalled_at = self._signalled_at or now

    def requested(self) -> bool:
        """Whether this rank received a stop request. All ranks must agree before they stop."""
        late = self._deadline is not None and time.monotonic() > self._deadline
        return late or self._signalled_at is not None


def _is_taken(signum: signal.Signals) -> bool:
    """Whether a signal requests a stop. nohup ignores SIGHUP, and a shell SIGINT for its background jobs: so it stays.

    A launcher may ignore the others for itself alone, and its ranks have inherited that.
    """
    ignored = signal.getsignal(signum) == signal.SIG_IGN
    return not ignored or (launched() and signum != signal.SIGHUP)


def interruptible(message: str) -> None:
    """Let Ctrl-C print a message and end this process with code 130 of the shells; a second one ends it at once.

    Call it in the main thread. The ranks of a launcher are left to the launcher.
    """
    owner = os.getpid()

    def handle(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if os.getpid() == owner:  # a worker process has inherited this handler
            os.write(2, f"\n{message}\n".encode())
        raise SystemExit(128 + signum)

    if not launched() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, handle)
