"""Gradients, three AdamW steps and their average against the arrays of the authors' training loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sfd_scale.data.batches import LatentBatch
from sfd_scale.diffusion.conditioning import ClassLabels
from sfd_scale.diffusion.latents import LatentLayout
from sfd_scale.diffusion.schedule import SemanticFirstSchedule
from sfd_scale.engines.ema import EMA, EMAConfig
from sfd_scale.engines.engine import Fragment
from sfd_scale.engines.optim import AdamWConfig, param_groups
from sfd_scale.training.objective import LossTerms
from sfd_scale.training.semantic_first import FlowDraw, SemanticFirstConfig, SemanticFirstObjective
from tests.helpers.golden_arrays import arrays, check, golden_model, relative_error, settings

inputs, golden = arrays("inputs"), arrays("out_train")
SCHEDULE = SemanticFirstSchedule(delta_t=settings["delta"])
BATCH = LatentBatch(inputs["x1"], inputs["y"], torch.zeros(len(inputs["y"]), 2, dtype=torch.long), inputs["feats"])
OBJECTIVE = SemanticFirstObjective(
    SemanticFirstConfig(alignment_weight=settings["transport"]["repa_weight"], alignment_mode="cos"),
    LatentLayout(
        texture_channels=settings["tex"], semantic_channels=settings["sem"], size=settings["main"]["input_size"]
    ),
    SCHEDULE,
    conditioning=ClassLabels(settings["main"]["num_classes"]),
    seed=0,
)


def loss(model: nn.Module, noise: Tensor, u: Tensor) -> LossTerms:
    return OBJECTIVE.loss(model, BATCH, FlowDraw(noise, SCHEDULE.time_from_uniform(u), BATCH.labels))


def norms(tensors: dict[str, Tensor]) -> Tensor:
    return torch.stack([tensors[name].detach().norm() for name in golden["grad_names"]])


def test_gradients() -> None:
    model = golden_model("main").train()
    loss(model, inputs["x0"], inputs["t"]).total.backward()
    grads = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    assert set(grads) == set(golden["grad_names"])
    check(norms(grads), "out_train", "grad_norms")
    for key in (key for key in golden if key.startswith("grad/")):
        check(grads[key.removeprefix("grad/")], "out_train", key)


class Trained:
    """The main model after three steps on the golden draws, its losses and its average."""

    def __init__(self) -> None:
        model = golden_model("main").train()
        self.params = dict(model.named_parameters())
        self.start = {name: param.detach().clone() for name, param in self.params.items()}
        config = AdamWConfig(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
        optimizer = torch.optim.AdamW(param_groups(model, config), lr=config.lr, betas=config.betas, eps=config.eps)
        # One process that holds every parameter whole; Adam's moments play no part in the average.
        fragments = [
            Fragment(name, tuple(p.shape), 0, p.detach().view(-1), torch.empty(0), torch.empty(0), primary=True)
            for name, p in self.params.items()
        ]
        ema = EMA(fragments, EMAConfig(decay=0.9))
        self.losses = []
        for step in range(3):
            terms = loss(model, inputs["train_x0"][step], inputs["train_t"][step])
            weighted = OBJECTIVE.config.alignment_weight * terms.terms["alignment"]
            self.losses.append(torch.stack([terms.terms["velocity"], terms.terms["cosine"], weighted]))
            terms.total.backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update(step)
        self.ema = {name: t.view_as(self.start[name]) for name, t in zip(self.params, ema.tensors, strict=True)}


@pytest.fixture(scope="module")
def trained() -> Trained:
    return Trained()


def test_losses_of_three_steps(trained: Trained) -> None:
    check(torch.stack(trained.losses), "out_train", "steps/losses")


@pytest.mark.parametrize("which", ["param", "ema"])
def test_weights_after_three_steps(trained: Trained, which: str) -> None:
    ours = {"param": trained.params, "ema": trained.ema}[which]
    moved = {name: ours[name].detach() - start for name, start in trained.start.items()}
    check(norms(moved), "out_train", f"steps/{which}_delta_norms")
    for key in (key for key in golden if key.startswith(f"steps/{which}/")):
        check(ours[key.removeprefix(f"steps/{which}/")], "out_train", key)


def test_the_average_is_not_the_weights(trained: Trained) -> None:
    name = "final_layer.linear.weight"
    assert relative_error(trained.ema[name], golden[f"steps/param/{name}"]) > 1e-3
