"""The internal layer of LightningDiT and Internal Guidance: start values, keys, loss, and the guided velocity."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from sfd_scale.data.batches import LatentBatch
from sfd_scale.diffusion import losses
from sfd_scale.diffusion.conditioning import ClassLabels
from sfd_scale.diffusion.guidance import FlowOutput, InternalGuidance, guided, interval_discontinuities
from sfd_scale.diffusion.latents import LatentLayout
from sfd_scale.diffusion.schedule import Clocks, SemanticFirstSchedule
from sfd_scale.models.lightningdit import LightningDiT, LightningDiTConfig, initial_value
from sfd_scale.training.semantic_first import FlowDraw, SemanticFirstConfig, SemanticFirstObjective

LAYOUT = LatentLayout(texture_channels=3, semantic_channels=2, size=4)
LEAD = SemanticFirstSchedule(delta_t=0.3)
PLAIN = LightningDiTConfig(depth=3, width=32, heads=2, num_classes=5)
INTERNAL = dataclasses.replace(PLAIN, internal_depth=2)


def model(config: LightningDiTConfig) -> LightningDiT:
    net = LightningDiT(config, in_channels=LAYOUT.channels, input_size=LAYOUT.size, two_clocks=True)
    net.init_weights(0)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if "adaLN" in name or "_layer.linear" in name:
                weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    return net.eval()


def inputs(count: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(2)
    x = torch.randn(count, *LAYOUT.shape, generator=draws)
    texture, semantic = torch.rand(2, count, generator=draws)
    return x, texture, semantic, torch.arange(count) % 5


def test_the_internal_layer_changes_no_other_output_and_no_start_value() -> None:
    plain, internal = model(PLAIN), model(INTERNAL)
    own = internal.state_dict()
    added = own.keys() - plain.state_dict().keys()
    assert {name.split(".")[0] for name in added} == {"internal_layer"} and len(added) == 5
    assert all(torch.equal(own[name], value) for name, value in plain.state_dict().items())
    out, more = plain(*inputs()), internal(*inputs())
    assert len(out) == 2 and len(more) == 3
    assert torch.equal(out[0], more[0]) and more[2].shape == more[0].shape and more[2].dtype == torch.float32
    assert not initial_value("internal_layer.linear.weight", torch.Size((4, 4)), 0).any()


def test_the_internal_velocity_is_read_after_internal_depth_blocks() -> None:
    """A model of that depth, with the internal layer as its final layer, gives the same velocity."""
    deep = model(INTERNAL)
    short = model(dataclasses.replace(PLAIN, depth=2))
    weights = {name.replace("internal_layer", "final_layer"): value for name, value in deep.state_dict().items()
               if not name.startswith("final_layer")}  # fmt: skip
    short.load_state_dict({name: weights[name] for name in short.state_dict()})
    assert torch.equal(short(*inputs())[0], deep(*inputs())[2])
    deep.blocks[2].mlp.w3.weight.data += 1  # behind the internal layer
    assert torch.equal(short(*inputs())[0], deep(*inputs())[2])


def test_the_internal_loss_trains_the_internal_layer_with_its_weight() -> None:
    net, draws = model(INTERNAL), torch.Generator().manual_seed(4)
    latents = torch.randn(4, *LAYOUT.shape, generator=draws)
    batch = LatentBatch(latents=latents, labels=torch.arange(4), keys=torch.zeros(4, 2, dtype=torch.long))
    draw = FlowDraw(torch.randn(latents.shape, generator=draws), torch.rand(4, generator=draws) * 1.3, torch.arange(4))

    def terms(weight: float) -> Any:
        config = SemanticFirstConfig(alignment_weight=0, internal_weight=weight)
        return SemanticFirstObjective(config, LAYOUT, LEAD, ClassLabels(5), 0).loss(net, batch, draw)

    with_it, without = terms(0.5), terms(0.0)
    clocks = LEAD.clocks(draw.g)
    x = LAYOUT.per_channel(*clocks, like=latents)
    x = x * latents + (1 - x) * draw.noise
    weight = LAYOUT.per_channel(1.0, 2.0, like=latents)
    internal = net(x, clocks.texture, clocks.semantic, draw.condition)[2]
    expected = losses.velocity_loss(internal, latents - draw.noise, weight).mean()
    torch.testing.assert_close(with_it.total - without.total, 0.5 * expected)
    torch.testing.assert_close(with_it.terms["internal"], expected)
    with_it.total.backward()
    assert net.internal_layer is not None and net.internal_layer.linear.weight.grad is not None
    assert net.internal_layer.linear.weight.grad.abs().sum() > 0


class Counted:
    """A model with the velocities 3 and 1, which counts the samples that it is asked for."""

    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, x: Tensor, t_texture: Tensor, t_semantic: Tensor, y: Tensor, /) -> FlowOutput:
        self.rows += len(x)
        return torch.full_like(x, 3.0), None, torch.ones_like(x)


def test_internal_guidance_extrapolates_each_part_within_its_interval_and_costs_no_evaluation() -> None:
    config = InternalGuidance(
        scale_texture=1.5, scale_semantic=2.0, interval_start=0.2, interval_end=0.6, interval_mode="both"
    )
    net = Counted()
    velocity = guided(net, config, LAYOUT, internal=True)
    times = torch.tensor([0.1, 0.2, 0.5, 0.6])
    v = velocity(inputs()[0], Clocks(times, times.flip(0)), torch.zeros(4))
    texture, semantic = LAYOUT.split(v)
    assert texture[:, 0, 0, 0].tolist() == [3.0, 4.0, 4.0, 3.0] and net.rows == 4  # 1 + 1.5·(3 − 1)
    assert semantic[:, 0, 0, 0].tolist() == [3.0, 5.0, 5.0, 3.0]
    assert interval_discontinuities(config, LEAD) == pytest.approx((0.2, 0.5, 0.6, 0.9))
    everywhere = guided(net, InternalGuidance(scale_texture=1.5), LAYOUT, internal=True)
    assert everywhere(inputs()[0], Clocks(times, times), torch.zeros(4)).unique().tolist() == [4.0]


def test_a_model_without_an_internal_layer_and_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="kind internal needs a model with an internal layer"):
        guided(Counted(), InternalGuidance(), LAYOUT)
    for wrong in ({"interval_end": 0.5}, {"interval_end": 1.5}, {"interval_start": 0.5, "interval_end": 0.5}):
        with pytest.raises(ValueError, match="interval_end"):
            InternalGuidance(**{"interval_mode": "none" if len(wrong) == 1 else "both"} | wrong)  # type: ignore
    for depth in (0, 3):
        with pytest.raises(ValueError, match=f"internal_depth: {depth}; allowed: 1 to below"):
            dataclasses.replace(PLAIN, internal_depth=depth)
