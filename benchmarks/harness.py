"""Code of all benchmarks: run contenders on the same work in turns, and write the figures.

A figure is the ratio peer / ours, from repeats that alternate, so that other load on the machine affects both equally.
The harness needs only torch, so that it runs on a bare GPU machine.
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
EXTENSIONS = 2  # repetitions of rounds whose ratios disagree
AGREEMENT = 0.02  # a difference of two ratios that says nothing
_PACKAGES = ("torch", "numpy", "deepspeed", "mosaicml-streaming", "scipy", "torch-fidelity")


@dataclass(frozen=True)
class Options:
    """Options of every benchmark.

    repeats: timed runs per contender; None for the benchmark's default.
    quick: small models and few repeats, to test the benchmark; its figures mean nothing.
    official: a checkout of the official code, as one more peer of the benchmarks that support it.
    out: the folder of NAME.json; None to print the figures only.
    """

    repeats: int | None = None
    threads: int = 1
    quick: bool = False
    official: Path | None = None
    out: Path | None = None


@dataclass(frozen=True)
class Figure:
    """One row of a table: `ours` and `peer` in `unit`, and the factor by which ours is better.

    ratio is the median over the repeats, low and high are its quartiles. target is the ratio to reach.
    medians: the ratio of the two medians, if it is further from `ratio` than the quartiles are apart; else None. Then
    the load of the machine changed within the rounds, and neither ratio is certain.
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
    medians: float | None = None

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
    ours: str = "ours",
) -> dict[str, list[float]]:
    """Seconds of `repeats` calls per contender, after `warmup` calls that are not timed.

    The contenders take turns, in reverse order every other round, so that a drift over time favours none. While the
    paired ratio of `ours` and a peer disagrees with the ratio of their medians, the rounds are repeated, up to
    EXTENSIONS times.
    """
    wait = synchronize or (lambda: None)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for extension in range(1 + EXTENSIONS):
        _rounds(contenders, seconds, repeats, warmup if extension == 0 else 0, wait)
        peers = [name for name in contenders if name != ours and ours in contenders]
        if all(_disagreeing_medians(seconds[ours], seconds[peer]) is None for peer in peers):
            break
    return seconds


def _rounds(
    contenders: Mapping[str, Callable[[], object]], seconds: Mapping[str, list[float]], repeats: int, warmup: int,
    wait: Callable[[], None],
) -> None:  # fmt: skip
    order = list(contenders)
    for number in range(warmup + repeats):
        for name in order if number % 2 == 0 else reversed(order):
            wait()
            started = time.perf_counter()
            contenders[name]()
            wait()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - started)


def _disagreeing_medians(own: Sequence[float], theirs: Sequence[float]) -> float | None:
    """The ratio of the medians, if it is further from the median of the ratios than their quartiles are apart.

    Differences below AGREEMENT count as agreement.
    """
    if len(own) < 3:
        return None
    ratios = [peer / mine for mine, peer in zip(own, theirs, strict=True)]
    low, high = _quartiles(ratios)
    medians = statistics.median(theirs) / statistics.median(own)
    apart = abs(medians - statistics.median(ratios))
    return medians if apart > max(high - low, AGREEMENT * medians) else None


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
    """The figure of two contenders of a race: their median rates, and the median of the ratios of all rounds.

    Args:
        work: units of work per call; None to give seconds in place of rates.
    """
    ratios = [theirs / own for own, theirs in zip(seconds[ours], seconds[peer], strict=True)]
    low, high = _quartiles(ratios)
    medians = [statistics.median(seconds[name]) for name in (ours, peer)]
    own, theirs = medians if work is None else [work / median for median in medians]
    disagreeing = _disagreeing_medians(seconds[ours], seconds[peer])
    return Figure(what, against, unit, own, theirs, statistics.median(ratios), low, high, target, disagreeing)


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
    """The figure of two values that do not come from a race, such as bytes. The peer's value may be a limit."""
    ratio = peer / ours if better == "lower" else ours / peer
    return Figure(what, against, unit, ours, peer, ratio, ratio, ratio, target)


