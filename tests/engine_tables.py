"""Measure the tables of docs/engines.md and write them there: `python -m tests.engine_tables [FOLDER]`.

Some 600 small trainings on 1, 2 and 4 gloo ranks of this machine, with AdamW and with Muon. What FOLDER holds from an
earlier call, cut off, is not measured again. Fails where a bound of `agreement.py` does not hold.
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
START, END = "<!-- tables: python -m tests.engine_tables --optimizer {} -->", "<!-- end of tables -->"
NOT_MEASURED = "–"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def shown(cell: Cell, found: dict[Cell, dict[str, Any]], errors: dict[Cell, float]) -> str:
    if cell not in found:
        return NOT_MEASURED
    return "=" if found[cell].get("distance") == errors[cell] == 0 else f"{errors[cell]:.0e}"


def curves(found: dict[Cell, dict[str, Any]], errors: dict[Cell, float], precision: str) -> list[str]:
    """A sentence and the table of the runs with AdamW in a precision."""
    worst = [e for c, e in errors.items() if c.precision == precision and not c.by and c.optimizer == "adamw"]
    head = [precision, *(f"{n} rank{'s' * (n > 1)}" for n in WORLDS)]
    rows = [
        [engine]
        + [" / ".join(shown(Cell(engine, n, precision, a), found, errors) for a in ACCUMULATIONS) for n in WORLDS]
        for engine in ENGINES
        if (engine, precision) != ("ZeRO-0", "bf16")
    ]
    return [
        f"Curves in {precision} ({len(worst)}): {largest(worst)}, bound {BOUNDS[precision]:.0e}.",
        table(head, rows),
    ]


def curves_with_muon(found: dict[Cell, dict[str, Any]], errors: dict[Cell, float]) -> list[str]:
    worst = [e for cell, e in errors.items() if not cell.by and cell.optimizer == "muon"]
    head = ["Muon, fp32", *ENGINES]
    rows = [
        [f"{n} rank{'s' * (n > 1)}", *(shown(Cell(e, n, optimizer="muon"), found, errors) for e in ENGINES)]
        for n in WORLDS
    ]
    return [f"Curves of Muon in fp32 ({len(worst)}): {largest(worst)}, bound 1e-06.", table(head, rows)]


def resumes(found: dict[Cell, dict[str, Any]], errors: dict[Cell, float], optimizer: str) -> list[str]:
    """A sentence and the table of the resumed runs with an optimizer."""
    own = {cell: e for cell, e in errors.items() if cell.by and cell.optimizer == optimizer}
    head = ["saved by", *(f"→ {engine}" for engine in RESUMED)]
    rows = [
        [f"{by} at {at}"]
        + [
            " / ".join(shown(Cell(to, n, by=by, at=at, optimizer=optimizer), found, errors) for n in WORLDS)
            for to in RESUMED
        ]
        for by in RESUMED
        for at in WORLDS
    ]
    exact = sum(e == 0 and found[cell]["distance"] == 0 for cell, e in own.items())
    name = {"adamw": "Resumes", "muon": "Resumes with Muon"}[optimizer]
    text = f"{name} ({len(own)}, {exact} of them bit for bit): {largest(list(own.values()))}, bound 1e-06."
    return [text, table(head, rows)]


def largest(errors: list[float]) -> str:
    return f"largest {max(errors):.1e}" if errors else "not measured"


def tables(found: dict[Cell, dict[str, Any]], errors: dict[Cell, float], optimizer: str) -> str:
    parts = [text for precision in BOUNDS for text in curves(found, errors, precision)]
    parts = parts if optimizer == "adamw" else curves_with_muon(found, errors)
    return "\n\n".join([*parts, *resumes(found, errors, optimizer)])


def main(root: str, optimizers: list[str]) -> int:
    started = time.monotonic()

    def say(text: str) -> None:
        sys.stderr.write(f"[{time.monotonic() - started:4.0f} s] {text}\n")

    plain = {name: agreement.reference(optimizer=name) for name in optimizers}
    for name in optimizers:
        agreement.measure(root, agreement.matrix(name), say)
    found = {cell: row for cell, row in agreement.read(root).items() if cell.optimizer in optimizers}
    errors = agreement.errors(found, plain)
    page = PAGE.read_text(encoding="utf-8")
    for name in optimizers:
        before, _, rest = page.partition(START.format(name))
        page = f"{before}{START.format(name)}\n\n{tables(found, errors, name)}\n\n{END}{rest.partition(END)[2]}"
    PAGE.write_text(page, encoding="utf-8")
    wrong = agreement.broken(found, plain)
    say("\n".join([f"{PAGE}: {len(found)} cells, {len(wrong)} bounds broken", *wrong]))
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="what was measured stays there")
    parser.add_argument("--optimizer", choices=agreement.OPTIMIZERS, help="default: both")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        chosen = [options.optimizer] if options.optimizer else list(agreement.OPTIMIZERS)
        sys.exit(main(options.folder or temporary, chosen))
