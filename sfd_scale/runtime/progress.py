"""Progress bars on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sfd_scale.runtime import distributed
from sfd_scale.runtime.logging import console

logger = logging.getLogger(__name__)

MB = 1_000_000
LOG_EVERY_S = 15.0


class ProgressBar:
    """Progress of one task, counted in `unit`; made by `progress`."""

    def __init__(self, total: int, description: str, unit: str, bar: Progress | None, quiet: bool = False) -> None:
        self.quiet = quiet
        self.total, self.description, self.unit, self.bar = total, description, unit, bar
        self.done, self.resumed, self.started, self.logged = 0, 0, time.monotonic(), time.monotonic()
        self.bytes = 0
        self.task = None if bar is None else bar.add_task(description, total=total, fields="")

    def skip(self, n: int) -> None:
        """Count work done by an earlier start. It does not count in the rate."""
        self.done, self.resumed = self.done + n, self.resumed + n
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=self.done)

    def advance_bytes(self, n: int) -> None:
        """Advance by `n` bytes, if the unit is MB."""
        before, self.bytes = self.bytes // MB, self.bytes + n
        if self.bytes // MB > before:
            self.advance(self.bytes // MB - before)

    def advance(self, n: int = 1, values: Mapping[str, float | str] | None = None) -> None:
        """Advance by `n` units, and show `values` beside the rate."""
        self.done += n
        rate = (self.done - self.resumed) / max(time.monotonic() - self.started, 1e-9)
        shown = {**(values or {}), f"{self.unit}/s": f"{rate:.1f}"}
        text = "  ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items()
        )
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=self.done, fields=text)
        elif (
            not self.quiet
            and distributed.is_main()
            and (time.monotonic() - self.logged > LOG_EVERY_S or self.done >= self.total)
        ):
            self.logged = time.monotonic()
            left = (self.total - self.done) / max(rate, 1e-9)
            logger.info("%s %d/%d %s  %s  %.0f s left", self.description, self.done, self.total, self.unit, text, left)


@contextmanager
def progress(total: int, description: str, unit: str) -> Iterator[ProgressBar]:
    """A progress bar on rank 0; without a terminal, a log line every 15 seconds."""
    if not (distributed.is_main() and console.is_terminal):
        yield ProgressBar(total, description, unit, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[fields]}"),
    )
    with Progress(*columns, console=console) as bar:
        yield ProgressBar(total, description, unit, bar)
