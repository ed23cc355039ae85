"""`python -m benchmarks`: run all benchmarks, each in its own process, and print a table of the targets.

The results go into benchmarks/results/cpu.json, each with its machine and date. NAME runs only that benchmark and
replaces its results. `--page` runs nothing: it writes the tables of the file into docs/performance.md, between two
marks.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness

SUITE = (
    "train_step", "sampling", "ema_optimizer", "muon", "attention", "checkpoint", "loader", "data_wait", "metrics",
    "representations", "startup",
)  # fmt: skip
FILE = "cpu.json"
DOCS = Path(__file__).parents[1] / "docs" / "performance.md"
START, END = "<!-- benchmarks: start -->", "<!-- benchmarks: end -->"


def main() -> int:
    """Returns 1 if a benchmark failed to run. A missed target is printed, but is no error."""
    parser = harness.parser(__doc__ or "")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SUITE)}; default: all")
    parser.add_argument("--page", action="store_true", help="write the tables of the results into docs/performance.md")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(SUITE)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}; allowed: {', '.join(SUITE)}")
    try:
        chosen = harness.options(arguments)
    except ValueError as error:
        parser.error(str(error))
    results = (chosen.out or harness.RESULTS) / FILE
    if arguments.page:
        if not results.is_file():
            parser.error(f"{results} does not exist; run `python -m benchmarks` first")
        insert(DOCS, page(harness.sections(results)))
        return 0
    started = time.monotonic()
    new, failed = measure(arguments.names or SUITE, chosen)
    figures = [figure for section in new for figure in harness.figures_of(section)]
    print(f"\n## Targets\n\n{machines(new)}\n\n{harness.markdown([f for f in figures if f.target is not None])}")
    print(f"\n{time.monotonic() - started:.0f} s in total")
    if not chosen.quick:
        harness.merge(results, new, SUITE)
        print(f"written to {results}; `python -m benchmarks --page` copies the tables into {DOCS.name}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def measure(names: Sequence[str], chosen: harness.Options) -> tuple[list[dict[str, Any]], list[str]]:
    """Run benchmarks; returns their results and the names of the failed ones."""
    new, failed = [], []
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as out:
        command = [f"--threads={chosen.threads}", f"--out={out}"]
        command += ["--quick"] if chosen.quick else []
        command += [f"--repeats={chosen.repeats}"] if chosen.repeats else []
        command += [f"--official={chosen.official}"] if chosen.official else []
        for name in names:
            print(f"\n## {name}\n", flush=True)
            if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *command], check=False).returncode:
                failed.append(name)
            else:
                new.append(harness.read(Path(out) / f"{name}.json"))
    return new, failed


def page(sections: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of results: the figures with a target, then the others of each benchmark, with machine and date."""
    with_target = [
        figure for section in sections for figure in harness.figures_of(section) if figure.target is not None
    ]
    where = textwrap.fill(f"**Targets.** {machines(sections)}", 100, break_long_words=False, break_on_hyphens=False)
    parts = [f"{where}\n\n{harness.markdown(with_target)}"]
    for section in sections:
        others = [figure for figure in harness.figures_of(section) if figure.target is None]
        about = f"`{section['command']}`, {section['date']}, {section['seconds']:.0f} s: {_machine(section)}."
        about = textwrap.fill(about, 100, break_long_words=False, break_on_hyphens=False)
        parts.append(f"{about}\n\n{harness.markdown(others)}" if others else about)
    return "\n\n".join(parts)


def machines(sections: Sequence[Mapping[str, Any]]) -> str:
    """The machines of results, each with the benchmarks that ran there."""
    names: dict[str, list[str]] = {}
    for section in sections:
        machine = section["machine"]
        name = f"{machine['cpu']}, {machine['cores']} cores ({machine['instructions']}), {section['date']}"
        names.setdefault(name, []).append(section["benchmark"])
    if len(names) == 1:
        return f"Machine: {next(iter(names))}."
    return " ".join(f"{', '.join(benchmarks)}: {name}." for name, benchmarks in names.items())


def _machine(section: Mapping[str, Any]) -> str:
    machine, versions = section["machine"], section["versions"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores ({machine['instructions']}), {machine['memory_gib']} GiB, "
        f"{section['threads']} threads, load {machine['load_average']:.1f} at the start, torch {versions['torch']}"
    )


def insert(path: Path, text: str) -> None:
    """Replace the text between the marks of a page.

    Raises:
        ValueError: unless the page has each mark once.
    """
    old = path.read_text(encoding="utf-8")
    if old.count(START) != 1 or old.count(END) != 1:
        raise ValueError(f"{path} needs the lines {START} and {END}, once each")
    before, _, rest = old.partition(START)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{START}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
