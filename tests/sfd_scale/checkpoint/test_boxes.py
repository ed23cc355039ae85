"""Ranges of a flat tensor as boxes of the full one, and the rows that are saved of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from sfd_scale.checkpoint.boxes import boxes, stage, state_parts
from sfd_scale.engines.engine import Fragment


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    start = draw(st.integers(0, math.prod(shape) - 1))
    return shape, start, draw(st.integers(start + 1, math.prod(shape)))


@given(ranges())
def test_boxes_are_the_range_in_order(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = case
    numbers = torch.arange(math.prod(shape)).view(shape)
    parts = boxes(shape, start, stop)
    found = [
        numbers[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))].reshape(-1) for offset, size in parts
    ]
    assert torch.cat(found).tolist() == list(range(start, stop))
    assert len(parts) <= max(2 * len(shape) - 1, 1)


@given(ranges())
def test_staged_rows_hold_the_boxes_where_they_say(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = case
    data = torch.arange(start, stop, dtype=torch.float32)
    fragment = Fragment("w", shape, start, data, data, data, True)
    staged = stage([fragment], state_parts([fragment], {"ema": [data]}), pinned=False, own=True)
    assert sorted(staged) == ["ema.w", "model.w", "optim.exp_avg.w", "optim.exp_avg_sq.w"]
    part: Any = staged["model.w"]
    part.flat.copy_(part.source)
    full = torch.full(shape, -1.0)
    for to, at, size in zip(part.rows.global_offsets, part.rows.local_offsets, part.rows.local_sizes, strict=True):
        full[tuple(map(slice, to, (o + s for o, s in zip(to, size, strict=True))))] = part.rows[
            tuple(map(slice, at, (o + s for o, s in zip(at, size, strict=True))))
        ]
    expected = torch.full((math.prod(shape),), -1.0)
    expected[start:stop] = data
    assert torch.equal(full.view(-1), expected)
    assert part.rows.shape[0] * math.prod(shape[1:]) - (stop - start) < 2 * math.prod(shape[1:]) if shape else True
