"""What is minimised: a model and a batch in, loss terms out. One class for each kind of model that is trained.

Every random draw is keyed by the sample's (epoch, id), so it does not depend on the batch it falls into.

N batch · C channels · H, W latent or feature grid · T tokens · D feature channels · K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from sfd_scale.data.batches import FeatureBatch, ImageBatch, LatentBatch
from sfd_scale.diffusion import losses, path
from sfd_scale.diffusion.latents import LatentLayout
from sfd_scale.diffusion.losses import AlignmentMode
from sfd_scale.diffusion.schedule import SemanticFirstSchedule, logit_normal
from sfd_scale.runtime import seeding
from sfd_scale.runtime.settings import at_least


@dataclass(frozen=True)
class LossTerms:
    """`total` is the scalar to minimise, with its gradient; `terms` are detached means over the batch.

    For losses that depend on time: `clock` (N,), the share of the global clock that has passed, 0 .. 1, and
    `per_sample` (N,), the detached loss of each sample.
    """

    total: Tensor
    terms: dict[str, Tensor]
    clock: Tensor | None = None
    per_sample: Tensor | None = None


class Objective(Protocol):
    """The model is what the engine gives to be called; each objective says how it calls it."""

    def __call__(self, model: Callable[..., Any], batch: Any, /) -> LossTerms: ...


def sample_keys(keys: Tensor) -> list[tuple[int, ...]]:
    """(N, 2) int64 as keys for seeding."""
    return [tuple(key) for key in keys.tolist()]


# --------------------------------------------------------------------------------------- semantic-first


@dataclass(frozen=True, kw_only=True)
class SemanticFirstConfig:
    """Loss of a sample = weighted mean square + cosine_weight·cosine + alignment_weight·alignment.

    `alignment_weight` 0 trains without alignment; above 0 the data needs features and the model an alignment head.
    """

    kind: Literal["semantic_first"] = "semantic_first"
    semantic_weight: float = 2.0
    cosine_weight: float = 1.0
    alignment_weight: float = 1.0
    alignment_mode: AlignmentMode = "cos"
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        at_least(self, semantic_weight=0, cosine_weight=0, alignment_weight=0)
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout: {self.label_dropout}; allowed: from 0 to below 1")


@dataclass(frozen=True)
class FlowDraw:
    """What chance decides for a batch: noise (N, C, H, W), global times g (N,), labels with some dropped (N,)."""

    noise: Tensor
    g: Tensor
    labels: Tensor


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
        num_classes: int,
        seed: int,
        features: Callable[[LatentBatch], Tensor] | None = None,
    ) -> None:
        self.config, self.layout, self.schedule = config, layout, schedule
        self.num_classes, self.seed, self.features = num_classes, seed, features

    def __call__(self, model: Callable[..., Any], batch: LatentBatch, /) -> LossTerms:
        return self.loss(model, batch, self.draw(batch))

    def draw(self, batch: LatentBatch) -> FlowDraw:
        """Noise, logit-normal times and dropped labels, from each sample's own generators."""
        keys, device = sample_keys(batch.keys), batch.latents.device
        noise = seeding.normal(self.seed, "noise", keys, batch.latents.shape[1:], device)
        u = logit_normal(seeding.normal(self.seed, "time", keys, ()))
        dropped = seeding.uniform(self.seed, "label_drop", keys) < self.config.label_dropout
        labels = batch.labels.masked_fill(dropped.to(device, non_blocking=True), self.num_classes)
        return FlowDraw(noise, self.schedule.time_from_uniform(u).to(device, non_blocking=True), labels)

    def loss(self, model: Callable[..., Any], batch: LatentBatch, draw: FlowDraw) -> LossTerms:
        """The loss for given draws; float32 whatever the model computes in.

        Raises:
            ValueError: if alignment is on and the features or the model's alignment head are missing.
        """
        clocks = self.schedule.clocks(draw.g)
        x = path.interpolate(draw.noise, batch.latents, self.layout.per_channel(*clocks, like=batch.latents))
        target = path.velocity(draw.noise, batch.latents)
        predicted, projected = model(x, clocks.texture, clocks.semantic, draw.labels)
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


# ---------------------------------------------------------------------------------------- semantic VAE


@dataclass(frozen=True, kw_only=True)
class SemanticVAELossConfig:
    """Loss = mean square + cosine_weight·(1 − cosine) + kl_weight·KL.

    cosine_over: `tokens` compares each feature channel over the tokens, as the authors' code does; `features` compares
        each token over its channels.
    """

    kind: Literal["semantic_vae"] = "semantic_vae"
    cosine_weight: float = 1.0
    kl_weight: float = 1e-7
    cosine_over: Literal["tokens", "features"] = "tokens"

    def __post_init__(self) -> None:
        at_least(self, cosine_weight=0, kl_weight=0)


class FeatureEncoder(Protocol):
    """A frozen vision encoder (sfd_scale.tokenizers.vision_encoder)."""

    def features(self, images: Tensor) -> Tensor: ...


