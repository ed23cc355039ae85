"""What every benchmark shares: contenders run in turn on the same work, and what comes out of it is written down.

A figure is a ratio, peer over ours, from repeats that alternate: other load on the machine then meets both sides alike.
Needs torch alone, so that a bare GPU machine can run it.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "numpy", "deepspeed", "mosaicml-streaming", "scipy", "torch-fidelity")


@dataclass(frozen=True)
class Options:
    """What every benchmark is told.

    repeats: timed runs of each contender; None: the benchmark's own choice.
    quick: small models and few repeats, to see that a benchmark works; its figures mean nothing.
    official: a checkout of the official code, run as one more peer where a benchmark can.
    out: the folder of NAME.json; None: the figures are printed only.
    """

    repeats: int | None = None
    threads: int = 1
    quick: bool = False
    official: Path | None = None
    out: Path | None = None


@dataclass(frozen=True)
class Figure:
    """One line of a table: `ours` and `peer` in `unit`, and how many times better ours is.

    ratio is the median over the repeats, low and high its quartiles. `target`: the ratio that ours has to reach.
    """

    what: str
    against: str
    unit: str
    ours: float
    peer: float
    ratio: float
    low: float
    high: float
    target: float | None = None

    @property
    def met(self) -> bool | None:
        return None if self.target is None else self.ratio >= self.target


Benchmark = Callable[[Options], list[Figure]]


def race(
    contenders: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    warmup: int = 1,
    synchronize: Callable[[], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every call, `repeats` a contender, after `warmup` calls of each that are not timed.

    The contenders take turns, in reverse order every other round: what drifts with time favours none.
    """
    wait = synchronize or (lambda: None)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for number in range(warmup + repeats):
        for name in order if number % 2 == 0 else reversed(order):
            wait()
            started = time.perf_counter()
            contenders[name]()
            wait()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def compare(
    what: str,
    seconds: Mapping[str, Sequence[float]],
    *,
    ours: str = "ours",
    peer: str = "peer",
    against: str,
    work: float | None,
    unit: str,
    target: float | None = None,
) -> Figure:
    """The figure of two contenders of one race: median rates, `work` units a call, and the ratios round by round.

    Without `work` the two values are the median seconds themselves.
    """
    ratios = [theirs / own for own, theirs in zip(seconds[ours], seconds[peer], strict=True)]
    low, high = _quartiles(ratios)
    medians = [statistics.median(seconds[name]) for name in (ours, peer)]
    own, theirs = medians if work is None else [work / median for median in medians]
    return Figure(what, against, unit, own, theirs, statistics.median(ratios), low, high, target)


def measured(
    what: str,
    *,
    ours: float,
    peer: float,
    against: str,
    unit: str,
    better: Literal["lower", "higher"] = "lower",
    target: float | None = None,
) -> Figure:
    """A figure of two values that are no times of a race, such as bytes; the peer's may be a limit."""
    ratio = peer / ours if better == "lower" else ours / peer
    return Figure(what, against, unit, ours, peer, ratio, ratio, ratio, target)


