"""Where a lead of semantics gains or loses: losses of texture by what is known of the semantics, and an oracle.

N pictures · C channels · h, w grid.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from eval.features.make import make_extractor
from eval.generate import load_model
from eval.metrics.frechet import frechet_distance
from eval.metrics.moments import moments
from eval.recipe import EvalRecipe
from eval.reference import load_reference
from eval.study.recipe import LeadConfig
from eval.study.semantics import read_latents
from sfd_scale.diffusion import losses, path
from sfd_scale.diffusion.guidance import FlowModel, NoGuidance, Velocity, guided
from sfd_scale.diffusion.latents import LatentLayout
from sfd_scale.diffusion.samplers import SamplerConfig, sample
from sfd_scale.diffusion.schedule import Clocks, SemanticFirstSchedule
from sfd_scale.runtime import seeding

logger = logging.getLogger(__name__)
TIMES = tuple(n / 10 for n in range(1, 10))
BATCH = 100
Part = Literal["texture", "semantic"]


@dataclass(frozen=True)
class Pictures:
    """latents (N, C, h, w), normalised; labels (N,); noise (N, C, h, w)."""

    latents: Tensor
    labels: Tensor
    noise: Tensor

    @classmethod
    def of(cls, latents: Tensor, labels: Tensor, seed: int = 0) -> Pictures:
        """Pictures with noise of their own: that of picture i depends on (seed, i)."""
        keys = [(index,) for index in range(len(labels))]
        return cls(latents, labels, seeding.normal(seed, "lead_noise", keys, latents.shape[1:]))

    def first(self, count: int) -> Pictures:
        return Pictures(self.latents[:count], self.labels[:count], self.noise[:count])

    def with_semantics_of_others(self, layout: LatentLayout) -> Pictures:
        """The same textures and noise, each with the semantics of the next picture of its class."""
        texture, semantic = layout.split(self.latents)
        other = torch.arange(len(self.labels))
        for label in self.labels.unique():
            own = (self.labels == label).nonzero().flatten()
            other[own] = own.roll(1)
        return Pictures(layout.join(texture, semantic[other]), self.labels, self.noise)


@torch.no_grad()
def part_loss(
    model: FlowModel, pictures: Pictures, layout: LatentLayout, schedule: SemanticFirstSchedule, part: Part,
    time: float, shown: Pictures | None = None,
) -> float:  # fmt: skip
    """The mean square error of the velocity of a part when its clock is at `time`.

    The clock of the other part is at its place on the schedule.

    Args:
        shown: the semantics that the model sees; by default those of the pictures.
    """
    shown = pictures if shown is None else shown
    semantic, texture = schedule.inverse_clock(time)
    g = torch.tensor(semantic if part == "semantic" else texture)
    total = 0.0
    for rows in torch.arange(len(pictures.labels)).split(BATCH):
        clocks = Clocks(*(clock.expand(len(rows)) for clock in schedule.clocks(g)))
        times = layout.per_channel(*clocks, like=pictures.latents)
        x = path.interpolate(shown.noise[rows], shown.latents[rows], times)
        predicted = model(x, clocks.texture, clocks.semantic, pictures.labels[rows])[0]
        target = path.velocity(pictures.noise[rows], pictures.latents[rows])
        parts = (layout.split(values) for values in (predicted.float(), target))
        total += float(losses.velocity_loss(*(both[part == "semantic"] for both in parts)).sum())
    return total / len(pictures.labels)


def sample_textures(
    model: FlowModel, pictures: Pictures, layout: LatentLayout, schedule: SemanticFirstSchedule, sampler: SamplerConfig,
    *, oracle: bool,
) -> Tensor:  # fmt: skip
    """Latents (N, C, h, w) from the noise of the pictures, for their labels. With the oracle, use their texture alone.

    Args:
        oracle: the model sees the semantics of the pictures on their path at every step, in place of its own.
    """
    out = []
    for rows in torch.arange(len(pictures.labels)).split(BATCH):
        velocity, noise = guided(model, NoGuidance(), layout), pictures.noise[rows]
        if oracle:
            velocity = _given_semantics(velocity, noise, pictures.latents[rows], layout)
        out.append(sample(velocity, noise, pictures.labels[rows], schedule, layout, sampler).x)
    return torch.cat(out)


def _given_semantics(velocity: Velocity, noise: Tensor, latents: Tensor, layout: LatentLayout) -> Velocity:
    """The velocity where the semantics of x are those of `latents` on the path from `noise`, both (N, C, h, w)."""

    def given(x: Tensor, t: Clocks, y: Tensor) -> Tensor:
        on_path = path.interpolate(noise, latents, layout.per_channel(*t, like=x))
        return velocity(layout.join(layout.split(x)[0], layout.split(on_path)[1]), t, y)

    return given


def examine(weights: Path, settings: LeadConfig, evaluation: EvalRecipe) -> dict[str, Any]:
    """The losses of each part by its clock, and FID with the model's own and with true semantics.

    losses: of texture, with the `own` semantics of a picture and with those of `another` picture of its class.
    semantic_losses: of the semantics; without semantic channels there are none.
    fid: `own`, ordinary sampling; `oracle`, with true semantics; `pictures`, of the encoded pictures themselves.
        All have the same noise and labels. Without semantic channels there is neither `another` nor `oracle`.
    """
    device = torch.device("cpu")
    loaded = load_model(weights, "fp32", False, device)
    layout, schedule, model = loaded.layout, loaded.schedule, loaded.model
    latents, labels = read_latents(settings.latents, max(settings.loss_pictures, settings.sampled_pictures))
    all_pictures = Pictures.of(loaded.stats.normalize(latents[:, : layout.channels]).float(), labels)
    pictures = all_pictures.first(settings.loss_pictures)
    found: dict[str, Any] = {"delta_t": schedule.delta_t, "losses": {}, "fid": {}}
    kinds = {"own": pictures}
    if layout.semantic_channels:
        kinds["another"] = pictures.with_semantics_of_others(layout)
    for name, shown in kinds.items():
        found["losses"][name] = [
            (time, part_loss(model, pictures, layout, schedule, "texture", time, shown)) for time in TIMES
        ]
    if layout.semantic_channels:
        found["semantic_losses"] = [
            (time, part_loss(model, pictures, layout, schedule, "semantic", time)) for time in TIMES
        ]
    extractor = make_extractor(evaluation.extractor, device)
    reference = load_reference(evaluation, extractor)
    pictures = all_pictures.first(settings.sampled_pictures)
    samples = {"pictures": pictures.latents}
    for name in ("own", "oracle") if layout.semantic_channels else ("own",):
        oracle = name == "oracle"
        samples[name] = sample_textures(model, pictures, layout, schedule, evaluation.sampler, oracle=oracle)
    for name, drawn in samples.items():
        images = loaded.decode(loaded.stats.denormalize(drawn))
        features = torch.cat([extractor.get()(batch).pool for batch in images.split(BATCH)])
        found["fid"][name] = frechet_distance(moments(features), reference.pool)
        logger.info("%s: FID %s %.3f", weights, name, found["fid"][name])
    return found
