"""Python's garbage collection at chosen steps: the same ones on every rank, and without the objects of the start.

A full collection looks at every object of the process, about half a million after a start: 0.5 s on one core. Left to
itself it comes at another step on each rank, and all ranks wait for the one that collects.
"""

from __future__ import annotations

import gc
from types import TracebackType

FIRST, EVERY = 3, 1000  # steps of this process before the first collection; steps between the later ones


class ScheduledCollection:
    """Call `after_step` after every step. Outside of the context Python collects as usual."""

    def __init__(self) -> None:
        self.steps = 0

    def __enter__(self) -> ScheduledCollection:
        return self

    def after_step(self) -> None:
        self.steps += 1
        if self.steps == FIRST:
            # Compilation and the optimizer have made their objects by now; freezing them makes later collections short.
            gc.collect()
            gc.freeze()
            gc.disable()
        elif self.steps % EVERY == 0:
            gc.collect()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        gc.unfreeze()
        gc.enable()
