"""Pages in a browser without a window: their elements as they are laid out."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# The page reports its width, and the elements that reach beyond the window. What scrolls in a box of its own may.
_REPORT = """<script>addEventListener("load", () => { const wide = innerWidth + 1, found = [];
const scrolls = e => { for (; e; e = e.parentElement) { const o = getComputedStyle(e).overflowX;
if (e !== document.body && e !== document.documentElement && (o === "auto" || o === "scroll" || o === "hidden"))
return true } return false };
for (const e of document.body.querySelectorAll("*")) { const b = e.getBoundingClientRect();
if (b.width && b.right > wide && !scrolls(e)) found.push(e.tagName + "." + e.className + " " + Math.round(b.right)) }
parent.postMessage(JSON.stringify({width: document.documentElement.scrollWidth, window: innerWidth,
beyond: found.slice(0, 10)}), "*") })</script></body>"""
# A window of a browser can be wider than asked; a frame is not.
_FRAME = """<!doctype html><body style="margin: 0"><iframe src="{page}" width="{width}" height="4000" frameborder="0">
</iframe><pre id="measured"></pre><script>
onmessage = e => document.getElementById("measured").textContent = e.data</script></body>"""


def browser(page: Path, *options: str, size: tuple[int, int] = (1200, 5200)) -> str:
    """What a browser prints about a page. The test is skipped where none is installed."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser is installed, of {', '.join(BROWSERS)}")
    command = [
        found, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={size[0]},{size[1]}",
        f"--user-data-dir={page.parent / 'browser'}",
    ]  # fmt: skip
    done = subprocess.run(
        [*command, *options, page.as_uri()], capture_output=True, text=True, check=True, timeout=120,
        env={**os.environ, "HOME": str(page.parent)},
    )  # fmt: skip
    return done.stdout


def overflow(page: Path, width: int) -> dict[str, Any]:
    """A page in a window of `width` pixels: its own width, and the elements that reach beyond the window."""
    look, frame = page.with_name(f"look-{page.name}"), page.with_name(f"frame-{page.name}")
    look.write_text(page.read_text(encoding="utf-8").replace("</body>", _REPORT), encoding="utf-8")
    frame.write_text(_FRAME.format(page=look.name, width=width), encoding="utf-8")
    try:
        dom = browser(frame, "--virtual-time-budget=5000", "--dump-dom")
    finally:
        look.unlink()
        frame.unlink()
    found = re.search(r'<pre id="measured">(.+?)</pre>', dom, re.DOTALL)
    assert found is not None, dom[:500]
    measured: dict[str, Any] = json.loads(found[1].replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&"))
    return measured
