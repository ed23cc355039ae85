"""The host's time of a training step at depth 24, by engine, beside another checkout of this project.

    python -m benchmarks.host_time --beside PATH [NAME ...]
    python -m benchmarks.host_time --against NAME [NAME ...]    # beside another engine of this checkout

On a GPU the host launches kernels and runs the hooks of the engine; at small micro-batches it sets the pace. Here the
model is so narrow that a step on the CPU is little else. The figure is CPU time per step, of one thread. Both checkouts
take turns in processes of their own, so that both see the same load. Without --beside only this checkout is measured.
Names with "8 ranks" are rank 0 of a group that sends nothing: the hooks, copies and launches of several ranks.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import Figure
from sfd_scale.runtime import environment

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("host_time_worker.py")
NAMES = (
    "fsdp compiled", "fsdp compiled, 8 ranks", "zero1 compiled", "fsdp compiled, whole weights",
    "fsdp compiled, whole weights, 8 ranks", "fsdp compiled, units of 1 block, 8 ranks",
    "fsdp compiled, units of 4 blocks, 8 ranks", "fsdp compiled, flat parameters, 8 ranks",
    "fsdp compiled, flat parameters, units of 4 blocks, 8 ranks",
    "fsdp compiled, flat parameters, whole weights, 8 ranks", "zero1 compiled, flat parameters",
    "zero2 compiled, flat parameters", "fsdp eager", "zero2 compiled", "no engine, compiled",
)  # fmt: skip
STEPS = 10  # of a turn
COMMAND = "python -m benchmarks.host_time --beside PATH"


class Worker:
    """A process with one engine of one checkout.

    Raises:
        ValueError: if the package comes from elsewhere, such as an installed one: the checkout has none.
    """

    def __init__(self, checkout: Path, name: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        variables = {**environment.snapshot(), "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        # -P: the modules beside the script would hide packages of the same names.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER), name], env=variables, cwd=self._folder.name, encoding="utf-8",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        found = self._wait_for("ready ")
        if Path(found) != checkout.resolve():
            self.close()
            raise ValueError(f"--beside {checkout}: its package sfd_scale was not found; {found} was taken")

    def _wait_for(self, start: str = "") -> str:
        """The rest of the next line with this start; libraries print lines of their own before `ready`."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(start):
                return line.removeprefix(start).strip()
        raise RuntimeError(f"the worker ended with {self._process.wait()}")

    def seconds(self) -> float:
        """CPU seconds of a step."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{STEPS}\n")
        self._process.stdin.flush()
        return float(self._wait_for()) / STEPS

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()


def measure(name: str, beside: Path | None, repeats: int, other: str | None = None) -> Figure:
    """The figure of one engine: this checkout, and as its peer the other one, or the engine `other`."""
    alone = beside is None and other is None
    workers = {"ours": Worker(ROOT, name)} | ({} if alone else {"peer": Worker(beside or ROOT, other or name)})
    seconds: dict[str, list[float]] = {side: [] for side in workers}
    try:
        for number in range(repeats):
            for side in workers if number % 2 == 0 else reversed(workers):
                seconds[side].append(1000 * workers[side].seconds())
    finally:
        for worker in workers.values():
            worker.close()
    seconds.setdefault("peer", [float("nan")] * repeats)
    against = other or ("nothing" if beside is None else "the other checkout")
    return harness.compare(f"host time of a step, {name}", seconds, against=against, work=None, unit="ms")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {'; '.join(NAMES)}; default: all")
    parser.add_argument("--beside", type=Path, help="another checkout")
    parser.add_argument("--against", metavar="NAME", choices=NAMES, help="another engine, of this checkout")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, help="also write host_time.json into this folder")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(NAMES)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}; allowed: {'; '.join(NAMES)}")
    machine = harness.machine()
    print(f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_average']:.1f}, {harness.versions()}")
    figures = []
    for name in options.names or NAMES:
        figures.append(measure(name, options.beside, options.repeats, options.against))
        print("  ".join(harness.row(figures[-1])), flush=True)
    print(harness.markdown(figures))
    if options.out is not None:
        state = {"machine": machine, "versions": harness.versions(), "repeats": options.repeats}
        print(f"written to {harness.write('host_time', COMMAND, figures, state, options.out)}")


if __name__ == "__main__":
    main()
