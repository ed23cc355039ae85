"""FSDP2 in units of several blocks: the same numbers and names with fewer collectives, as the planner counts them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sfd_scale.engines.fsdp import FSDPConfig
from sfd_scale.engines.fsdp_units import UNIT_BYTES, units_of
from sfd_scale.models.lightningdit import SIZES, Block, LightningDiTConfig
from sfd_scale.planning.costs import collectives
from sfd_scale.planning.footprint import trace
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import Spec, TinyModel, make_ema, make_engine, params, plain, relative, train, whole

STEPS = 4
# Blocks per unit → units of the three blocks of TinyModel.
UNITS = {1: 3, 2: 2, "auto": 1}


def bytes_of(size: str) -> list[int]:
    """Of each block of a published size, in bf16."""
    with torch.device("meta"):
        block = Block(LightningDiTConfig(size=size))  # type: ignore[arg-type]
    return [2 * sum(p.numel() for p in block.parameters())] * SIZES[size].depth


@pytest.mark.parametrize(
    ("size", "expected"),
    [("S", [12]), ("B", [6, 6]), ("L", [4] * 6), ("XL", [3, 3, 2, 3, 3, 3, 3, 2, 3, 3]), ("XXL", [2] * 12)],
)
def test_units_have_128_mib_or_all_blocks(size: str, expected: list[int]) -> None:
    sizes = bytes_of(size)
    units = units_of(range(len(sizes)), sizes, "auto")
    assert [len(unit) for unit in units] == expected
    assert [index for unit in units for index in unit] == list(range(len(sizes)))
    if len(units) > 1:
        assert max(expected) * sizes[0] >= 0.9 * UNIT_BYTES > 0.9 * (max(expected) - 1) * sizes[0]


def test_a_number_of_blocks_is_taken_as_given() -> None:
    assert units_of("abcde", [1] * 5, 2) == [["a", "b"], ["c"], ["d", "e"]]
    assert units_of("abcde", [10**12] * 5, 9) == [["a", "b", "c", "d", "e"]]
    assert units_of("", [], "auto") == []
    for wanted in (0, -1):
        with pytest.raises(ValueError, match=rf"blocks_per_unit: {wanted}; allowed: 1 and up, or auto"):
            FSDPConfig(blocks_per_unit=wanted)


def _counted(name: str, calls: Counter[str]) -> Callable[..., Any]:
    real = getattr(dist, name)

    def call(*arguments: Any, **options: Any) -> Any:
        calls[name] += 1
        return real(*arguments, **options)

    return call


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "resharded": (1, {"reshard_after_forward": True}),
    "whole weights, checkpointed, accumulated, bf16": (
        2, {"reshard_after_forward": False, "activation_checkpointing": "block", "precision": "bf16"},
    ),
}  # fmt: skip


def measured() -> dict[str, dict[Any, dict[str, Any]]]:
    logging.disable(logging.INFO)
    calls = Counter[str]()
    for name in ("all_gather_single", "reduce_scatter_single"):
        setattr(dist, name, _counted(name, calls))
    out: dict[str, dict[Any, dict[str, Any]]] = {case: {} for case in CASES}
    for case, (grad_accum_steps, options) in CASES.items():
        for wanted in UNITS:
            engine = make_engine(Spec("fsdp", {"blocks_per_unit": wanted, **options}))
            ema = make_ema(engine)
            calls.clear()
            found: dict[str, Any] = train(engine, ema, range(STEPS), grad_accum_steps)
            found |= {"calls": dict(calls), "names": [f.name for f in engine.fragments()]}
            out[case][wanted] = found | {"params": params(engine), "ema": whole(engine.fragments(), ema.tensors)}
            engine.close()
    return out


@pytest.fixture(scope="module")
def two() -> dict[str, dict[Any, dict[str, Any]]]:
    return run_ranks(measured, 2)[0]


@pytest.mark.parametrize("case", CASES)
def test_units_change_no_bit_and_no_name(case: str, two: dict[str, dict[Any, dict[str, Any]]]) -> None:
    one, bound = two[case][1], 2e-3 if "bf16" in case else 1e-6
    assert relative(one["loss"], plain(STEPS)["loss"]) < bound
    for wanted in UNITS:
        other = two[case][wanted]
        for key in ("loss", "norm", "names"):
            assert other[key] == one[key], (wanted, key)
        for key in ("params", "ema"):
            assert all(torch.equal(other[key][name], value) for name, value in one[key].items()), (wanted, key)


@pytest.mark.parametrize("case", CASES)
def test_collectives_are_as_many_as_units_and_as_planned(case: str, two: dict[str, dict[Any, dict[str, Any]]]) -> None:
    grad_accum_steps, options = CASES[case]
    model = trace(lambda: TinyModel(), None, options.get("precision", "fp32"))
    for wanted, units in UNITS.items():
        engine = FSDPConfig(blocks_per_unit=wanted, **options)  # type: ignore[arg-type]
        planned = Counter[str]()
        for collective in collectives(model, engine, ranks=2, ranks_per_node=2, grad_accum_steps=grad_accum_steps):
            planned[f"{collective.kind}_single"] += STEPS * collective.calls
        assert planned["reduce_scatter_single"] == STEPS * (units + 1)
        if options["reshard_after_forward"]:
            # The plan gathers all units twice. FSDP2 keeps the weights outside of blocks for the backward pass.
            planned["all_gather_single"] -= STEPS * grad_accum_steps
        assert two[case][wanted]["calls"] == planned, wanted
