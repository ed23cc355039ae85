"""The order `window`: each sample once, lanes by place in the batch, few shards at the start, a node's own part;
the plan of shards that follows from an order."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sfd_scale.data.order import SampleOrder, ShardUses, block_order, num_lanes, window_order
from sfd_scale.data.prefetch import KEEP_STEPS, ShardSchedule, ranks_part
from sfd_scale.runtime.batch_split import BatchSplit

SIZES, GLOBAL, LANES, WINDOW = (40,) * 96 + (17, 3), 64, 16, 1024


def order(seed: int = 0, epoch: int = 0, window: int = WINDOW) -> Tensor:
    return window_order(seed, epoch, SIZES, GLOBAL, LANES, window)


def test_a_window_order_has_each_sample_at_most_once_and_fills_whole_batches() -> None:
    ids = order()
    assert len(ids) == sum(SIZES) // GLOBAL * GLOBAL and len(ids.unique()) == len(ids)
    assert ids.min() >= 0 and ids.max() < sum(SIZES)
    assert torch.equal(ids, order())
    for other in (order(seed=1), order(epoch=1), order(window=512)):
        assert not torch.equal(ids, other)
    left_out = [set(range(sum(SIZES))) - set(order(epoch=epoch).tolist()) for epoch in range(2)]
    assert left_out[0] != left_out[1]


def test_orders_stay_as_they_are() -> None:
    """A run that resumes under a later release has to read the rest of its epoch, and no sample twice."""
    sizes = (3, 2, 3, 3, 1, 3, 3, 3, 3)
    assert window_order(3, 1, sizes, 4, lanes=2, window=20).tolist() == [
        8, 9, 6, 5, 10, 2, 20, 15, 12, 1, 19, 7, 3, 0, 16, 18, 13, 11, 21, 17, 14, 4, 22, 23,
    ]  # fmt: skip
    assert block_order(3, 1, sizes, 8).tolist() == [
        9, 6, 11, 5, 10, 15, 7, 8, 17, 22, 19, 23, 16, 20, 21, 18, 12, 13, 0, 4, 14, 3, 2, 1,
    ]  # fmt: skip


def test_a_sample_stays_in_its_lane_in_every_epoch() -> None:
    lanes = [order(epoch=epoch).view(-1, LANES, GLOBAL // LANES) for epoch in range(3)]
    for lane in range(LANES):
        seen = [set(ids[:, lane].flatten().tolist()) for ids in lanes]
        assert len(seen[0] | seen[1] | seen[2]) <= math.ceil(sum(SIZES) / LANES)


def test_the_window_begins_with_one_shard_of_each_lane_and_grows() -> None:
    shards = np.searchsorted(np.cumsum(SIZES), order(window=sum(SIZES)).numpy(), side="right").reshape(-1, GLOBAL)
    first = len(np.unique(shards[0]))
    assert LANES <= first <= 2 * LANES  # a lane may begin with the small part of a divided shard
    uses = ShardUses.of(shards, len(SIZES))
    live = [int(((uses.first <= step) & (uses.last >= step)).sum()) for step in range(len(shards))]
    assert live[0] < live[4] < live[12] and max(live) > 3 * LANES


@pytest.mark.parametrize("window", [256, 1024])
def test_a_sample_moves_over_its_window_and_no_further(window: int) -> None:
    """In lane order, the shards that are mixed at one time span about the window; without it, one shard."""
    shards = np.searchsorted(np.cumsum(SIZES), order(window=window).numpy(), side="right").reshape(-1, GLOBAL)
    uses = ShardUses.of(shards, len(SIZES))
    middle = len(shards) // 2
    live = int(((uses.first <= middle) & (uses.last >= middle)).sum())
    in_lane = window / LANES / 40  # shards of a window
    assert LANES * in_lane <= live <= LANES * (in_lane + 3)


def test_nodes_read_their_part_of_the_data() -> None:
    nodes = 4
    split = BatchSplit(4, 2, 8)  # two accumulation steps, eight ranks: two per node
    read = []
    for node in range(nodes):
        parts = [ranks_part(order(epoch=epoch).view(-1, GLOBAL), split, 2 * node, 2) for epoch in range(3)]
        numbers = np.searchsorted(np.cumsum(SIZES), torch.cat(parts).numpy(), side="right")
        read.append(sum(SIZES[number] for number in np.unique(numbers)))
    assert max(read) <= 1.3 * sum(SIZES) / nodes  # 16 lanes divide up to 15 of 98 shards
    whole = torch.cat([ranks_part(order().view(-1, GLOBAL), split, rank) for rank in range(8)], 1)
    assert torch.equal(whole.sort(1).values, order().view(-1, GLOBAL).sort(1).values)


def test_lanes_divide_the_global_batch() -> None:
    assert [num_lanes(batch, 32) for batch in (256, 240, 8, 7, 37, 1000)] == [32, 30, 8, 7, 1, 25]


def schedule(rank: int = 0, node_ranks: int = 1) -> ShardSchedule:
    samples = SampleOrder(lambda epoch: order(epoch=epoch), GLOBAL, SIZES)
    shards = [(f"{number}.mds", 1000 * size) for number, size in enumerate(SIZES)]
    return ShardSchedule(samples, shards, BatchSplit(8, 2, 4), rank, node_ranks)


def test_the_plan_names_each_shard_at_the_first_step_that_needs_it() -> None:
    own = schedule(rank=1)
    steps = own.order.steps_per_epoch
    by_step = list(itertools.islice(own.plan(0, lambda step: step), 2 * steps))
    assert [step for step, _ in by_step] == list(range(2 * steps))
    plan = [(step, name) for step, names in by_step for name in names]
    for epoch in range(2):
        ids = ranks_part(own.order.epoch(epoch), own.split, 1)
        numbers = own.order.shards(ids)
        first = {f"{n}.mds": epoch * steps + int(np.argwhere((numbers == n).any(1))[0, 0]) for n in np.unique(numbers)}
        assert {name: step for step, name in plan if step // steps == epoch} == first


def test_the_next_use_of_a_shard_is_its_first_step_or_now_or_in_the_next_epoch() -> None:
    own = schedule(node_ranks=2)
    steps = own.order.steps_per_epoch
    numbers = [own.order.shards(ranks_part(own.order.epoch(epoch), own.split, 0, 2)) for epoch in range(2)]
    for own.step in (0, steps // 2, steps - 1):
        for name in ("3.mds", "50.mds", "97.mds"):
            n = int(name.split(".")[0])
            used = [step for step in np.argwhere((numbers[0] == n).any(1))[:, 0].tolist()]
            later = np.argwhere((numbers[1] == n).any(1))[:, 0].tolist()
            if used and own.step <= used[-1] + KEEP_STEPS:
                assert own.next_use(name) == max(used[0], own.step)
            else:
                assert own.next_use(name) == (steps + later[0] if later else math.inf)


def test_the_bytes_in_use_are_those_of_the_shards_that_overlap() -> None:
    uses = ShardUses(np.array([0.0, 1.0, 3.0, math.inf]), np.array([2.0, 2.0, 5.0, -1.0]))
    assert uses.most_bytes([10, 20, 25, 1000], margin=0) == 30
    assert uses.most_bytes([10, 20, 25, 1000], margin=1) == 55
    # Counted step by step, on one rank of four that does not read every shard.
    own, most = schedule(rank=3), 0
    for epoch in range(2):
        numbers = own.order.shards(ranks_part(own.order.epoch(epoch), own.split, 3))
        assert len(np.unique(numbers)) < len(SIZES)
        reads = {n: np.argwhere((numbers == n).any(1))[:, 0] for n in np.unique(numbers)}
        for step in range(len(numbers)):
            live = [n for n, steps in reads.items() if steps[0] <= step <= steps[-1] + KEEP_STEPS]
            most = max(most, sum(1000 * SIZES[n] for n in live))
    assert own.bytes_in_use() == most


def test_a_node_of_eight_reads_an_eighth_of_imagenet() -> None:
    sizes, split = (512,) * 2503, BatchSplit(4, 1, 64)
    numbers = [
        np.searchsorted(np.cumsum(sizes), ids.numpy(), side="right")
        for epoch in range(2)
        for ids in [ranks_part(window_order(0, epoch, sizes, 256, 32, 262_144).view(-1, 256), split, 8, 8)]
    ]
    assert len(np.unique(np.concatenate([own.flatten() for own in numbers]))) <= 1.1 / 8 * len(sizes)
