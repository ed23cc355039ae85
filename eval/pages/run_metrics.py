"""The metrics of a training run, read from its metrics.jsonl."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from sfd_scale.runtime.run_paths import RunPaths

logger = logging.getLogger(__name__)
Row = dict[str, Any]
# Runs of release 0.1 wrote these terms of the loss without the prefix.
_TERMS_OF_0_1 = ("velocity", "velocity_texture", "velocity_semantic", "cosine", "alignment", "mse", "kl")
_RENAMED = {name: f"loss/{name}" for name in _TERMS_OF_0_1}


def read_metrics(run: Path) -> list[Row]:
    """The rows of a run folder, under the names of this release. A damaged line, such as a torn last one, is left out.

    Raises:
        ValueError: if the run folder has no metrics.jsonl.
    """
    file = RunPaths(run).metrics_file
    if not file.is_file():
        raise ValueError(f"{run}: no run folder (no metrics.jsonl in it)")
    rows = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            logger.warning("%s: a line that is no JSON object with a step is left out", file)
            continue
        rows.append({_RENAMED.get(str(name), str(name)): value for name, value in row.items()})
    return rows


def loss_names(rows: list[Row]) -> list[str]:
    """The total loss first, then its terms, in the order of their names."""
    names = {name for row in rows for name, value in row.items() if isinstance(value, int | float)}
    terms = sorted(name for name in names if name.startswith("loss/"))
    return ["loss", *terms] if "loss" in names else terms
