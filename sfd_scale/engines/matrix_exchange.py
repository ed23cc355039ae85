"""Whole matrices for an optimizer whose state is sharded: each matrix goes to one owner rank, and its rows come back.

Every matrix is computed once, on its owner, whatever the engine shards. Owners are balanced by the cost of their
matrices. Matrices travel in rounds: while the owners compute one round, the next one is on its way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sfd_scale.runtime import distributed

# Elements that an owner takes in one round, which bounds the memory for whole matrices: 128 MiB in float32.
ROUND_ELEMENTS = 1 << 25


class Matrix(NamedTuple):
    """A matrix in a parameter: a contiguous range of its rows."""

    name: str  # of the parameter
    offset: int  # first element, in the parameter's row-major order
    rows: int
    columns: int

    @property
    def elements(self) -> int:
        return self.rows * self.columns

    @property
    def cost(self) -> int:
        """Proportional to the FLOPs of an iteration X·(aI + bA + cA²), A = XXᵀ with the smaller side squared."""
        small, large = sorted((self.rows, self.columns))
        return small * small * (2 * large + small)


class Range(NamedTuple):
    """Elements [start, stop) of a parameter, which one rank updates."""

    name: str
    start: int
    stop: int


class Transfer(NamedTuple):
    """Elements [start, stop) of a matrix, between the rank that updates them and the owner of the matrix."""

    matrix: int
    start: int
    stop: int
    holder: int
    owner: int
    sends: bool  # False for a replica of elements that another holder sends

    @property
    def elements(self) -> int:
        return self.stop - self.start


def assign_owners(matrices: Sequence[Matrix], ranks: int) -> list[int]:
    """The owner of each matrix: the costliest first, each to the rank with the least cost so far."""
    loads, owners = [0] * ranks, [0] * len(matrices)
    for index in sorted(range(len(matrices)), key=lambda i: (-matrices[i].cost, i)):
        owners[index] = min(range(ranks), key=lambda rank: (loads[rank], rank))
        loads[owners[index]] += matrices[index].cost
    return owners


def plan_transfers(
    matrices: Sequence[Matrix], held: Sequence[Sequence[Range]], ranks_per_node: int = 1
) -> list[Transfer]:
    """All transfers, ordered by matrix, start and holder; the same on every rank.

    Args:
        held: for each rank, the ranges that it updates.

    Raises:
        RuntimeError: if the ranks together do not hold a whole matrix.
    """
    owners = assign_owners(matrices, len(held))
    by_name: dict[str, list[tuple[int, int, int]]] = {}
    for rank, ranges in enumerate(held):
        for part in ranges:
            by_name.setdefault(part.name, []).append((part.start, part.stop, rank))
    transfers = []
    for index, matrix in enumerate(matrices):
        end = matrix.offset + matrix.elements
        parts: dict[tuple[int, int], list[int]] = {}
        for start, stop, rank in by_name.get(matrix.name, []):
            low, high = max(start, matrix.offset), min(stop, end)
            if low < high:
                parts.setdefault((low - matrix.offset, high - matrix.offset), []).append(rank)
        covered = 0
        for (low, high), ranks in sorted(parts.items()):
            if low != covered:
                break
            covered = high
            owner = owners[index]
            # Replicas have the same bits. The nearest one sends: the owner itself, or a rank on the owner's node.
            nearest = min(ranks, key=lambda r: (r // ranks_per_node != owner // ranks_per_node, abs(r - owner), r))
            transfers += [Transfer(index, low, high, rank, owner, rank == nearest) for rank in ranks]
        if covered != matrix.elements:
            raise RuntimeError(f"{matrix.name}: the ranks hold {sorted(parts)} of the {matrix.elements} elements")
    return transfers


def plan_rounds(matrices: Sequence[Matrix], owners: Sequence[int], largest: int = ROUND_ELEMENTS) -> list[int]:
    """The round of each matrix: every owner takes its matrices in order, up to `largest` elements in a round."""
    rounds, filled = [0] * len(matrices), dict[int, tuple[int, int]]()
    for index, (matrix, owner) in enumerate(zip(matrices, owners, strict=True)):
        current, elements = filled.get(owner, (0, 0))
        if elements and elements + matrix.elements > largest:
            current, elements = current + 1, 0
        filled[owner] = current, elements + matrix.elements
        rounds[index] = current
    return rounds


class Piece(NamedTuple):
    """Elements [start, stop) of one of this rank's ranges."""

    of: int  # number of the range
    start: int
    stop: int


@dataclass(frozen=True)
class _Round:
    """One round, as this rank sees it. Lists are in the order of the messages: by the other rank, matrix, start."""

    owned: list[int]  # matrices that this rank computes
    sent: list[Piece]
    sent_sizes: list[int]  # elements to each rank
    received: list[Transfer]
    received_sizes: list[int]  # elements from each rank
    returned: list[Transfer]  # results that this rank sends to the holders
    returned_sizes: list[int]
    results: list[Piece]
    results_sizes: list[int]