class SemanticVAEObjective:
    """A VAE that compresses the tokens of a frozen vision encoder (arXiv 2512.04926).

    The model is called as model(tokens (N, T, D), noise (N, T, c)) and returns (reconstruction (N, T, D),
    mean (N, T, c), logvar (N, T, c)).
    """

    def __init__(
        self, config: SemanticVAELossConfig, vision_encoder: FeatureEncoder | None, latent_channels: int, seed: int
    ) -> None:
        self.config, self.vision_encoder = config, vision_encoder
        self.latent_channels, self.seed = latent_channels, seed

    def __call__(self, model: Callable[..., Any], batch: ImageBatch | FeatureBatch, /) -> LossTerms:
        tokens = self.grid(batch).flatten(2).transpose(1, 2).float()  # (N, T, D)
        shape = (tokens.shape[1], self.latent_channels)
        noise = seeding.normal(self.seed, "posterior", sample_keys(batch.keys), shape, tokens.device)
        reconstruction, mean, logvar = model(tokens, noise)
        return self.loss(reconstruction.float(), tokens, mean.float(), logvar.float())

    @torch.no_grad()
    def grid(self, batch: ImageBatch | FeatureBatch) -> Tensor:
        """The features of a batch (N, D, H, W): stored, or made from its images."""
        if isinstance(batch, FeatureBatch):
            return batch.features
        assert self.vision_encoder is not None
        return self.vision_encoder.features(batch.images)

    def loss(self, reconstruction: Tensor, tokens: Tensor, mean: Tensor, logvar: Tensor) -> LossTerms:
        """The loss of given outputs; shapes as above."""
        square = functional.mse_loss(reconstruction, tokens)
        dim = 1 if self.config.cosine_over == "tokens" else 2
        cosine = (1 - functional.cosine_similarity(reconstruction, tokens, dim=dim)).mean()
        kl = gaussian_kl(mean, logvar).mean()
        total = square + self.config.cosine_weight * cosine + self.config.kl_weight * kl
        terms = {"loss": total, "mse": square, "cosine": cosine, "kl": kl}
        return LossTerms(total, {name: value.detach() for name, value in terms.items()})


def gaussian_kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) ‖ N(0, 1)), summed over all but the first axis (arXiv 1312.6114, App. B): (N,)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)


# -------------------------------------------------------------------------------------- classification


ROTATIONS = 4  # quarter turns: the classes of the pretext task


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig:
    """Cross entropy; each training image is moved by up to `translate` pixels along both axes.

    pretext: `rotation` turns each image by 0, 90, 180 or 270 degrees, and the turn is the class (arXiv 1803.07728):
        features without the labels of the data. The model has 4 classes then.
    """

    kind: Literal["classification"] = "classification"
    pretext: Literal["none", "rotation"] = "none"
    label_smoothing: float = 0.1
    translate: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing: {self.label_smoothing}; allowed: from 0 to below 1")
        at_least(self, translate=0)


class ClassificationObjective:
    """Trains an image classifier, such as the small vision encoder of the quickstart.

    The model is called as model(images uint8 (N, 3, H, W)) and returns something with `logits` (N, K).
    """

    def __init__(self, config: ClassificationConfig, seed: int) -> None:
        self.config, self.seed = config, seed

    def __call__(self, model: Callable[..., Any], batch: ImageBatch, /) -> LossTerms:
        images, labels = self.augment(batch), batch.labels
        if self.config.pretext == "rotation":
            images, labels = self.rotate(images, batch.keys)
        logits = model(images).logits.float()
        total = functional.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        accuracy = (logits.detach().argmax(1) == labels).float().mean()
        return LossTerms(total, {"loss": total.detach(), "accuracy": accuracy})

    def rotate(self, images: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Square images, each turned counterclockwise by quarter turns of its own draw, and these (N,) in 0 .. 3."""
        turns = (ROTATIONS * seeding.uniform(self.seed, "rotation", sample_keys(keys))).long()
        turned = [image.rot90(int(turn), (1, 2)) for image, turn in zip(images, turns, strict=True)]
        return torch.stack(turned), turns.to(images.device)

    def augment(self, batch: ImageBatch) -> Tensor:
        """The images moved by whole pixels, their edges repeated: (N, 3, H, W) uint8."""
        reach = self.config.translate
        if reach == 0:
            return batch.images
        keys = sample_keys(batch.keys)
        draws = torch.stack([seeding.uniform(self.seed, f"translate_{axis}", keys) for axis in ("y", "x")], 1)
        offsets = (draws * (2 * reach + 1)).long()
        height, width = batch.images.shape[2:]
        padded = functional.pad(batch.images.float(), (reach,) * 4, mode="replicate").to(torch.uint8)
        moved = [
            image[:, top : top + height, left : left + width]
            for image, (top, left) in zip(padded, offsets.tolist(), strict=True)
        ]
        return torch.stack(moved)
