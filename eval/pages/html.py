"""Parts that the HTML pages share: templates, pictures, and texts of settings and paths."""

from __future__ import annotations

import base64
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sfd_scale import config
from sfd_scale.runtime.file_kind import HEAD_BYTES, kind_of_bytes

logger = logging.getLogger(__name__)
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Picture:
    """A PNG that the page contains.

    file: its path beside the page, if it is written there too.
    """

    title: str
    data: bytes
    file: str = ""

    @property
    def inline(self) -> str:
        """The URL that holds the picture itself."""
        return f"data:image/png;base64,{base64.b64encode(self.data).decode()}"


def environment(*, autoescape: bool = True) -> Environment:
    """The templates. The HTML pages extend page.html.j2, which has their style."""
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def settings_as_text(tree: Any) -> dict[str, str]:
    """Nested settings as dotted keys and texts."""
    return {key: str(value) for key, value in config.flatten(tree).items()}


def path_labels(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path: the fewest that make all labels different."""
    resolved = [path.resolve() for path in paths]
    for depth in range(1, max((len(path.parts) for path in resolved), default=0) + 1):
        labels = ["/".join(path.parts[-depth:]) for path in resolved]
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in resolved]


def find_picture(recorded: str | None, results: Path) -> Path | None:
    """The picture that a results.json records: beside the results, in case they were moved, or at its recorded path.

    Another file than a PNG is left out: a page shows its pictures to everyone, and results may be of somebody else.
    """
    if recorded is None:
        return None
    folder = results if results.is_dir() else results.parent
    found = next((file for file in (folder / Path(recorded).name, Path(recorded)) if file.is_file()), None)
    if found is None:
        return None
    with found.open("rb") as file:
        kind = kind_of_bytes(file.read(HEAD_BYTES))
    if kind != "png":
        logger.warning("%s: its picture %s is no PNG file; it is left out", results, found)
        return None
    return found
