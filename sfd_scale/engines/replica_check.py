"""Silent data corruption: parameters that are copies of each other on several ranks must have the same bits.

Which those are follows from the sharding. ZeRO-0 and FSDP's replicate: all of them. Hybrid sharding: each shard, once
a group. ZeRO-1 and 2: the weights that forward uses, which every step gathers anew from the fp32 shards, so that a bit
that flips in them is seen only until then. ZeRO-3: the small parameters that it keeps whole. Full sharding: none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfd_scale.runtime import distributed

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReplicaError(FloatingPointError):
    """Copies of a parameter differ; the message names the ranks."""


@dataclass(frozen=True)
class Replicas:
    """What this rank holds a copy of: tensors by name, and `group`, the same number on all ranks with the same part."""

    tensors: Mapping[str, Tensor]
    group: int = 0


def digests(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Two sums over the bits of each tensor: exact in any order, changed by any single bit and by two rows that change
    places. One wait for the device in all."""
    if not tensors:
        return {}
    sums = []
    for tensor in tensors.values():
        bits = tensor.detach().contiguous().view(-1).view(_BITS[tensor.element_size()]).long()
        place = (
            torch.arange(len(bits), device=bits.device) % 65521 + 1
        )  # a prime, so that no period of a shape meets it
        sums.append(torch.stack([bits.sum(), (bits * place).sum()]))
    flat = torch.stack(sums).tolist()
    return {name: (first, second) for name, (first, second) in zip(tensors, flat, strict=True)}


def require_replicas(replicas: Replicas) -> None:
    """Refuse to check where there is nothing to check.

    Raises:
        ValueError: where no two ranks hold a copy of the same parameter.
    """
    groups = Counter(distributed.all_gather_object(replicas.group if replicas.tensors else -distributed.rank() - 1))
    if max(groups.values()) < 2:
        raise ValueError(
            "train.replica_check_every: under this engine and world size no two ranks hold copies of a parameter, so "
            "there is nothing to compare; set it to null"
        )


def check_replicas_agree(replicas: Replicas, step: int) -> None:
    """Compare the copies of all ranks. A collective: every rank calls it at the same step.

    Raises:
        ReplicaError: on all ranks, naming the tensors and the ranks that differ from most of the others.
    """
    problems = disagreements(distributed.all_gather_object((replicas.group, digests(replicas.tensors))))
    if problems:
        raise ReplicaError(
            f"step {step}: copies of parameters differ: {'; '.join(problems)}. A faulty device or memory is likely: "
            "take that machine out, and start again: the run goes on from its last checkpoint"
        )


def disagreements(by_rank: Sequence[tuple[int, dict[str, tuple[int, int]]]]) -> list[str]:
    """Who differs in what, from (group, digests) of every rank: the minority, or all of a group without a majority."""
    problems = []
    for group in sorted({group for group, _ in by_rank}):
        members = {rank: found for rank, (its, found) in enumerate(by_rank) if its == group}
        odd: dict[tuple[int, ...], list[str]] = {}
        for name in next(iter(members.values())):
            (common, most), *others = Counter(found[name] for found in members.values()).most_common()
            tied = bool(others) and others[0][1] == most
            ranks = tuple(rank for rank, found in members.items() if tied or found[name] != common)
            if ranks:
                odd.setdefault(ranks, []).append(name)
        for ranks, names in odd.items():
            who = ", ".join(map(str, ranks))
            if len(ranks) == len(members):
                problems.append(f"ranks {who} from each other, without a majority, in {_list(names)}")
            else:
                problems.append(f"rank {who} from the others in {_list(names)}")
    return problems


def _list(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
