"""Training of a semantic VAE, which compresses the tokens of a frozen vision encoder (arXiv 2512.04926).

N batch · T tokens · D feature channels · c latent channels · H, W image or feature grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sfd_scale.data.dataloader import FeatureLoader, ImageLoader
from sfd_scale.models.semantic_vae import SemanticVAE, SemanticVAEConfig
from sfd_scale.runtime.batch_split import BatchSplit
from sfd_scale.tasks.task import STORED_BYTES, Loader, open_loader
from sfd_scale.tokenizers.make import make_features
from sfd_scale.training.semantic_vae import SemanticVAELossConfig, SemanticVAEObjective

if TYPE_CHECKING:
    from sfd_scale.recipe import TrainRecipe


@dataclass(frozen=True)
class SemanticVAETask:
    """A run that trains a semantic VAE, on stored features or on images through the recipe's vision encoder."""

    recipe: TrainRecipe
    model: SemanticVAEConfig
    loss: SemanticVAELossConfig

    def check(self) -> None:
        features = self.recipe.data.features
        if features not in ("shards", "online"):
            raise ValueError(f"data.features: {features}, for a semantic VAE; allowed: shards, online")
        if features == "online" and self.recipe.tokenizer.vision is None:
            raise ValueError("tokenizer.vision: missing; data.features is online, which needs a vision encoder")

    def make_model(self) -> SemanticVAE:
        return SemanticVAE(self.model)

    def make_loader(self, split: BatchSplit) -> FeatureLoader | ImageLoader:
        if self.recipe.data.features == "online":
            return open_loader(ImageLoader, self.recipe, split)
        loader = open_loader(FeatureLoader, self.recipe, split)
        if loader.feature_dim != self.model.input_dim:
            raise ValueError(f"model.input_dim: {self.model.input_dim}; the stored features have {loader.feature_dim}")
        return loader

    def make_objective(self, loader: Loader, device: torch.device) -> SemanticVAEObjective:
        vision = None if isinstance(loader, FeatureLoader) else make_features(self.recipe.tokenizer, device)
        return SemanticVAEObjective(self.loss, vision, self.model.bottleneck_dim, self.recipe.seeds.noise)

    def example_inputs(self, samples: int) -> tuple[Tensor, ...]:
        tokens = self.recipe.latents.size**2  # the grid of features is that of the latents
        return tuple(torch.zeros(samples, tokens, dim) for dim in (self.model.input_dim, self.model.bottleneck_dim))

    def latent_loader(self) -> None:
        return None

    def sample_bytes(self) -> int:
        data, vision = self.recipe.data, self.recipe.tokenizer.vision
        if data.features == "online" and vision is not None:
            return 3 * vision.image_size**2
        return self.model.input_dim * self.recipe.latents.size**2 * STORED_BYTES * (2 if data.flip else 1)

    def summary(self) -> dict[str, str]:
        return {"model": self.model.description}
