"""The results of the GPU benchmark: printed and written to one file as they are made, part by part."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks import harness
from benchmarks.harness import Figure

logger = logging.getLogger(__name__)
T = TypeVar("T")


def file_name(device: torch.device) -> str:
    """gpu-NAME.json, with the name of the device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return f"gpu-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


@dataclass
class Part:
    """The results of one part. `run` starts nothing more once the time is up.

    budget_s: seconds of the part. A step starts only if the time left is at least that of the longest step so far.
    path: the file of all parts; None to print only.
    state: of the file: machine, versions, options.
    checks: of each comparison its error, the limit and whether it holds.
    facts: numbers without a peer, in SI units. left_out: what did not run, with the reason.
    """

    name: str
    budget_s: float
    path: Path | None = None
    state: Mapping[str, Any] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    left_out: list[dict[str, str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    longest_s: float = 0.0
    ended: str | None = None

    def __post_init__(self) -> None:
        self._started = time.monotonic()
        self.save()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def failed(self) -> list[str]:
        """What failed: comparisons beyond their limit, and steps that raised an error."""
        return [check["what"] for check in self.checks if not check["ok"]] + self.failures

    def run(self, what: str, work: Callable[[], T]) -> T | None:
        """The result of `work`; None if there is no time for it or it fails. Either is recorded under `what`."""
        left = self.budget_s - self.seconds
        if left <= 0 or left < self.longest_s:
            self.leave_out(what, f"the {self.budget_s:.0f} s of this part are used up")
            return None
        started = time.monotonic()
        try:
            return work()
        except torch.OutOfMemoryError:
            self.leave_out(what, "out of memory")
            return None
        except TimeoutError as late:
            self.leave_out(what, str(late))
            return None
        except Exception as error:  # every step runs for itself
            logger.warning("%s failed", what, exc_info=error)
            self.failures.append(what)
            self.leave_out(what, f"failed: {type(error).__name__}: {error}")
            return None
        finally:
            self.longest_s = max(self.longest_s, time.monotonic() - started)

    def figure(self, figure: Figure) -> None:
        """Record a figure, in place of an earlier one of the same name: a peer may be measured later."""
        names = [earlier.what for earlier in self.figures]
        if figure.what in names:
            self.figures[names.index(figure.what)] = figure
        else:
            self.figures.append(figure)
        print("  ".join(cell for cell in harness.row(figure) if cell), flush=True)
        self.save()

    def check(self, what: str, error: float, limit: float) -> bool:
        """Record a comparison, which holds if `error` is at most `limit`. NaN does not hold."""
        holds = error <= limit
        self.checks.append({"what": what, "error": error, "limit": limit, "ok": holds})
        print(f"{what}: error {error:.1e}, limit {limit:.1e}: {'ok' if holds else 'FAILED'}", flush=True)
        self.save()
        return holds

    def fact(self, what: str, value: Any, text: str | None = None) -> None:
        self.facts[what] = value
        print(f"{what}: {value if text is None else text}", flush=True)
        self.save()

    def leave_out(self, what: str, reason: str) -> None:
        """Record what did not run."""
        self.left_out.append({"what": what, "reason": reason})
        print(f"left out: {what}: {reason}", flush=True)
        self.save()

    def finish(self) -> None:
        self.ended = "complete"
        self.save()

    def as_dict(self) -> dict[str, Any]:
        return {
            "ended": self.ended, "seconds": round(self.seconds, 1), "facts": self.facts, "checks": self.checks,
            "left_out": self.left_out, "failed": self.failed,
            "figures": [{**dataclasses.asdict(figure), "met": figure.met} for figure in self.figures],
        }  # fmt: skip

    def save(self) -> None:
        if self.path is not None:
            write(self.path, self.state, {self.name: self.as_dict()})


def read(path: Path) -> dict[str, Any]:
    """The results of all parts; empty without a file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write(path: Path, state: Mapping[str, Any], new: Mapping[str, Mapping[str, Any]]) -> None:
    """Put parts into the file, in place of older results of the same parts.

    `figures` has those of all parts: `sfd plan --measured` reads them.
    """
    parts = {**read(path).get("parts", {}), **new}
    figures = [figure for part in parts.values() for figure in part["figures"]]
    content = {"benchmark": "gpu", **state, "figures": figures, "parts": parts}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(_plain(content), indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def _plain(value: Any) -> Any:
    """JSON has neither NaN nor infinity."""
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
