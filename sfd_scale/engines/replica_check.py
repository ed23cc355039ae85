"""Detect silent data corruption: replicas of a parameter on several ranks must have the same bits.

The sharding decides which parameters are replicated. ZeRO-0 and FSDP replicate: all parameters. FSDP hybrid: each
shard, once per group. ZeRO-1 and ZeRO-2: the weights that forward uses. Each step gathers these anew from the fp32
shards, so a flipped bit can be seen only until then. ZeRO-3: the small parameters that it keeps whole. FSDP full: none.
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
    """Replicas of a parameter differ; the message names the ranks."""


@dataclass(frozen=True)
class Replicas:
    """This rank's replicated tensors by name. Ranks with the same `group` have replicas of the same tensors."""

    tensors: Mapping[str, Tensor]
    group: int = 0


def digests(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Two integer sums over the bits of each tensor, exact in any order. The host waits for the device once.

    A flipped bit changes the first sum. Swapped rows change the second, which weights elements by their position.
    """
    if not tensors:
        return {}
    sums = []
    for tensor in tensors.values():
        bits = tensor.detach().contiguous().view(-1).view(_BITS[tensor.element_size()]).long()
        # A prime period, so that no dimension of a shape is a multiple of it.
        position = torch.arange(len(bits), device=bits.device) % 65521 + 1
        sums.append(torch.stack([bits.sum(), (bits * position).sum()]))
    flat = torch.stack(sums).tolist()
    return {name: (first, second) for name, (first, second) in zip(tensors, flat, strict=True)}


def require_replicas(replicas: Replicas) -> None:
    """Raise ValueError if no two ranks have replicas of the same parameter: there would be nothing to check."""
    groups = Counter(distributed.all_gather_object(replicas.group if replicas.tensors else -distributed.rank() - 1))
    if max(groups.values()) < 2:
        raise ValueError(
            "train.replica_check_every: no parameter is replicated on two ranks with this engine and world size, so "
            "there is nothing to compare; set it to null"
        )


def check_replicas_agree(replicas: Replicas, step: int) -> None:
    """Compare the replicas of all ranks. A collective: every rank calls it at the same step.

    Raises:
        ReplicaError: on all ranks, naming the tensors and the ranks that differ from the majority.
    """
    problems = disagreements(distributed.all_gather_object((replicas.group, digests(replicas.tensors))))
    if problems:
        raise ReplicaError(
            f"step {step}: replicas of parameters differ: {'; '.join(problems)}. This is silent data corruption, by a "
            "faulty device or memory. Remove that machine and start the run again; it resumes from its last checkpoint"
        )


def disagreements(by_rank: Sequence[tuple[int, dict[str, tuple[int, int]]]]) -> list[str]:
    """Describe which ranks differ in which tensors, given (group, digests) of every rank.

    The ranks are the minority of a group, or the whole group if it has no majority.
    """
    problems = []
    for group in sorted({group for group, _ in by_rank}):
        members = {rank: sums for rank, (rank_group, sums) in enumerate(by_rank) if rank_group == group}
        odd: dict[tuple[int, ...], list[str]] = {}
        for name in next(iter(members.values())):
            (common, most), *others = Counter(sums[name] for sums in members.values()).most_common()
            tied = bool(others) and others[0][1] == most
            ranks = tuple(rank for rank, sums in members.items() if tied or sums[name] != common)
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
