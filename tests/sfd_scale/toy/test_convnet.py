"""The small convnet: shapes, start values, precision, and that it learns."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.nn import functional

from sfd_scale.toy.convnet import SmallConvNet, SmallConvNetConfig, config_of

SMALL = SmallConvNetConfig(widths=(8, 16, 24), num_classes=4, image_size=16)


def made(config: SmallConvNetConfig, seed: int = 0) -> SmallConvNet:
    model = SmallConvNet(config)
    model.init_weights(seed)
    return model


def images(count: int, size: int, seed: int = 0) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=draws)


def test_shapes() -> None:
    features = made(SmallConvNetConfig())(images(2, 32))
    assert features.grid.shape == (2, 128, 4, 4) and SmallConvNetConfig().grid == 4
    assert torch.equal(features.pooled, features.grid.mean((2, 3)))
    assert features.logits.shape == (2, 10)


def test_features_have_unit_scale_at_each_position_and_do_not_depend_on_the_batch() -> None:
    model, batch = made(SMALL), images(3, 16)
    whole = model(batch)
    torch.testing.assert_close(whole.grid.mean(1), torch.zeros(3, 2, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(whole.grid.var(1, correction=0), torch.ones(3, 2, 2), atol=1e-3, rtol=0)
    for both, alone in zip(whole, model(batch[1:2]), strict=True):
        torch.testing.assert_close(both[1:2], alone)
    assert torch.equal(model.train()(batch).logits, model.eval()(batch).logits)


def test_signals_neither_fade_nor_grow_at_the_start() -> None:
    logits = made(SmallConvNetConfig())(images(64, 32)).logits
    assert 0.05 < logits.std().item() < 3


def test_start_values_depend_on_seed_and_name_alone() -> None:
    first, same, other = made(SMALL, 3), made(SMALL, 3), made(SMALL, 4)
    assert torch.equal(first.blocks[0].conv.weight, same.blocks[0].conv.weight)
    assert not torch.equal(first.blocks[0].conv.weight, other.blocks[0].conv.weight)
    assert not torch.equal(first.blocks[0].conv.weight, first.blocks[1].conv.weight)
    assert first.blocks[1].conv.weight.std().item() == pytest.approx((2 / (16 * 9)) ** 0.5, rel=0.05)


def test_bfloat16_weights() -> None:
    model = made(SMALL)
    exact = model(images(2, 16))
    rough = model.to(torch.bfloat16)(images(2, 16))
    assert all(part.dtype == torch.float32 for part in rough)
    assert 1e-5 < ((rough.logits - exact.logits).norm() / exact.logits.norm()).item() < 5e-2


def test_it_learns_a_texture() -> None:
    """Horizontal against vertical stripes of random phase: 40 steps from chance to nearly all right."""
    model, draws = made(dataclasses.replace(SMALL, num_classes=2)), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    accuracy = 0.0
    for _ in range(40):
        labels = torch.randint(0, 2, (32,), generator=draws)
        phase = torch.randint(0, 4, (32, 1, 1), generator=draws)
        stripes = ((torch.arange(16) + phase) // 2 % 2).expand(32, 16, 16)
        stripes = torch.where(labels[:, None, None].bool(), stripes, stripes.mT)
        batch = (stripes[:, None] * 200).expand(-1, 3, -1, -1).to(torch.uint8)
        logits = model(batch).logits
        optimizer.zero_grad()
        functional.cross_entropy(logits, labels).backward()
        optimizer.step()
        accuracy = (logits.argmax(1) == labels).float().mean().item()
    assert accuracy > 0.95


def test_settings_follow_from_the_weights() -> None:
    assert config_of(made(SMALL).state_dict(), 16) == SMALL
    with pytest.raises(ValueError, match="not the weights of a convnet"):
        config_of({"encoder.0.weight": torch.zeros(1)}, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"widths": ()}, "widths: "), ({"widths": (8, 9)}, "widths: "), ({"num_classes": 1}, "num_classes: 1"),
     ({"image_size": 20}, "image_size: 20")],
)  # fmt: skip
def test_settings_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SmallConvNetConfig(**changes)
