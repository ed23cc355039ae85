"""Fragments (flat ranges of parameters) as n-dimensional boxes, the form in which torch stores shards of a tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed.checkpoint
from torch import Tensor

from sfd_scale.engines.engine import Fragment
from sfd_scale.runtime import distributed

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offset, size

# Prefix of the stored name → tensors of this rank, one per fragment in the order of the fragments; None for a fragment
# that has no such tensor.
Parts = Mapping[str, Sequence[Tensor | None]]
PARAMS_PART, EXP_AVG_PART, EXP_AVG_SQ_PART = "model", "optim.exp_avg", "optim.exp_avg_sq"


def state_parts(fragments: Sequence[Fragment], averages: Parts) -> Parts:
    """The parts of a checkpoint: weights, moments, averages."""
    return {
        PARAMS_PART: [f.param for f in fragments],
        EXP_AVG_PART: [f.exp_avg for f in fragments],
        EXP_AVG_SQ_PART: [f.exp_avg_sq for f in fragments],
        **averages,
    }


def boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Elements [start, stop) of a row-major tensor as at most 2 · ndim - 1 boxes, in that order."""
    if not shape:
        return [((), ())]
    if len(shape) == 1:
        return [((start,), (stop - start,))]
    row = math.prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    out: list[Box] = []
    whole_from = first if start % row == 0 else first + 1
    whole_to = last + 1 if stop % row == 0 else last
    if start % row:
        out += _in_row(shape, first, start % row, min(row, stop - first * row))
    if whole_to > whole_from:
        out.append(((whole_from, *[0] * (len(shape) - 1)), (whole_to - whole_from, *shape[1:])))
    # The last row, unless it is also the first row and was added above.
    if stop % row and (last != first or start % row == 0):
        out += _in_row(shape, last, 0, stop % row)
    return out


def _in_row(shape: Sequence[int], row: int, start: int, stop: int) -> list[Box]:
    return [((row, *offset), (1, *size)) for offset, size in boxes(shape[1:], start, stop)]


@dataclass(frozen=True)
class Staged:
    """Host memory for one stored tensor of one fragment: the rows the fragment touches.

    Attributes:
        rows: (r, *shape[1:]) fp32. Its attributes name its boxes (torch.distributed.checkpoint.CheckpointableTensor).
        flat: (n,) the fragment's elements, a view of `rows`.
        source: (n,) the tensor of the engine or the EMA.
    """

    rows: Tensor
    flat: Tensor
    source: Tensor


def stage(fragments: Sequence[Fragment], parts: Parts, pinned: bool, own: bool) -> dict[str, Staged]:
    """Allocate host buffers for the tensors of fragments, by stored name. Nothing is copied yet.

    Args:
        own: leave out fragments that another rank saves.
    """
    return {
        f"{prefix}.{fragment.name}": _staged(fragment, tensor, pinned)
        for prefix, tensors in parts.items()
        for fragment, tensor in zip(fragments, tensors, strict=True)
        if tensor is not None and (fragment.primary or not own)
    }


def check_torch_stores_shards() -> None:
    """Refuse several ranks under an older PyTorch, which takes each rank's box for a whole tensor.

    Raises:
        ValueError: pointing to `sfd doctor`, which names the release that is needed.
    """
    if distributed.world_size() > 1 and not hasattr(torch.distributed.checkpoint, "CheckpointableTensor"):
        raise ValueError(
            f"torch {torch.__version__}: checkpoints of several ranks need a newer one; `sfd doctor` says which"
        )


def stored_shapes(fragments: Sequence[Fragment], parts: Parts) -> dict[str, tuple[int, ...]]:
    """Names and full shapes of the tensors that all ranks store. All ranks call it together."""
    local = {
        f"{prefix}.{fragment.name}": fragment.shape
        for prefix, tensors in parts.items()
        for fragment, tensor in zip(fragments, tensors, strict=True)
        if tensor is not None
    }
    return {name: shape for part in distributed.all_gather_object(local) for name, shape in part.items()}


def _staged(fragment: Fragment, source: Tensor, pinned: bool) -> Staged:
    shape = fragment.shape
    if not shape:
        rows = torch.zeros((), pin_memory=pinned)
        return Staged(_describe(rows, shape, boxes(shape, 0, 1), 0), rows.view(-1), source)
    row = math.prod(shape[1:])
    first, last = fragment.start // row, (fragment.stop - 1) // row
    rows = torch.zeros(last - first + 1, *shape[1:], pin_memory=pinned)
    flat = rows.view(-1)[fragment.start - first * row : fragment.stop - first * row]
    return Staged(_describe(rows, shape, boxes(shape, fragment.start, fragment.stop), first), flat, source)


def _describe(rows: Tensor, shape: tuple[int, ...], parts: list[Box], first: int) -> Tensor:
    attributes = {
        "global_shape": shape,
        "global_offsets": tuple(offset for offset, _ in parts),
        "local_offsets": tuple((offset[0] - first, *offset[1:]) if offset else () for offset, _ in parts),
        "local_sizes": tuple(size for _, size in parts),
    }
    for name, value in attributes.items():
        setattr(rows, name, value)
    return rows
