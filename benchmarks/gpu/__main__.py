"""The first minutes on a GPU: `python -m benchmarks.gpu` runs nine parts in order, the most telling figures first.

The parts are machine, attention, equality, training, profile, shards, sampling, memory and ranks; names choose some.
`--checks` runs only comparisons with a known answer. Each figure is printed and written as it is made. On a GPU each
part is a process of its own: an error that ends a CUDA context, or a kernel that hangs, ends one part.

Needs torch 2.11 or newer, numpy and this checkout. What needs more packages is left out with the reason. `--device cpu`
tries the code with size S.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.gpu import attention, equality, machine, memory, ranks, report, sampling, shards, step_profile, training
from benchmarks.gpu.report import Part
from benchmarks.gpu.workload import Workload, support_older_torch, workload
from sfd_scale.runtime import environment

GRACE_S = 60.0  # of a part that goes on after its time: a step that has started may end


@dataclass(frozen=True)
class Entry:
    """A part. seconds: its time on a GPU. check: only its comparisons, for `--checks`; None if it has none."""

    seconds: float
    run: Callable[[Part, Workload], None]
    check: Callable[[Part, Workload], None] | None = None


PARTS: dict[str, Entry] = {
    "machine": Entry(40, machine.run),
    "attention": Entry(60, attention.run, attention.run),
    "equality": Entry(100, equality.run, equality.run),
    "training": Entry(100, training.run),
    "profile": Entry(60, step_profile.run),
    "shards": Entry(70, shards.run),
    "sampling": Entry(100, sampling.run, sampling.check),
    "memory": Entry(50, memory.run),
    "ranks": Entry(100, ranks.run, ranks.run),
}
CPU_SHARE = 0.15  # of the time of each part, on a CPU


@dataclass(frozen=True)
class Options:
    device: torch.device
    names: tuple[str, ...]
    checks: bool
    quick: bool
    seconds: float | None
    out: Path | None
    table: bool = True

    @property
    def path(self) -> Path | None:
        return None if self.out is None else self.out / report.file_name(self.device)

    def budget(self, name: str) -> float:
        usual = PARTS[name].seconds * (1.0 if self.device.type == "cuda" else CPU_SHARE)
        return usual if self.seconds is None else self.seconds

    def command(self, *names: str) -> list[str]:
        words = ["--device", self.device.type, *names]
        words += ["--checks"] if self.checks else []
        words += ["--quick"] if self.quick else []
        words += [] if self.seconds is None else ["--seconds", f"{self.seconds:g}"]
        return words + ([] if self.out is None else ["--out", str(self.out)])


def parse(arguments: Sequence[str] | None) -> tuple[Options, bool]:
    """The options, and whether all parts run in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--checks", action="store_true", help="only comparisons with a known answer")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="on the CPU: one block, batch 1")
    parser.add_argument("--seconds", type=float, help="time of each part, in place of its own")
    parser.add_argument("--out", type=Path, help="folder of gpu-NAME.json (default on a GPU: benchmarks/results)")
    parser.add_argument("--together", action="store_true", help="all parts in this process, as always on the CPU")
    parser.add_argument("--no-table", action="store_true", help="print the results, without head and table")
    given = parser.parse_args(arguments)
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}; allowed: {', '.join(PARTS)}")
    device = torch.device(given.device)
    if device.type == "cpu":
        environment.set_variables({"CUDA_VISIBLE_DEVICES": ""})  # engines take the GPU where there is one
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; give --device cpu to try the code with size S")
    names = tuple(name for name in PARTS if name in (given.parts or PARTS))
    names = tuple(name for name in names if not given.checks or PARTS[name].check is not None)
    out = given.out or (harness.RESULTS if device.type == "cuda" else None)
    options = Options(device, names, given.checks, given.quick, given.seconds, out, not given.no_table)
    return options, given.together or device.type == "cpu"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if a comparison or a step failed."""
    options, together = parse(arguments)
    started = time.monotonic()
    heads = [describe(options.device), support_older_torch()]
    print(*filter(None, heads if options.table else []), sep="\n", flush=True)
    failed: list[str] = []
    results: dict[str, Any] = {}
    for name in options.names:
        if options.table:
            print(f"\n## {name}, at most {options.budget(name):.0f} s\n", flush=True)
        results[name] = _here(options, name) if together else _apart(options, name)
        failed += results[name]["failed"]
    if options.table:
        print(f"\n{table(results)}\n\n{describe(options.device)}; {time.monotonic() - started:.0f} s in total")
        print(f"failed: {'; '.join(failed)}" if failed else "all comparisons hold")
        if options.path is not None:
            report.write(options.path, _state(options), {})  # with the command of the whole run
            print(f"written to {options.path}")
    return 1 if failed else 0


def describe(device: torch.device) -> str:
    """The machine, for people."""
    found = harness.machine()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    return (
        f"{name}; {found['cpu']}, {found['cores']} cores ({found['instructions']}); torch {torch.__version__}, "
        f"{time.strftime('%Y-%m-%d', time.gmtime())}"
    )


def _state(options: Options) -> dict[str, Any]:
    return {
        "device": describe(options.device), "machine": harness.machine(), "versions": harness.versions(),
        "command": " ".join(["python -m benchmarks.gpu", *options.command(*options.names)]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()), "quick": options.quick,
    }  # fmt: skip


def _here(options: Options, name: str) -> dict[str, Any]:
    """Run a part in this process; returns its results."""
    entry, part = PARTS[name], Part(name, options.budget(name), options.path, _state(options))
    work = entry.check if options.checks and entry.check is not None else entry.run
    part.run(name, lambda: work(part, workload(options.device, options.quick)))
    part.finish()
    return part.as_dict()


def _apart(options: Options, name: str) -> dict[str, Any]:
    """Run a part in a process of its own; returns its results, also if the process died or had to be ended."""
    assert options.path is not None
    command = [sys.executable, "-m", "benchmarks.gpu", *options.command(name), "--together", "--no-table"]
    limit = options.budget(name) + GRACE_S
    try:
        code = subprocess.run(command, timeout=limit).returncode
        ended = f"the process ended with {code}"
    except subprocess.TimeoutExpired:
        ended = f"ended after {limit:.0f} s"
    found = report.read(options.path).get("parts", {}).get(name) or Part(name, 0.0).as_dict()
    if found["ended"] is None:
        found = {**found, "ended": ended, "failed": [*found["failed"], f"{name}: {ended}"]}
        report.write(options.path, _state(options), {name: found})
        print(f"{name}: {ended}", flush=True)
    return found


def table(results: Mapping[str, Any]) -> str:
    """Of all parts: the figures with a target first, then the others, then the number of comparisons."""
    figures = harness.figures_of({"figures": [f for part in results.values() for f in part["figures"]]})
    figures.sort(key=lambda figure: figure.target is None)
    checks = [check for part in results.values() for check in part["checks"]]
    left = sum(len(part["left_out"]) for part in results.values())
    counts = f"{len(checks)} comparisons, {sum(not check['ok'] for check in checks)} of them failed; {left} left out"
    return "\n\n".join([*([harness.markdown(figures)] if figures else []), counts])


if __name__ == "__main__":
    sys.exit(main())
