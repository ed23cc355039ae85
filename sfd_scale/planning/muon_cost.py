"""The cost of Muon: FLOPs of the owners of matrices, the messages to them and back, and the memory of the update.

engines/matrix_exchange.py decides the owners and the rounds; this file asks it.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache

from sfd_scale.engines.matrix_exchange import Matrix, assign_owners, plan_rounds
from sfd_scale.planning.efficiency import Efficiency
from sfd_scale.planning.hardware import Hardware
from sfd_scale.planning.kernels import matmul_seconds

# Bytes of an element on the way: every GPU of the table computes the iterations in bf16.
MESSAGE_BYTES = 2


@dataclass(frozen=True)
class Orthogonalization:
    """The matrices that Muon orthogonalises in a model, each by `iterations` matrix polynomials."""

    matrices: tuple[Matrix, ...]
    iterations: int

    @cached_property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of the weights, which one or several matrices make up."""
        rows: Counter[tuple[str, int]] = Counter()
        for matrix in self.matrices:
            rows[matrix.name, matrix.columns] += matrix.rows
        return tuple((count, columns) for (_, columns), count in rows.items())

    @cached_property
    def elements(self) -> int:
        return sum(matrix.elements for matrix in self.matrices)

    @cached_property
    def flops(self) -> float:
        """Of one update of all matrices."""
        return 2.0 * self.iterations * sum(matrix.cost for matrix in self.matrices)


NOTHING = Orthogonalization((), 0)  # AdamW


@lru_cache(maxsize=1000)
def busiest_owner(muon: Orthogonalization, ranks: int) -> tuple[Counter[tuple[int, int]], ...]:
    """The rounds of the rank with the most FLOPs: the number of its matrices of each (smaller side, larger side)."""
    owners = assign_owners(muon.matrices, ranks)
    loads: Counter[int] = Counter()
    for matrix, owner in zip(muon.matrices, owners, strict=True):
        loads[owner] += matrix.cost
    busiest, found = max(loads, key=lambda rank: loads[rank]), dict[int, Counter[tuple[int, int]]]()
    for matrix, owner, number in zip(muon.matrices, owners, plan_rounds(muon.matrices, owners), strict=True):
        if owner == busiest:
            small, large = sorted((matrix.rows, matrix.columns))
            found.setdefault(number, Counter())[small, large] += 1
    return tuple(found.values())


def orthogonalization_seconds(muon: Orthogonalization, ranks: int, hardware: Hardware, efficiency: Efficiency) -> float:
    """Time of the iterations on the rank that computes longest. Equal shapes of a round are one batch."""
    if not muon.matrices:
        return 0.0
    total = 0.0
    for shapes in busiest_owner(muon, ranks):
        for (small, large), count in shapes.items():
            products = ((small, small, large), (small, small, small), (small, large, small))
            total += sum(matmul_seconds((count, *shape), "bf16", hardware, efficiency) for shape in products)
    return muon.iterations * total


def rounds(muon: Orthogonalization, ranks: int) -> int:
    return len(busiest_owner(muon, ranks)) if muon.matrices else 0


def update_bytes(muon: Orthogonalization, ranks: int, held: int, message: int = MESSAGE_BYTES) -> int:
    """Memory of the update, beside the state, on a rank that updates `held` elements of matrices.

    It has the momentum with Nesterov's step for all of them, and for one round the matrices that arrived, those that
    are computed, the results in two layouts, and the next round on its way.

    Args:
        message: bytes of an element in the messages.
    """
    if not muon.matrices:
        return 0
    own, count = busiest_owner(muon, ranks), rounds(muon, ranks)
    sizes = [[n * small * large for (small, large), n in shapes.items()] for shapes in own]
    owned = max(map(sum, sizes))
    # A batch of equal shapes is computed from a copy, into a new one.
    batch = max(max(size) for size in sizes)
    part = math.ceil(held / count)
    coming = owned + part if count > 1 else 0
    converted = 4 * part if message < 4 else 0
    replicas = max(1, round(held * ranks / muon.elements))  # a result goes to each of them
    computing, returning = owned + 2 * batch, (1 + replicas) * owned + part
    return 4 * held + message * (coming + max(owned + computing, returning)) + converted
