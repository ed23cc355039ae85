"""The time of collectives over two tiers of links: NVLink within a node, a network between nodes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sfd_scale.planning.efficiency import Efficiency
from sfd_scale.planning.hardware import Hardware

Phase = Literal["forward", "backward", "step"]


@dataclass(frozen=True)
class Group:
    """The ranks of a collective: `size` ranks, each `stride` ranks from the next, on nodes of `ranks_per_node`."""

    size: int
    ranks_per_node: int
    stride: int = 1

    @property
    def per_node(self) -> int:
        """Ranks of the group on one node."""
        return min(self.size, max(1, self.ranks_per_node // self.stride))

    @property
    def nodes(self) -> int:
        return math.ceil(self.size / self.per_node)


@dataclass(frozen=True)
class Collective:
    """Calls of one kind in a step.

    size: bytes of the whole tensors, in all `calls` together; of an all-to-all, what all ranks together have.
    overlapped: the engine runs it beside the computation of its phase.
    """

    kind: Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]
    phase: Phase
    size: float
    calls: int
    group: Group
    overlapped: bool

    @property
    def bytes_sent(self) -> float:
        """Bytes that each rank sends: by a ring (n - 1)/n of the tensor, twice for an all-reduce; in an all-to-all (n -
        1)/n of its own part."""
        once = (self.group.size - 1) / self.group.size * self.size
        return {"all_reduce": 2 * once, "all_to_all": once / self.group.size}.get(self.kind, once)


def link_bandwidth(group: Group, hardware: Hardware) -> float:
    """Bytes/s at which one rank of a ring can send: that of the slowest link.

    NCCL builds one ring for each network card. So the ranks of the group on a node share all their network cards.
    """
    return hardware.nvlink if group.nodes == 1 else min(hardware.nvlink, group.per_node * hardware.network)


def seconds(collective: Collective, hardware: Hardware, efficiency: Efficiency) -> float:
    """Time of all calls: the bytes at the speed of the slowest link, and the latency of the hops.

    A ring has one hop for each rank. For an all-reduce NCCL may take a tree, whose hops grow with the logarithm of the
    nodes.
    """
    group = collective.group
    if group.size == 1 or not collective.size:
        return 0.0
    near, far = efficiency.near_latency.value, efficiency.far_latency.value
    if collective.kind == "all_to_all":
        return _all_to_all_seconds(collective, hardware, efficiency)
    rounds = 2 if collective.kind == "all_reduce" else 1
    hops = (group.size - group.nodes) * near + (group.nodes * far if group.nodes > 1 else 0.0)
    latency = rounds * hops
    if collective.kind == "all_reduce" and group.nodes > 1:
        tree = 2 * (math.log2(group.nodes) * far + group.per_node * near)
        latency = min(latency, tree)
    transfer = collective.bytes_sent / (link_bandwidth(group, hardware) * efficiency.link.value)
    return transfer + collective.calls * (latency + efficiency.collective.value)


def _all_to_all_seconds(collective: Collective, hardware: Hardware, efficiency: Efficiency) -> float:
    """Every rank sends to each other one directly: within a node by NVLink, to other nodes by its own network card."""
    group = collective.group
    inside, outside = group.per_node - 1, group.size - group.per_node
    each = collective.bytes_sent / (group.size - 1)  # to one rank
    reached = efficiency.link.value
    transfer = max(each * inside / (hardware.nvlink * reached), each * outside / (hardware.network * reached))
    latency = inside * efficiency.near_latency.value + (efficiency.far_latency.value if outside else 0.0)
    return transfer + collective.calls * (latency + efficiency.collective.value)
