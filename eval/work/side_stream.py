"""Work of another thread that overlaps with sampling: on a GPU on a stream of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """`mark` what has been asked of the device so far; `after` it, in another thread, other work runs beside.

    On the CPU the thread is all it takes.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def mark(self) -> torch.cuda.Event | None:
        if self.stream is None:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.stream.device))
        return event

    @contextmanager
    def after(self, event: torch.cuda.Event | None) -> Iterator[None]:
        """Results are ready, and memory of the inputs may be used again, when the context ends. Copies to the host
        belong inside: after it they would wait for what the other thread has asked of the device meanwhile."""
        if self.stream is None or event is None:
            yield
            return
        torch.cuda.set_device(self.stream.device)  # a thread starts with the first one, and would go back to it
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(event)
            yield
            self.stream.synchronize()
