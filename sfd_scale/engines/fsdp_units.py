"""FSDP units: neighbouring blocks whose weights are gathered, and whose gradients are reduced, by one collective.

Larger units take less of the host's time and send fewer, larger messages. Two units are whole at a time, and the first
gather and the last reduction of a step have no computation to hide behind. So a unit should not be larger than needed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal, TypeVar

BlocksPerUnit = int | Literal["auto"]
# `auto`: a unit has at least this many bytes of gathered weights, or all blocks. XXL has two blocks of 85 MB in one.
UNIT_BYTES = 128 * 2**20

Block = TypeVar("Block")


def units_of(blocks: Sequence[Block], sizes: Sequence[int], wanted: BlocksPerUnit) -> list[list[Block]]:
    """The blocks in units of nearly equal counts, in order.

    Args:
        sizes: of each block, the bytes of its gathered weights.
        wanted: blocks per unit. A model whose number of blocks it does not divide has smaller units too.
    """
    if not blocks:
        return []
    mean = sum(sizes) / len(blocks)
    per_unit = wanted if wanted != "auto" else math.ceil(UNIT_BYTES / mean) if mean else 1
    count = math.ceil(len(blocks) / per_unit)
    ends = [round(len(blocks) * index / count) for index in range(count + 1)]
    return [list(blocks[start:end]) for start, end in itertools.pairwise(ends)]
