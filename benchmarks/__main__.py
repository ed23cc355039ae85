"""`python -m benchmarks`: every benchmark, each in a process of its own, and one table with the bars.

Its table is written into docs/performance.md, between the two marks there; `--quick` writes none.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import harness

SUITE = ("train_step", "sampling", "ema_optimizer", "attention", "checkpoint", "loader", "metrics")
DOCS = Path(__file__).parents[1] / "docs" / "performance.md"
START, END = "<!-- benchmarks: start -->", "<!-- benchmarks: end -->"


def main() -> int:
    """1 if a benchmark failed to run; a bar that is missed is printed, not an error."""
    parser = harness.parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SUITE)}; default: all")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(SUITE)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}; allowed: {', '.join(SUITE)}")
    chosen = harness.options(arguments)
    out = Path(tempfile.mkdtemp(prefix="benchmarks-")) if chosen.quick else chosen.out
    command = [f"--threads={chosen.threads}", f"--out={out}"]
    command += ["--quick"] if chosen.quick else []
    command += [f"--repeats={chosen.repeats}"] if chosen.repeats else []
    command += [f"--authors={chosen.authors}"] if chosen.authors else []
    failed, figures = [], []
    for name in arguments.names or SUITE:
        print(f"\n## {name}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *command], check=False).returncode:
            failed.append(name)
        else:
            figures += harness.read(out / f"{name}.json")
    print(f"\n{harness.markdown(figures)}")
    if not chosen.quick and not arguments.names and not failed:
        insert(DOCS, harness.markdown(figures))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def insert(page: Path, table: str) -> None:
    """Put the table between the marks of a page.

    Raises:
        ValueError: if the page has not both marks, once each.
    """
    text = page.read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1:
        raise ValueError(f"{page} needs the lines {START} and {END}, once each")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{START}\n{table}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