class MatrixExchange:
    """Brings matrices to their owners and the results back. All ranks construct it and call it together.

    Args:
        matrices: the same on every rank.
        ranges: what this rank updates.
    """

    def __init__(self, matrices: Sequence[Matrix], ranges: Sequence[Range]) -> None:
        self.matrices, self.ranges = list(matrices), list(ranges)
        held, per_node = distributed.all_gather_object(self.ranges), distributed.local_world_size()
        transfers = plan_transfers(self.matrices, held, per_node)
        owners = assign_owners(self.matrices, distributed.world_size())
        self.owned = [index for index, owner in enumerate(owners) if owner == distributed.rank()]
        rounds = plan_rounds(self.matrices, owners)
        by_round: list[list[Transfer]] = [[] for _ in range(max(rounds, default=-1) + 1)]
        for transfer in transfers:
            by_round[rounds[transfer.matrix]].append(transfer)
        self._rounds = [self._of_this_rank(parts) for parts in by_round]
        self._on_its_way: _Message | None = None  # of the next round; held here alone, so that its memory is freed

    def _of_this_rank(self, transfers: list[Transfer]) -> _Round:
        own, ranks = distributed.rank(), distributed.world_size()
        index_of = {part.name: index for index, part in enumerate(self.ranges)}

        def piece(transfer: Transfer) -> Piece:
            matrix = self.matrices[transfer.matrix]
            index = index_of[matrix.name]
            before = matrix.offset - self.ranges[index].start
            return Piece(index, before + transfer.start, before + transfer.stop)

        def sizes(parts: list[Transfer], other: Callable[[Transfer], int]) -> list[int]:
            out = [0] * ranks
            for transfer in parts:
                out[other(transfer)] += transfer.elements
            return out

        held = sorted((t for t in transfers if t.holder == own), key=lambda t: (t.owner, t.matrix, t.start))
        computed = sorted((t for t in transfers if t.owner == own), key=lambda t: (t.holder, t.matrix, t.start))
        sent, received = [t for t in held if t.sends], [t for t in computed if t.sends]
        return _Round(
            owned=sorted({t.matrix for t in computed}),
            sent=[piece(t) for t in sent], sent_sizes=sizes(sent, lambda t: t.owner),
            received=received, received_sizes=sizes(received, lambda t: t.holder),
            returned=computed, returned_sizes=sizes(computed, lambda t: t.holder),
            results=[piece(t) for t in held], results_sizes=sizes(held, lambda t: t.owner),
        )  # fmt: skip

    def start(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> None:
        """Send the first round. Between `start` and `run` the caller can compute something else.

        Args:
            tensors: (n,) for each range.
            dtype: of the messages, and of the matrices that `run` computes.
        """
        self._on_its_way = self._gather(0, tensors, dtype)

    def run(
        self, tensors: Sequence[Tensor], dtype: torch.dtype, compute: Callable[[list[Tensor]], list[Tensor]]
    ) -> Iterator[tuple[list[Piece], list[Tensor]]]:
        """Apply `compute` to every matrix on its owner, after `start` with the same tensors.

        Args:
            compute: matrices (rows, columns) → results of the same shapes.

        Yields:
            For each round, pieces of this rank's ranges and their results, (n,). All pieces cover all ranges.
        """
        for number, plan in enumerate(self._rounds):
            assert self._on_its_way is not None, "run without start"
            received = self._on_its_way.wait()
            self._on_its_way = self._gather(number + 1, tensors, dtype)
            results = dict(zip(plan.owned, compute(self._assemble(plan, received)), strict=True))
            del received
            flat = [results[t.matrix].reshape(-1)[t.start : t.stop] for t in plan.returned]
            out = _Message.send(flat, plan.returned_sizes, plan.results_sizes, tensors, dtype).wait()
            del results, flat
            yield plan.results, list(out.split([p.stop - p.start for p in plan.results]))

    def _gather(self, number: int, tensors: Sequence[Tensor], dtype: torch.dtype) -> _Message | None:
        if number >= len(self._rounds):
            return None
        plan = self._rounds[number]
        parts = [tensors[p.of][p.start : p.stop] for p in plan.sent]
        return _Message.send(parts, plan.sent_sizes, plan.received_sizes, tensors, dtype)

    def _assemble(self, plan: _Round, received: Tensor) -> list[Tensor]:
        parts: dict[int, list[tuple[int, Tensor]]] = {index: [] for index in plan.owned}
        for transfer, values in zip(plan.received, received.split([t.elements for t in plan.received]), strict=True):
            parts[transfer.matrix].append((transfer.start, values))
        out = []
        for index in plan.owned:
            rows, columns = self.matrices[index][2:]
            ordered = [values for _, values in sorted(parts[index], key=lambda part: part[0])]
            out.append((ordered[0] if len(ordered) == 1 else torch.cat(ordered)).view(rows, columns))
        return out


@dataclass(frozen=True)
class _Message:
    """An all-to-all on its way. `sent` keeps its memory alive."""

    sent: Tensor
    received: Tensor
    work: Any

    @classmethod
    def send(
        cls, parts: Sequence[Tensor], sent_sizes: list[int], received_sizes: list[int], like: Sequence[Tensor],
        dtype: torch.dtype,
    ) -> _Message:  # fmt: skip
        device = like[0].device if like else distributed.device()
        sent = torch.cat([part.to(dtype) for part in parts]) if parts else torch.empty(0, dtype=dtype, device=device)
        received = torch.empty(sum(received_sizes), dtype=dtype, device=device)
        work = dist.all_to_all_single(received, sent, received_sizes, sent_sizes, async_op=True)
        return cls(sent, received, work)

    def wait(self) -> Tensor:
        self.work.wait()
        return self.received
