"""The objective of a small texture VAE: reconstruction and Kullback-Leibler divergence (arXiv 1312.6114).

N batch · C latent channels · H, W image · h, w latent grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional

from sfd_scale.data.batches import ImageBatch
from sfd_scale.runtime import seeding
from sfd_scale.runtime.settings import at_least
from sfd_scale.training.objective import LossTerms, sample_keys
from sfd_scale.training.semantic_vae import gaussian_kl


@dataclass(frozen=True, kw_only=True)
class TextureVAELossConfig:
    """Loss = mean absolute error of pixels in [−1, 1] + kl_weight·KL. KL is summed over the latents of an image."""

    kind: Literal["texture_vae"] = "texture_vae"
    kl_weight: float = 1e-6

    def __post_init__(self) -> None:
        at_least(self, kl_weight=0)


class TextureVAEObjective:
    """The model is called as model(images (N, 3, H, W) in [−1, 1], noise (N, C, h, w)).

    It returns (reconstruction (N, 3, H, W), mean (N, C, h, w), logvar (N, C, h, w)).
    """

    def __init__(self, config: TextureVAELossConfig, latent_shape: tuple[int, int, int], seed: int) -> None:
        self.config, self.latent_shape, self.seed = config, latent_shape, seed

    def __call__(self, model: Callable[..., Any], batch: ImageBatch, /) -> LossTerms:
        images = batch.images.float() / 127.5 - 1
        noise = seeding.normal(self.seed, "posterior", sample_keys(batch.keys), self.latent_shape, images.device)
        reconstruction, mean, logvar = model(images, noise)
        return self.loss(reconstruction.float(), images, mean.float(), logvar.float())

    def prepare(self, batch: ImageBatch, /) -> ImageBatch:
        return batch

    def loss(self, reconstruction: Tensor, images: Tensor, mean: Tensor, logvar: Tensor) -> LossTerms:
        """The loss of given outputs; shapes as above."""
        absolute = functional.l1_loss(reconstruction, images)
        kl = gaussian_kl(mean, logvar).mean()
        total = absolute + self.config.kl_weight * kl
        terms = {"loss": total, "absolute": absolute, "kl": kl}
        return LossTerms(total, {name: value.detach() for name, value in terms.items()})
