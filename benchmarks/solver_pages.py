"""`python -m benchmarks.solver_pages NAME FOLDER`: put the results of `sfd eval solvers` into docs/performance.md.

The table replaces what stands between `<!-- table: sfd eval solvers NAME -->` and `<!-- end of table -->`. The picture
becomes docs/images/solvers-NAME.png.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"


def refreshed(page: str, name: str, table: str) -> str:
    """The page with the table of `name`.

    Raises:
        ValueError: if the page has no place for it.
    """
    place = re.compile(
        rf"(<!-- table: sfd eval solvers {re.escape(name)} -->\n).*?(<!-- end of table -->)", re.DOTALL
    )  # fmt: skip
    if not place.search(page):
        raise ValueError(f"{name}: {PAGE.name} has no place for its table; add both marks")
    return place.sub(lambda match: f"{match[1]}\n{table.strip()}\n\n{match[2]}", page)


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    name, folder = sys.argv[1], Path(sys.argv[2])
    table = (folder / "solvers.md").read_text(encoding="utf-8")
    PAGE.write_text(refreshed(PAGE.read_text(encoding="utf-8"), name, table), encoding="utf-8")
    shutil.copyfile(folder / "solvers.png", ROOT / "docs" / "images" / f"solvers-{name}.png")
    print(f"{PAGE.relative_to(ROOT)}: written")


if __name__ == "__main__":
    main()
