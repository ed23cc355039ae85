"""The site of the docs in a browser: nothing reaches beyond a narrow or a wide window, and nothing is loaded from
elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.browser import overflow

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "REPOSITORY_URL": "https://example.org/sfd-scale"}
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-d", str(out)], cwd=ROOT, env=environment,
        check=True,
    )  # fmt: skip
    return out


def test_the_first_page_has_a_picture_a_search_and_a_link_to_the_repository(site: Path) -> None:
    text = (site / "index.html").read_text(encoding="utf-8")
    assert "images/quickstart-over-time.png" in text and 'data-md-component="search"' in text
    assert 'href="https://example.org/sfd-scale"' in text
    assert not re.search(r'(<script[^>]*src|<link[^>]*stylesheet[^>]*href)="http', text)


@pytest.mark.parametrize("width", [400, 1440])
@pytest.mark.parametrize("page", ["index", "install", "quickstart", "own-images", "python", "recipes", "evaluation"])
def test_nothing_reaches_beyond_the_window(site: Path, page: str, width: int) -> None:
    found = overflow(site / f"{page}.html", width)
    assert (found["width"], found["beyond"]) == (width, [])
