"""The objective of a semantic VAE, which compresses the tokens of a vision encoder (arXiv 2512.04926).

N batch · T tokens · D feature channels · c latent channels · H, W image or feature grid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from sfd_scale.data.batches import FeatureBatch, ImageBatch
from sfd_scale.runtime import seeding
from sfd_scale.runtime.settings import at_least
from sfd_scale.training.objective import LossTerms, sample_keys


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

    def grid(self, image_size: int) -> int: ...

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
        noise = self._noise(batch) if batch.noise is None else batch.noise
        reconstruction, mean, logvar = model(tokens, noise.to(tokens.device, non_blocking=True))
        return self.loss(reconstruction.float(), tokens, mean.float(), logvar.float())

    def prepare(self, batch: ImageBatch | FeatureBatch, /) -> ImageBatch | FeatureBatch:
        """Draw the noise of a batch before its step; page-locked where there is a GPU."""
        noise = self._noise(batch)
        return dataclasses.replace(batch, noise=noise.pin_memory() if torch.cuda.is_available() else noise)

    def _noise(self, batch: ImageBatch | FeatureBatch) -> Tensor:
        """The noise of the posterior: (N, T, c), from each sample's own generator."""
        if isinstance(batch, FeatureBatch):
            tokens = batch.features.shape[2:].numel()
        else:
            assert self.vision_encoder is not None
            tokens = self.vision_encoder.grid(batch.images.shape[2]) ** 2
        return seeding.normal(self.seed, "posterior", sample_keys(batch.keys), (tokens, self.latent_channels))

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
