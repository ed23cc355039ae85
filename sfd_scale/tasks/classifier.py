"""Training of a small image classifier, such as the vision encoder of the quickstart.

N batch · H, W image · K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sfd_scale.data.dataloader import ImageLoader
from sfd_scale.runtime.batch_split import BatchSplit
from sfd_scale.tasks.task import Loader, check_classes, open_loader
from sfd_scale.toy.convnet import SmallConvNet, SmallConvNetConfig
from sfd_scale.training.classification import ROTATIONS, ClassificationConfig, ClassificationObjective

if TYPE_CHECKING:
    from sfd_scale.recipe import TrainRecipe


@dataclass(frozen=True)
class ClassifierTask:
    """A run that trains a convnet on images, by their labels or by a pretext task."""

    recipe: TrainRecipe
    model: SmallConvNetConfig
    loss: ClassificationConfig

    def check(self) -> None:
        classes = self.model.num_classes
        if self.loss.pretext == "rotation" and classes != ROTATIONS:
            raise ValueError(f"model.num_classes: {classes}; allowed: {ROTATIONS} with objective.pretext rotation")

    def make_model(self) -> SmallConvNet:
        return SmallConvNet(self.model)

    def make_loader(self, split: BatchSplit) -> ImageLoader:
        loader = open_loader(ImageLoader, self.recipe, split)
        if self.loss.pretext == "none":
            check_classes(loader, self.model.num_classes)
        return loader

    def make_objective(self, loader: Loader, device: torch.device) -> ClassificationObjective:
        return ClassificationObjective(self.loss, self.recipe.seeds.noise)

    def example_inputs(self, samples: int) -> tuple[Tensor, ...]:
        side = self.model.image_size
        return (torch.zeros(samples, 3, side, side, dtype=torch.uint8),)

    def latent_loader(self) -> None:
        return None

    def sample_bytes(self) -> int:
        return 3 * self.model.image_size**2

    def summary(self) -> dict[str, str]:
        return {"model": self.model.description}
