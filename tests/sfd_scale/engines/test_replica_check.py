"""Silent data corruption: any flipped bit in a replica is found, and its rank is named."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfd_scale.engines.replica_check import ReplicaError, check_replicas_agree, digests, disagreements, require_replicas
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import Spec, make_ema, make_engine, train


@given(st.integers(0, 58), st.integers(0, 31))
def test_any_single_bit_changes_the_digest(element: int, bit: int) -> None:
    tensor = torch.randn(59, generator=torch.Generator().manual_seed(0))
    flipped = tensor.clone()
    flipped.view(torch.int32)[element] ^= 1 << bit if bit < 31 else -(1 << 31)
    assert digests({"w": tensor}) != digests({"w": flipped})


def test_swapped_elements_change_the_digest() -> None:
    tensor = torch.randn(8, 16, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    assert digests({"w": tensor}) != digests({"w": tensor[torch.tensor([1, 0, *range(2, 8)])]})
    assert digests({"w": tensor}) == digests({"w": tensor.clone()})


def test_the_minority_is_named_in_its_group() -> None:
    good, bad = {"a": (1, 1), "b": (2, 2)}, {"a": (1, 1), "b": (9, 9)}
    assert disagreements([(0, good)] * 4) == []
    assert disagreements([(0, good), (0, good), (0, bad), (0, good)]) == ["rank 2 from the others in b"]
    assert disagreements([(0, good), (0, bad)]) == ["ranks 0, 1 from each other, without a majority, in b"]
    # Two groups of hybrid sharding have different shards, which are not compared.
    assert disagreements([(0, good), (1, bad), (0, good), (1, bad)]) == []


def corrupt(specs: dict[str, Spec], flip: bool = True) -> dict[str, str]:
    """Train, compare, flip one bit on the last rank, compare again; returns the errors by engine."""
    logging.disable(logging.INFO)
    out = {}
    for name, spec in specs.items():
        engine = make_engine(spec)
        train(engine, make_ema(engine), [0, 1])
        try:
            require_replicas(engine.replicas())
            check_replicas_agree(engine.replicas(), 2)
            tensors = engine.replicas().tensors
            if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
                last = list(tensors.values())[-1].detach().view(-1)
                last[-1:].view(torch.uint8)[0] ^= 1
            check_replicas_agree(engine.replicas(), 3)
            out[name] = "nothing"
        except (ValueError, ReplicaError) as error:
            out[name] = str(error)
        engine.close()
    return out


def check(results: dict[str, str], who: str) -> None:
    for name, text in results.items():
        if name == "fsdp":
            assert "no parameter is replicated on two ranks" in text
        else:
            assert text.startswith(f"step 3: replicas of parameters differ: {who} in tail.bias. "), (name, text)


FSDP = {
    "fsdp": Spec("fsdp"), "replicate": Spec("fsdp", {"sharding": "replicate"}),
    "bf16": Spec("fsdp", {"sharding": "replicate", "precision": "bf16"}),
}  # fmt: skip
ZERO: dict[str, Any] = {
    f"zero{stage} {precision}": Spec("deepspeed", {"zero_stage": stage, "precision": precision})
    for stage in range(4)
    for precision in ("fp32", "bf16")
    if (stage, precision) != (0, "bf16")
}


@pytest.mark.full
def test_a_flipped_bit_on_one_of_two_ranks_is_found() -> None:
    check(run_ranks(corrupt, 2, FSDP, timeout=300)[0], "ranks 0, 1 from each other, without a majority,")


@pytest.mark.full
def test_every_engine_names_the_rank_of_four() -> None:
    check(run_ranks(corrupt, 4, {**FSDP, **ZERO}, timeout=600)[0], "rank 3 from the others")


@pytest.mark.full
def test_hybrid_sharding_compares_within_its_groups() -> None:
    specs = {"hybrid": Spec("fsdp", {"sharding": "hybrid", "shard_size": 2})}
    assert "ranks 1, 3 from each other" in run_ranks(corrupt, 4, specs, timeout=300)[0]["hybrid"]
