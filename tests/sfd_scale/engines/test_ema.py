from __future__ import annotations

import pytest
import torch

from sfd_scale.engines.ema import EMA, EMAConfig, decay_at
from sfd_scale.engines.engine import Fragment


def fragments(flat: torch.Tensor, cuts: list[int]) -> list[Fragment]:
    """Views of a flat tensor, like the partitions of ZeRO."""
    moments = torch.zeros_like(flat)
    bounds = list(zip([0, *cuts], [*cuts, flat.numel()], strict=True))
    return [Fragment(f"p{a}", (b - a,), 0, flat[a:b], moments[a:b], moments[a:b], True) for a, b in bounds]


def test_warm_up_shortens_the_average_at_first() -> None:
    config = EMAConfig(decay=0.99, warmup=True)
    assert [decay_at(config, step) for step in (0, 1, 8, 10**6)] == [0.1, 2 / 11, 0.5, 0.99]
    assert decay_at(EMAConfig(decay=0.99), 0) == 0.99
    assert decay_at(EMAConfig(), 0) == 0.9999  # of the official code


@pytest.mark.parametrize("cuts", [[], [1], [3, 7, 8, 40]])
def test_average_follows_the_formula_for_any_fragments(cuts: list[int]) -> None:
    flat = torch.linspace(-1, 1, 64)
    ema = EMA(fragments(flat, cuts), EMAConfig(decay=0.9, warmup=True))
    expected = flat.double().clone()
    for step in range(30):
        flat += torch.sin(torch.arange(64.0) + step)
        ema.update(step)
        decay = decay_at(ema.config, step)
        expected = decay * expected + (1 - decay) * flat.double()
    assert (torch.cat(ema.tensors).double() - expected).abs().max() < 1e-6


def test_a_float32_average_changes_where_a_bf16_average_would_not() -> None:
    # Updates of 1e-4 of the difference: bf16 would round them away.
    flat = torch.full((8,), 1.0)
    ema = EMA(fragments(flat, []), EMAConfig(decay=0.9999))
    rounded = flat.bfloat16()
    flat += 0.25
    for step in range(1000):
        ema.update(step)
        rounded = rounded.lerp(flat.bfloat16(), 1e-4)
    assert torch.cat(ema.tensors)[0].item() == pytest.approx(1.25 - 0.25 * 0.9999**1000, rel=1e-5)
    assert rounded[0].item() == 1.0


def test_average_starts_from_a_copy_of_the_weights() -> None:
    flat = torch.ones(4)
    ema = EMA(fragments(flat, [2]), EMAConfig())
    flat.zero_()
    assert torch.equal(torch.cat(ema.tensors), torch.ones(4))


def test_a_rank_without_fragments_averages_nothing() -> None:
    EMA([], EMAConfig()).update(0)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_impossible_decay_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="^decay: "):
        EMAConfig(decay=decay)
