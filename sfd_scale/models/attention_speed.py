"""The order in which `attention: auto` tries the kernels of a GPU: by measured times, if there are some.

attention_speed.json holds both. "assumed": the order for each major compute capability, from the kernels' publications.
`sdpa` stands for PyTorch's choice, cuDNN's kernel on Hopper and Blackwell. "measured": milliseconds of
forward and backward by GPU, head dimension and kernel. `python -m benchmarks.gpu attention` writes them.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_suffix(".json")
Milliseconds = dict[str, dict[str, float]]  # by head dimension and kernel


def order(capability: tuple[int, int], gpu: str | None, head_dims: Collection[int], table: Path = TABLE) -> list[str]:
    """The kernels of a GPU, the fastest first. `sdpa` is always among them.

    Args:
        gpu: its name, as in `torch.cuda.get_device_name`.
        head_dims: features per head; times count if all of them were measured.
    """
    data = _read(table)
    assumed = data["assumed"].get(str(capability[0]), ["sdpa"])
    times: Milliseconds = data["measured"].get(gpu, {})
    known = [times[str(dim)] for dim in head_dims if str(dim) in times]
    if not known or len(known) < len(set(head_dims)):
        return list(assumed)
    everywhere = set.intersection(*(set(row) for row in known))
    fastest = sorted(everywhere, key=lambda kernel: sum(row[kernel] for row in known))
    return fastest + [kernel for kernel in assumed if kernel not in everywhere]


def record(gpu: str, times: Milliseconds, table: Path = TABLE) -> None:
    """Replace the measured times of a GPU."""
    data = _read(table)
    data["measured"][gpu] = times
    table.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _read(table: Path) -> dict[str, Any]:
    return json.loads(table.read_text(encoding="utf-8"))
