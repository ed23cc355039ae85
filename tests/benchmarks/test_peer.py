"""The baseline of the benchmarks does the same work as the project: same weights, same velocity, loss and steps."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks import peer
from benchmarks.train_step import LAYOUT, batch_of, our_model, randomize
from sfd_scale.diffusion.conditioning import ClassLabels
from sfd_scale.diffusion.fixed_step import FixedStepConfig
from sfd_scale.diffusion.guidance import AutoGuidance, NoGuidance, guided
from sfd_scale.diffusion.samplers import sample
from sfd_scale.diffusion.schedule import SemanticFirstSchedule
from sfd_scale.models.lightningdit import LightningDiT
from sfd_scale.training.semantic_first import FlowDraw, SemanticFirstConfig, SemanticFirstObjective

SCHEDULE = SemanticFirstSchedule(delta_t=peer.DELTA_T)


@pytest.fixture(scope="module")
def models() -> tuple[LightningDiT, peer.Peer]:
    ours, theirs = our_model("S", depth=2), peer.Peer("S", depth=2)
    randomize(ours)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def test_a_training_step_is_that_of_the_objective(models: tuple[LightningDiT, peer.Peer]) -> None:
    ours, theirs = copy.deepcopy(models)
    batch = batch_of(2)
    u = torch.tensor([0.3, 0.9])
    draw = FlowDraw(torch.randn_like(batch.latents), u * SCHEDULE.end, batch.labels)
    objective = SemanticFirstObjective(SemanticFirstConfig(), LAYOUT, SCHEDULE, ClassLabels(peer.NULL_LABEL), seed=0)
    expected = objective.loss(ours, batch, draw).total
    expected.backward()
    theirs.train()
    loss = peer.peer_loss(theirs, batch.latents, batch.features, batch.labels, draw.noise, u)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("guided_by", ["nothing", "a guidance model"])
@torch.no_grad()
def test_euler_is_that_of_the_sampler(models: tuple[LightningDiT, peer.Peer], guided_by: str) -> None:
    ours, theirs = models
    noise, labels = torch.randn(1, *LAYOUT.shape), torch.tensor([3])
    if guided_by == "nothing":
        velocity, field = guided(ours, NoGuidance(), LAYOUT), peer.field(theirs, labels)
    else:
        guide = our_model("S", depth=1)
        randomize(guide)
        their_guide = peer.Peer("S", depth=1)
        their_guide.load_state_dict(guide.state_dict())
        config = AutoGuidance(scale_texture=1.5, scale_semantic=1.5)
        velocity = guided(ours, config, LAYOUT, guide=guide)
        field = peer.field(theirs, labels, their_guide, scale=1.5)
    expected = sample(velocity, noise, labels, SCHEDULE, LAYOUT, FixedStepConfig(num_steps=5)).x
    torch.testing.assert_close(peer.euler(field, noise, 5)[-1], expected, rtol=1e-4, atol=1e-4)
