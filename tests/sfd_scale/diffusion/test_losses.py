"""Path and losses: closed forms, and golden losses of the official code from its own predictions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sfd_scale.diffusion import path
from sfd_scale.diffusion.latents import LatentLayout
from sfd_scale.diffusion.losses import alignment_loss, cosine_loss, velocity_loss
from sfd_scale.diffusion.schedule import SemanticFirstSchedule
from tests.helpers.golden_arrays import arrays, check, settings

INPUTS, LOSS = arrays("inputs"), arrays("out_loss")
LAYOUT = LatentLayout(
    texture_channels=settings["tex"], semantic_channels=settings["sem"], size=settings["main"]["input_size"]
)


def test_golden_noised_latents() -> None:
    schedule = SemanticFirstSchedule(delta_t=settings["delta"])
    clocks = schedule.clocks(schedule.time_from_uniform(INPUTS["t"]))
    x = path.interpolate(INPUTS["x0"], INPUTS["x1"], LAYOUT.per_channel(*clocks, like=INPUTS["x1"]))
    check(x, "out_loss", "xt", 1e-6)


@pytest.mark.parametrize(("weight", "name"), [(settings["transport"]["semantic_weight"], "loss_sw"), (1.0, "loss_sw1")])
def test_golden_velocity_loss(weight: float, name: str) -> None:
    target = path.velocity(INPUTS["x0"], INPUTS["x1"])
    loss = velocity_loss(LOSS["pred"], target, LAYOUT.per_channel(1.0, weight, like=target))
    check(loss, "out_loss", name)


def test_golden_cosine_loss() -> None:
    loss = cosine_loss(LOSS["pred"], path.velocity(INPUTS["x0"], INPUTS["x1"]))
    check(loss, "out_loss", "cos_loss")


def test_the_path_connects_noise_and_data_with_constant_velocity() -> None:
    noise, data = torch.tensor([1.0]), torch.tensor([5.0])
    assert (
        path.interpolate(noise, data, torch.tensor(0.0)) == 1 and path.interpolate(noise, data, torch.tensor(1.0)) == 5
    )
    assert path.interpolate(noise, data, torch.tensor(0.25)) == 2 and path.velocity(noise, data) == 4


def test_the_velocity_loss_does_not_divide_by_its_weights() -> None:
    predicted, target = torch.ones(2, 3, 2, 2), torch.zeros(2, 3, 2, 2)
    weight = torch.tensor([1.0, 1.0, 2.0])[:, None, None]
    torch.testing.assert_close(velocity_loss(predicted, target, weight), torch.full((2,), 4 / 3))


def test_cosine_is_over_channels_at_each_place() -> None:
    predicted, target = torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)
    predicted[0, :, 0, 0], target[0, :, 0, 0] = torch.tensor([1.0, 0.0]), torch.tensor([3.0, 0.0])  # same direction
    predicted[0, :, 0, 1], target[0, :, 0, 1] = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])  # at a right angle
    assert cosine_loss(predicted, target).item() == pytest.approx(0.5)


def tokens_of(features: Tensor) -> Tensor:
    return features.flatten(2).transpose(1, 2).contiguous()


def test_alignment_compares_tokens_in_row_order() -> None:
    features = torch.randn(2, 6, 3, 4, generator=torch.Generator().manual_seed(0))
    tokens = tokens_of(features)
    assert alignment_loss(2 * tokens, features, "cos").abs().max() < 1e-6
    torch.testing.assert_close(alignment_loss(tokens + 3, features, "mse"), torch.full((2,), 9.0))
    torch.testing.assert_close(alignment_loss(-tokens, features, "cos"), torch.full((2,), 2.0))
    both = alignment_loss(-tokens, features, "cos_mse")
    torch.testing.assert_close(both, (2 + alignment_loss(-tokens, features, "mse")) / 2)
    # Column-major order does not match the tokens.
    assert alignment_loss(tokens_of(features.transpose(2, 3)), features, "cos").min() > 0.1


def test_alignment_of_other_shapes_says_what_to_change() -> None:
    with pytest.raises(ValueError, match=r"\(1, 4, 6\).*\(1, 16, 6\).*patch size"):
        alignment_loss(torch.zeros(1, 16, 6), torch.zeros(1, 6, 2, 2), "cos")
