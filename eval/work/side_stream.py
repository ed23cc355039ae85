"""Work in another thread that overlaps with sampling. On a GPU it has a stream of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """`mark` records the work that was submitted so far. `after(mark)`, in another thread, runs other work after it.

    On the CPU both do nothing: the thread is enough.
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
        """Run the body on the side stream. At its end the results are ready and the inputs may be overwritten.

        Copy results to the host inside the body: afterwards, a copy would wait for the other thread's work.
        """
        if self.stream is None or event is None:
            yield
            return
        torch.cuda.set_device(self.stream.device)  # a new thread starts with device 0
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(event)
            yield
            self.stream.synchronize()