def peak_memory(target: Callable[..., object], *args: Any) -> int:
    """Peak resident memory in bytes of a new process that calls `target`, a function of a module, once.

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
    # Not getrusage: its maximum includes the memory of the parent process.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    sender.send(int(line.split()[1]) * 1024)


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


# ------------------------------------------------------------------------------------------------- results


def machine() -> dict[str, Any]:
    """A description of the machine without its name, and its load average at this moment."""
    info = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in info.read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
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
    """Write OUT/NAME.json: the figures, the command, and `state`: machine, versions and options."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    rows = [{**dataclasses.asdict(figure), "met": figure.met} for figure in figures]
    # A contender that failed has NaN, which JSON does not have.
    lines = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in rows]
    content = {"benchmark": name, "command": command, "date": time.strftime("%Y-%m-%d", time.gmtime()), **state}
    path.write_text(json.dumps({**content, "figures": lines}, indent=1) + "\n", encoding="utf-8")
    return path


def read(path: Path) -> dict[str, Any]:
    """The content of a file of `write`."""
    return json.loads(path.read_text(encoding="utf-8"))


def sections(path: Path) -> list[dict[str, Any]]:
    """The results of all benchmarks in a file of `merge`; empty if there is no file."""
    return json.loads(path.read_text(encoding="utf-8"))["benchmarks"] if path.is_file() else []


def merge(path: Path, new: Sequence[Mapping[str, Any]], order: Sequence[str]) -> None:
    """Write results to a file of several benchmarks, in place of older results of the same benchmarks."""
    found = {section["benchmark"]: section for section in [*sections(path), *new]}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"benchmarks": [found[name] for name in order if name in found]}, indent=1)
    path.write_text(f"{text}\n", encoding="utf-8")


def figures_of(section: Mapping[str, Any]) -> list[Figure]:
    """The figures of a result of `read` or `sections`."""
    figures = []
    for line in section["figures"]:
        fields: dict[str, Any] = {key: value for key, value in line.items() if key != "met"}
        missing = {k: math.nan for k, value in fields.items() if value is None and k not in ("target", "medians")}
        figures.append(Figure(**{**fields, **missing}))
    return figures


HEADINGS = ("what", "against", "unit", "ours", "peer", "ratio", "quartiles", "target", "")


def row(figure: Figure) -> tuple[str, ...]:
    """The cells of a figure under HEADINGS."""
    target = "" if figure.target is None else f"{figure.target:g}"
    notes = [] if figure.met is None else ["met" if figure.met else "not met"]
    if figure.medians is not None:
        notes.append(f"unsettled: the medians' ratio is {figure.medians:.2f}")
    if math.isnan(figure.ratio):
        ratio, quartiles = "", ""
    else:
        ratio, quartiles = f"{figure.ratio:.2f}", f"{figure.low:.2f} to {figure.high:.2f}"
    ours, peer = ("" if math.isnan(value) else f"{value:.4g}" for value in (figure.ours, figure.peer))
    return (
        figure.what, figure.against, figure.unit, ours, peer, ratio, quartiles, target, "; ".join(notes)
    )  # fmt: skip


def markdown(figures: Sequence[Figure]) -> str:
    """A Markdown table with aligned columns, which can be read as plain text too."""
    rows = [HEADINGS, *map(row, figures)]
    widths = [max(len(cells[column]) for cells in rows) for column in range(len(HEADINGS))]
    lines = [[cell.ljust(width) for cell, width in zip(cells, widths, strict=True)] for cells in rows]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


# ------------------------------------------------------------------------------------------------- command line


def parser(description: str) -> argparse.ArgumentParser:
    """The command line of `Options`."""
    out = argparse.ArgumentParser(description=description)
    out.add_argument("--repeats", type=int, help="timed runs per contender")
    cores = len(os.sched_getaffinity(0))
    out.add_argument("--threads", type=int, default=cores, help="threads of torch (default: one per core)")
    out.add_argument(
        "--quick", action="store_true", help="tiny models, to test the benchmark; the figures mean nothing"
    )
    out.add_argument("--official", type=Path, help="a checkout of the official code, run as one more peer")
    out.add_argument("--out", type=Path, help="folder for NAME.json (default: only print the figures)")
    return out


def options(arguments: argparse.Namespace) -> Options:
    """Raises ValueError if the checkout of --official does not exist."""
    if arguments.official is not None and not arguments.official.is_dir():
        raise ValueError(f"--official {arguments.official}: no such folder")
    torch.set_num_threads(arguments.threads)
    fields = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Options)}
    return Options(**fields)


def main(name: str, run: Benchmark) -> None:
    """`python -m benchmarks.NAME`: run, print the tables, write NAME.json to --out."""
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
