"""`--golden-table`: what the golden tests measured, as the tables of docs/parity.md."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """On the CPU, on a machine with GPUs too, but for the tests that are of a GPU: `-m gpu`."""
    # A shell ignores SIGINT in a background job, and nohup SIGHUP. Commands leave ignored signals alone, and tests send
    # them.
    for signum, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(signum) == signal.SIG_IGN:
            signal.signal(signum, handler)
    if config.getoption("markexpr") != "gpu":
        os.environ["DS_ACCELERATOR"], os.environ["CUDA_VISIBLE_DEVICES"] = "cpu", ""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """End the processes that a failed test has left. A training goes on for hours, and slows the tests after it."""
    failed, before = item.session.testsfailed, set(_children())
    result = yield
    if item.session.testsfailed > failed:
        for child in set(_children()) - before:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
    return result


def _children() -> list[int]:
    """The processes that this one has started, on Linux."""
    lists = Path("/proc/self/task").glob("*/children")
    return [int(number) for file in lists for number in file.read_text().split()]


@pytest.fixture
def keep_logging() -> Iterator[None]:
    """A command sets up logging in this process; the handlers of pytest come back after the test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-table", action="store_true", help="print the errors of the golden tests as Markdown")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("--golden-table"):
        for line in (*arrays_table(), "", *exact_table()):
            terminalreporter.write_line(line)


def group_of(key: str) -> str:
    """`sample/plain/euler_shift0.3` → `sample/plain/euler*`, `forward/variant/x` → `forward/variant/*`."""
    file, *parts = key.removeprefix("out_").split("/")
    if file == "sample" and len(parts) > 1 and parts[0] != "grid":
        return f"{file}/{parts[0]}/{parts[1].split('_')[0]}*"
    return "/".join([file, *parts[:-1], "*"]) if len(parts) > 1 else key.removeprefix("out_")


def arrays_table() -> Iterator[str]:
    """A row for each group of arrays that were compared, and the names of those that were not."""
    from tests.helpers.golden_arrays import COMPARED, manifest

    rows: dict[str, list[str]] = {}
    for key in COMPARED:
        rows.setdefault(group_of(key), []).append(key)
    yield "| Array | Compared | Largest error | Tolerance |"
    yield "|---|---:|---:|---:|"
    for group, keys in rows.items():
        error = max(COMPARED[key].error for key in keys)
        bounds = sorted({COMPARED[key].bound for key in keys})
        yield f"| `{group}` | {len(keys)} | {error:.1e} | {' to '.join(f'{bound:.1e}' for bound in bounds)} |"
    every = {f"{file.removesuffix('.npz')}/{name}" for file, names in manifest["arrays"].items() for name in names}
    left = sorted(key for key in every - COMPARED.keys() if key.startswith("out_") and not key.endswith("/nfe"))
    yield ""
    names = ", ".join(f"`{key.removeprefix('out_')}`" for key in left)
    yield f"Compared: {len(COMPARED)} arrays. Not: {names or 'none'}."


def exact_table() -> Iterator[str]:
    from tests.helpers.golden_arrays import EXACT

    yield "| dopri5 | Error control | Steps | Evaluations | Distance from the exact solution |"
    yield "|---|---|---|---:|---:|"
    for (what, control, jump), found in EXACT.items():
        calls = str(found.fewest) if found.fewest == found.most else f"{found.fewest} to {found.most}"
        yield f"| {what} | {control} | {'end at discontinuities' if jump else 'across'} | {calls} | {found.error:.1e} |"
