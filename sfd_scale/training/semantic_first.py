"""The objective of Semantic-First Diffusion: flow matching of composite latents (arXiv 2512.04926).

N batch · C channels · H, W latent or feature grid · D feature channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sfd_scale.data.batches import FlowDraws, LatentBatch
from sfd_scale.diffusion import losses, path
from sfd_scale.diffusion.conditioning import Conditioning
from sfd_scale.diffusion.latents import LatentLayout
from sfd_scale.diffusion.losses import AlignmentMode
from sfd_scale.diffusion.schedule import SemanticFirstSchedule, logit_normal
from sfd_scale.runtime import seeding
from sfd_scale.runtime.settings import at_least
from sfd_scale.training.objective import LossTerms, sample_keys


@dataclass(frozen=True, kw_only=True)
class SemanticFirstConfig:
    """Loss of a sample = weighted mean square + cosine_weight·cosine + alignment_weight·alignment + internal_weight ·
    the weighted mean square of the internal velocity, for Internal Guidance (arXiv 2512.24176, with a weight of 0.5).

    `alignment_weight` 0 trains without alignment; above 0 the data needs features and the model an alignment head.
    """

    kind: Literal["semantic_first"] = "semantic_first"
    semantic_weight: float = 2.0
    cosine_weight: float = 1.0
    alignment_weight: float = 1.0
    alignment_mode: AlignmentMode = "cos"
    label_dropout: float = 0.1
    internal_weight: float = 0.0

    def __post_init__(self) -> None:
        at_least(self, semantic_weight=0, cosine_weight=0, alignment_weight=0, internal_weight=0)
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout: {self.label_dropout}; allowed: from 0 to below 1")


@dataclass(frozen=True)
class FlowDraw:
    """What chance decides for a batch: noise (N, C, H, W), global times g (N,), labels with some dropped (N,)."""

    noise: Tensor
    g: Tensor
    condition: Tensor


class SemanticFirstObjective:
    """Flow matching of the composite latent with two clocks (arXiv 2512.04926).

    The model is called as model(x, t_texture, t_semantic, y) and returns (velocity, projected features or None).

    Args:
        features: makes the alignment features of a batch (N, D, H, W); None takes those that it brings.
    """

    def __init__(
        self,
        config: SemanticFirstConfig,
        layout: LatentLayout,
        schedule: SemanticFirstSchedule,
        conditioning: Conditioning,
        seed: int,
        features: Callable[[LatentBatch], Tensor] | None = None,
    ) -> None:
        self.config, self.layout, self.schedule = config, layout, schedule
        self.conditioning, self.seed, self.features = conditioning, seed, features

    def __call__(self, model: Callable[..., Any], batch: LatentBatch, /) -> LossTerms:
        return self.loss(model, batch, self.draw(batch))

    def prepare(self, batch: LatentBatch, /) -> LatentBatch:
        """Make the draws of a batch before its step; page-locked where there is a GPU."""
        draws = self._draws(batch)
        if torch.cuda.is_available():
            draws = draws.map(Tensor.pin_memory)
        return dataclasses.replace(batch, draws=draws)

    def draw(self, batch: LatentBatch) -> FlowDraw:
        """Noise, logit-normal times and dropped labels, from each sample's own generators."""
        device = batch.latents.device
        draws = self._draws(batch) if batch.draws is None else batch.draws
        noise, g = (part.to(device, non_blocking=True) for part in (draws.noise, draws.g))
        return FlowDraw(noise, g, self.conditioning.dropped(batch.labels, draws.dropped))

    def _draws(self, batch: LatentBatch) -> FlowDraws:
        keys = sample_keys(batch.keys)
        noise = seeding.normal(self.seed, "noise", keys, batch.latents.shape[1:])
        u = logit_normal(seeding.normal(self.seed, "time", keys, ()))
        dropped = seeding.uniform(self.seed, "label_drop", keys) < self.config.label_dropout
        return FlowDraws(noise, self.schedule.time_from_uniform(u), dropped)

    def loss(self, model: Callable[..., Any], batch: LatentBatch, draw: FlowDraw) -> LossTerms:
        """The loss for given draws; float32 whatever the model computes in.

        Raises:
            ValueError: if alignment is on and the features or the model's alignment head are missing.
        """
        clocks = self.schedule.clocks(draw.g)
        x = path.interpolate(draw.noise, batch.latents, self.layout.per_channel(*clocks, like=batch.latents))
        target = path.velocity(draw.noise, batch.latents)
        predicted, projected, *internal = model(x, clocks.texture, clocks.semantic, draw.condition)
        predicted = predicted.float()
        weight = self.layout.per_channel(1.0, self.config.semantic_weight, like=target)
        velocity = losses.velocity_loss(predicted, target, weight)
        cosine = losses.cosine_loss(predicted, target)
        per_sample = velocity + self.config.cosine_weight * cosine
        parts = {"velocity": velocity, **self._part_losses(predicted, target), "cosine": cosine}
        if self.config.alignment_weight > 0:
            features = batch.features if self.features is None else self.features(batch)
            alignment = self._alignment(projected, features)
            per_sample = per_sample + self.config.alignment_weight * alignment
            parts["alignment"] = alignment
        if self.config.internal_weight > 0:
            parts["internal"] = losses.velocity_loss(internal[0].float(), target, weight)
            per_sample = per_sample + self.config.internal_weight * parts["internal"]
        total = per_sample.mean()
        terms = {"loss": total.detach(), **{name: value.detach().mean() for name, value in parts.items()}}
        return LossTerms(total, terms, self.schedule.progress(draw.g), per_sample.detach())

    def _part_losses(self, predicted: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The unweighted mean square of each part that has channels, (N,) each."""
        texture, semantic = zip(self.layout.split(predicted.detach()), self.layout.split(target), strict=True)
        parts = {"velocity_texture": texture, "velocity_semantic": semantic}
        return {name: losses.velocity_loss(*pair) for name, pair in parts.items() if pair[0].numel()}

    def _alignment(self, projected: Tensor | None, features: Tensor | None) -> Tensor:
        if features is None:
            raise ValueError(
                "objective.alignment_weight: above 0, but the data holds no alignment features; encode it with "
                "store.features=shards, set data.features to online or decoded, or objective.alignment_weight to 0"
            )
        if projected is None:
            raise ValueError(
                "objective.alignment_weight: above 0, but the model has no alignment head; set model.alignment, or "
                "objective.alignment_weight to 0"
            )
        return losses.alignment_loss(projected.float(), features.float(), self.config.alignment_mode)
