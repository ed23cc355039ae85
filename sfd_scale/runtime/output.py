"""Standard output and error that never fail for their encoding, and not for a reader that is gone.

A result may be complete when a command cannot print it: for an `–` under PYTHONIOENCODING=ascii, for a path whose bytes
are no text, after `| head -1` has closed the pipe, or after the terminal is gone. None of these may end the command.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import sys
from typing import Any

from rich.console import Console

# How a character is written that an encoding lacks; any other character as \u and its number.
_READABLE = {
    "–": "-", "—": "-", "→": "->", "×": "x", "±": "+-", "…": "...", "≤": "<=", "≥": ">=", "·": "*", "∞": "inf",
}  # fmt: skip
READABLE = "sfd_readable"  # the name of the error handler


def _readable(error: UnicodeError) -> tuple[str | bytes, int]:
    if isinstance(error, UnicodeEncodeError):
        lost = error.object[error.start : error.end]
        text = "".join(_READABLE.get(c, c.encode("ascii", "backslashreplace").decode("ascii")) for c in lost)
        return text, error.end
    raise error


codecs.register_error(READABLE, _readable)


class _Descriptor(io.FileIO):
    """A file descriptor to write to. When its reader or its terminal is gone, /dev/null takes their place."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._of_terminal = self.isatty()

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while len(left):
                left = left[super().write(left) or 0 :]
        except OSError as error:
            if not (isinstance(error, BrokenPipeError) or (self._of_terminal and error.errno == errno.EIO)):
                raise
            with contextlib.closing(io.FileIO(os.devnull, "w")) as nowhere:
                os.dup2(nowhere.fileno(), self.fileno())
        return size


class _Buffer(io.BufferedWriter):
    """The buffer of such a descriptor."""


def plain_console(width: int | None = None) -> Console:
    """A console for standard output. It prints texts as they are: a path may hold `[red]` or `:100:`."""
    return Console(markup=False, emoji=False, highlight=False, width=width)


def make_safe() -> None:
    """Let sys.stdout and sys.stderr never fail. A stream that a caller has put in their place, as tests do, stays."""
    # A closed descriptor would be given to the next file that is opened, and prints of libraries would go into it.
    while (free := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(free)
    if sys.stdout is sys.__stdout__:
        sys.stdout = sys.__stdout__ = _safe(sys.stdout, 1)  # type: ignore[misc]
    if sys.stderr is sys.__stderr__:
        sys.stderr = sys.__stderr__ = _safe(sys.stderr, 2)  # type: ignore[misc]


def _safe(stream: Any, descriptor: int) -> io.TextIOWrapper:
    """A stream to the descriptor with the encoding and the buffering of `stream`; None stands for a closed one."""
    raw = _Descriptor(descriptor)
    if not isinstance(stream, io.TextIOWrapper):
        return io.TextIOWrapper(_Buffer(raw), encoding="utf-8", errors=READABLE)
    if isinstance(stream.buffer, _Descriptor | _Buffer):
        return stream
    stream.flush()
    unbuffered = isinstance(stream.buffer, io.RawIOBase)  # python -u
    return io.TextIOWrapper(
        raw if unbuffered else _Buffer(raw),  # type: ignore[arg-type]
        encoding=stream.encoding,
        errors=READABLE,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
