"""Measure the tables of docs/engines.md and write them there: `python -m tests.engine_tables [FOLDER]`.

Some 340 small trainings on 1, 2 and 4 gloo ranks of this machine. What FOLDER holds from an earlier call, cut off, is
not measured again. Fails where a bound of `agreement.py` does not hold.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.helpers import agreement
from tests.helpers.agreement import ACCUMULATIONS, BOUNDS, ENGINES, RESUMED, WORLDS, Cell

PAGE = Path(__file__).resolve().parents[1] / "docs" / "engines.md"
START, END = "<!-- tables: python -m tests.engine_tables -->", "<!-- end of tables -->"
NOT_MEASURED = "–"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def shown(cell: Cell, found: dict[Cell, dict[str, Any]], errors: dict[Cell, float]) -> str:
    if cell not in found:
        return NOT_MEASURED
    return "=" if found[cell].get("distance") == errors[cell] == 0 else f"{errors[cell]:.0e}"


def tables(found: dict[Cell, dict[str, Any]], errors: dict[Cell, float]) -> str:
    parts = []
    for precision, bound in BOUNDS.items():
        worst = [e for cell, e in errors.items() if cell.precision == precision and not cell.by]
        head = [precision, *(f"{n} rank{'s' * (n > 1)}" for n in WORLDS)]
        rows = [
            [engine]
            + [" / ".join(shown(Cell(engine, n, precision, a), found, errors) for a in ACCUMULATIONS) for n in WORLDS]
            for engine in ENGINES
            if (engine, precision) != ("ZeRO-0", "bf16")
        ]
        largest = f"largest {max(worst):.1e}" if worst else "not measured"
        parts += [f"Curves in {precision} ({len(worst)}): {largest}, bound {bound:.0e}.", table(head, rows)]
    resumes = {cell: e for cell, e in errors.items() if cell.by}
    head = ["saved by", *(f"→ {engine}" for engine in RESUMED)]
    rows = [
        [f"{by} at {at}"]
        + [" / ".join(shown(Cell(to, n, by=by, at=at), found, errors) for n in WORLDS) for to in RESUMED]
        for by in RESUMED
        for at in WORLDS
    ]
    exact = sum(e == 0 and found[cell]["distance"] == 0 for cell, e in resumes.items())
    largest = f"largest {max(resumes.values()):.1e}" if resumes else "not measured"
    parts += [f"Resumes ({len(resumes)}, {exact} of them bit for bit): {largest}, bound 1e-06.", table(head, rows)]
    return "\n\n".join(parts)


def main(root: str, measured: bool = True) -> int:
    started = time.monotonic()

    def say(text: str) -> None:
        sys.stderr.write(f"[{time.monotonic() - started:4.0f} s] {text}\n")

    plain = agreement.reference()
    if measured:
        agreement.measure(root, agreement.matrix(), say)
    found = agreement.read(root)
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    text = tables(found, agreement.errors(found, plain))
    PAGE.write_text(f"{before}{START}\n\n{text}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")
    wrong = agreement.broken(found, plain)
    say("\n".join([f"{PAGE}: {len(found)} cells, {len(wrong)} bounds broken", *wrong]))
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="what was measured stays there")
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(main(parser.parse_args().folder or temporary))
