"""`python -m benchmarks.plan_pages`: write the output of every `sfd plan` command of the pages below the command.

A page has the command as an indented block, then a table or a code block between `<!-- table: sfd plan -->` and
`<!-- end of table -->`. tests/test_docs.py compares the pages with the commands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from typer.testing import CliRunner

from sfd_scale import __main__ as package

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "scale.md")
_START, _END = "<!-- table: sfd plan -->", "<!-- end of table -->"
_EXAMPLE = re.compile(
    rf"^(    sfd (plan (?:[^\n]*\\\n +)*[^\n]*)\n)\n{_START}\n\n(.*?)\n\n{_END}", re.MULTILINE | re.DOTALL
)


def output(command: str) -> str:
    """The output of `sfd COMMAND`, as it stands in a page.

    Raises:
        RuntimeError: if the command fails.
    """
    result = CliRunner(env={"COLUMNS": "100", "NO_COLOR": "1"}).invoke(package.app, command.split())
    if result.exit_code:
        raise RuntimeError(f"sfd {command}: {result.output}{result.exception or ''}")
    text = result.output.rstrip()
    return text if text.startswith("|") else f"```text\n{text}\n```"


def examples(page: str) -> Iterator[tuple[str, str]]:
    """The commands of a page with the outputs that stand below them."""
    for match in _EXAMPLE.finditer(page):
        yield re.sub(r"\s*\\\n\s+", " ", match[2]).split(" #")[0], match[3]


def refreshed(page: str) -> str:
    def replace(match: re.Match[str]) -> str:
        command = re.sub(r"\s*\\\n\s+", " ", match[2]).split(" #")[0]
        return f"{match[1]}\n{_START}\n\n{output(command)}\n\n{_END}"

    return _EXAMPLE.sub(replace, page)


def main() -> None:
    for path in PAGES:
        before = path.read_text(encoding="utf-8")
        after = refreshed(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"{path.relative_to(ROOT)}: written")


if __name__ == "__main__":
    main()