def peak_memory(target: Callable[..., object], *args: Any) -> int:
    """Bytes: the largest resident set of a new process that runs `target`, a function of a module, once.

    Raises:
        RuntimeError: if the process fails.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report_memory, args=(sender, target, args))
    process.start()
    sender.close()
    try:
        peak: int = receiver.recv()
    except EOFError as error:
        raise RuntimeError(f"{target.__name__}{args} failed in its own process") from error
    finally:
        process.join()
    return peak


def _report_memory(sender: Any, target: Callable[..., object], args: tuple[Any, ...]) -> None:
    target(*args)
    # Not getrusage: its largest set begins with that of the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    sender.send(int(line.split()[1]) * 1024)


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


# ---------------------------------------------------------------------------------------- what comes out of it


def machine() -> dict[str, Any]:
    """The machine in general terms, without its name, and how loaded it was at this moment."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": os.getloadavg()[0],
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write(name: str, command: str, figures: Sequence[Figure], state: Mapping[str, Any], out: Path) -> Path:
    """Write OUT/NAME.json: the figures and what they were measured with."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    rows = [{**dataclasses.asdict(figure), "met": figure.met} for figure in figures]
    # What did not run has no number, for which JSON has no word but null.
    lines = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in rows]
    content = {"benchmark": name, "command": command, "date": time.strftime("%Y-%m-%d", time.gmtime()), **state}
    path.write_text(json.dumps({**content, "figures": lines}, indent=1) + "\n", encoding="utf-8")
    return path


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def sections(path: Path) -> list[dict[str, Any]]:
    """What `write` wrote for each benchmark, out of a file of several; empty where there is none yet."""
    return json.loads(path.read_text(encoding="utf-8"))["benchmarks"] if path.is_file() else []


def merge(path: Path, new: Sequence[Mapping[str, Any]], order: Sequence[str]) -> None:
    """Put the results of benchmarks into a file of several, in the place of their older ones."""
    found = {section["benchmark"]: section for section in [*sections(path), *new]}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"benchmarks": [found[name] for name in order if name in found]}, indent=1)
    path.write_text(f"{text}\n", encoding="utf-8")


def figures_of(section: Mapping[str, Any]) -> list[Figure]:
    """The figures of what `write` wrote."""
    figures = []
    for line in section["figures"]:
        values: dict[str, Any] = {
            k: math.nan if v is None and k != "target" else v for k, v in line.items() if k != "met"
        }
        figures.append(Figure(**values))
    return figures


HEADINGS = ("what", "against", "unit", "ours", "peer", "ratio", "quartiles", "target", "")


def row(figure: Figure) -> tuple[str, ...]:
    """The cells of a figure under HEADINGS."""
    target = "" if figure.target is None else f"{figure.target:g}"
    met = {None: "", True: "met", False: "not met"}[figure.met]
    ratio, spread = f"{figure.ratio:.2f}", f"{figure.low:.2f} to {figure.high:.2f}"
    return (
        figure.what, figure.against, figure.unit, f"{figure.ours:.4g}", f"{figure.peer:.4g}", ratio, spread, target,
        met,
    )  # fmt: skip


def markdown(figures: Sequence[Figure]) -> str:
    """A Markdown table, its columns aligned to be read as plain text too."""
    rows = [HEADINGS, *map(row, figures)]
    widths = [max(len(cells[column]) for cells in rows) for column in range(len(HEADINGS))]
    lines = [[cell.ljust(width) for cell, width in zip(cells, widths, strict=True)] for cells in rows]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


# ------------------------------------------------------------------------------------------------- command line


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark takes."""
    out = argparse.ArgumentParser(description=description)
    out.add_argument("--repeats", type=int, help="timed runs of each contender")
    cores = len(os.sched_getaffinity(0))
    out.add_argument("--threads", type=int, default=cores, help="threads of torch (default: one a core)")
    out.add_argument("--quick", action="store_true", help="tiny, to see that it works; the figures mean nothing")
    out.add_argument("--official", type=Path, help="a checkout of the official code, run as one more peer")
    out.add_argument("--out", type=Path, help="folder for NAME.json; without, the figures are printed only")
    return out


def options(arguments: argparse.Namespace) -> Options:
    """Raises ValueError for a checkout that is not there."""
    if arguments.official is not None and not arguments.official.is_dir():
        raise ValueError(f"--official {arguments.official}: no such folder")
    torch.set_num_threads(arguments.threads)
    fields = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Options)}
    return Options(**fields)


def main(name: str, run: Benchmark) -> None:
    """`python -m benchmarks.NAME`: run, print the tables, write NAME.json where asked to."""
    try:
        _main(name, run, options(parser(run.__doc__ or name).parse_args()))
    except ValueError as error:
        sys.exit(f"error: {error}")


def _main(name: str, run: Benchmark, chosen: Options) -> None:
    state = {"machine": machine(), "versions": versions(), "threads": chosen.threads, "quick": chosen.quick}
    started = time.monotonic()
    figures = run(chosen)
    state["seconds"] = round(time.monotonic() - started, 1)
    print(markdown(figures))
    if chosen.out is not None:
        print(f"written to {write(name, f'python -m benchmarks.{name}', figures, state, chosen.out)}")
