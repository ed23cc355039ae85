"""Measured throughputs in files: of a run's metrics, of `make gpu-bench`, or as plain JSON."""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfd_scale.engines.fsdp import FSDPConfig
from sfd_scale.runtime.files import read_json, read_json_lines


@dataclass(frozen=True)
class Throughput:
    """Of a run. mfu: None if the run did not report it. samples_per_s: of one rank; None likewise."""

    mfu: float | None
    samples_per_s: float | None


@dataclass(frozen=True)
class BenchFigure:
    """A training figure of gpu-bench: a model size, alone on one GPU. samples_per_s: measured."""

    name: str
    size: str
    micro_batch: int
    engine: FSDPConfig
    samples_per_s: float


@dataclass(frozen=True)
class BenchResults:
    """Results of gpu-bench. matmul_flops: of a large bf16 matmul, FLOP/s. copy_bytes: of a copy, bytes/s."""

    figures: list[BenchFigure]
    matmul_flops: float | None
    copy_bytes: float | None


# The names of these two in the results.
SUSTAINED_MATMUL, SUSTAINED_COPY = "sustained bf16 matmul, FLOP/s", "copy within the GPU's memory, bytes/s"


def read_throughput(path: Path) -> Throughput | BenchResults:
    """The measurements in a file.

    Args:
        path: metrics.jsonl of a run; results of `make gpu-bench`; or JSON with `mfu`, or with `samples_per_s` and
            `world_size`.

    Raises:
        ValueError: if the file is missing or has none of them.
    """
    try:
        rows = read_json_lines(path) if path.suffix == ".jsonl" else None
        data = read_json(path) if rows is None else {}
    except ValueError as error:
        raise ValueError(f"--measured: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"--measured: {path} holds a {type(data).__name__}; allowed: a JSON object")
    try:
        if "figures" in data:
            facts = data.get("parts", {}).get("machine", {}).get("facts", {})
            sustained = [_number(facts, name) for name in (SUSTAINED_MATMUL, SUSTAINED_COPY)]
            return BenchResults(bench_figures(data["figures"], path), *sustained)
        found = _of_json(data) if rows is None else _of_metrics(rows)
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"--measured: {path}: its values are not those of a run or of `make gpu-bench`") from error
    if found.mfu is None and found.samples_per_s is None:
        raise ValueError(
            f"{path}: no `mfu`, nor `samples_per_s` with `world_size`; give a run's metrics.jsonl, the results of "
            "`make gpu-bench`, or those"
        )
    return found


def _number(facts: dict[str, Any], name: str) -> float | None:
    """Raises TypeError for a fact that is no number."""
    value = facts.get(name)
    if not (value is None or isinstance(value, int | float)):
        raise TypeError(name)
    return value


def _of_metrics(rows: list[dict[str, Any]]) -> Throughput:
    """By the median: the first steps are slow, and pauses for saves are rare."""
    medians = []
    for name in ("mfu", "samples_per_s_per_rank"):
        values = [row[name] for row in rows if row.get(name)]
        medians.append(float(statistics.median(values)) if values else None)
    return Throughput(*medians)


def _of_json(data: dict[str, Any]) -> Throughput:
    mfu = float(data["mfu"]) if "mfu" in data else None
    if "samples_per_s" in data and "world_size" in data:
        return Throughput(mfu, float(data["samples_per_s"]) / float(data["world_size"]))
    return Throughput(mfu, None)


_NAME = re.compile(r"(\w+)/1 bf16 training, micro-batch (\d+), (?:activation checkpointing (\w+)|(eager))\b")


def bench_figures(figures: list[dict[str, Any]], path: Path) -> list[BenchFigure]:
    """The training figures of gpu-bench's results.

    Raises:
        ValueError: if there is none.
    """
    found = []
    for figure in figures:
        match = _NAME.match(figure["what"])
        if match is None or not figure["ours"]:
            continue
        size, micro_batch, mode, eager = match.groups()
        checkpointing: Any = mode or "none"
        engine = FSDPConfig(sharding="replicate", compile=not eager, activation_checkpointing=checkpointing)
        found.append(BenchFigure(match[0], size, int(micro_batch), engine, float(figure["ours"])))
    if not found:
        raise ValueError(f"no figure of training in it; run `make gpu-bench` ({path})")
    return found
