"""Training of a small texture VAE on images, such as the one of the quickstart.

N batch · C latent channels · H, W image · h, w latent grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sfd_scale.data.dataloader import ImageLoader
from sfd_scale.runtime.batch_split import BatchSplit
from sfd_scale.tasks.task import Loader, open_loader
from sfd_scale.toy.small_vae import SmallVAE, SmallVAEConfig
from sfd_scale.training.texture_vae import TextureVAELossConfig, TextureVAEObjective

if TYPE_CHECKING:
    from sfd_scale.recipe import TrainRecipe


@dataclass(frozen=True)
class TextureVAETask:
    """A run that trains a small VAE on images."""

    recipe: TrainRecipe
    model: SmallVAEConfig
    loss: TextureVAELossConfig

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.model.latent_channels, self.model.grid, self.model.grid

    def check(self) -> None:
        """All settings of the model and the loss fit each other."""

    def make_model(self) -> SmallVAE:
        return SmallVAE(self.model)

    def make_loader(self, split: BatchSplit) -> ImageLoader:
        return open_loader(ImageLoader, self.recipe, split)

    def make_objective(self, loader: Loader, device: torch.device) -> TextureVAEObjective:
        return TextureVAEObjective(self.loss, self.latent_shape, self.recipe.seeds.noise)

    def example_inputs(self, samples: int) -> tuple[Tensor, ...]:
        side = self.model.image_size
        return torch.zeros(samples, 3, side, side), torch.zeros(samples, *self.latent_shape)

    def latent_loader(self) -> None:
        return None

    def sample_bytes(self) -> int:
        return 3 * self.model.image_size**2

    def summary(self) -> dict[str, str]:
        return {"model": self.model.description}
