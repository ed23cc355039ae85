"""Training of a velocity model on composite latents: Semantic-First Diffusion (arXiv 2512.04926).

A new model class needs its file, its config in `DiffusionModelConfig` and a line in `DiffusionTask.make_model`.

N batch · C channels · H, W latent or feature grid · T tokens · D feature channels.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sfd_scale.data.dataloader import LatentLoader
from sfd_scale.models.ddt import DDT, DDTConfig
from sfd_scale.models.lightningdit import LightningDiT, LightningDiTConfig
from sfd_scale.runtime.batch_split import BatchSplit, split_batch
from sfd_scale.tasks.task import STORED_BYTES, Loader, check_classes, check_fingerprint, open_loader
from sfd_scale.tokenizers.make import make_features, make_semantic
from sfd_scale.training.alignment_targets import DecodedFeatures, OnlineFeatures
from sfd_scale.training.semantic_first import SemanticFirstConfig, SemanticFirstObjective

if TYPE_CHECKING:
    from sfd_scale.recipe import TrainRecipe

DiffusionModelConfig = LightningDiTConfig | DDTConfig
DiffusionModel = LightningDiT | DDT


@dataclass(frozen=True)
class DiffusionTask:
    """A run that trains a velocity model on latents, with class labels."""

    recipe: TrainRecipe
    model: DiffusionModelConfig
    loss: SemanticFirstConfig

    def check(self) -> None:
        recipe, model, weight = self.recipe, self.model, self.loss.alignment_weight
        if weight > 0 and model.alignment is None:
            raise ValueError(
                f"objective.alignment_weight: {weight} with a model without alignment head; set model.alignment, or "
                "objective.alignment_weight=0"
            )
        if weight > 0:
            source, needed = recipe.data.features, {"online": "vision", "decoded": "semantic"}
            if source == "none":
                raise ValueError(
                    "data.features: none, but objective.alignment_weight is above 0; allowed: shards, online, decoded"
                )
            if source in needed and getattr(recipe.tokenizer, needed[source]) is None:
                raise ValueError(f"tokenizer.{needed[source]}: null; data.features={source} needs it")
        if weight == 0 and model.alignment is not None:
            raise ValueError("model.alignment: an alignment head that nothing trains; set it to null")
        if (self.loss.internal_weight > 0) != (model.internal_depth is not None):
            raise ValueError(
                f"model.internal_depth: {model.internal_depth}, with objective.internal_weight "
                f"{self.loss.internal_weight}; allowed: null with 0, or a depth with a weight above 0, such as 0.5"
            )
        if not recipe.schedule.synchronous and recipe.latents.semantic_channels == 0:
            raise ValueError("schedule.delta_t: a lead of semantics, but latents.semantic_channels is 0; set delta_t 0")
        if recipe.latents.size % model.patch_size:
            raise ValueError(f"model.patch_size: {model.patch_size} does not divide latents.size {recipe.latents.size}")

    def make_model(self) -> DiffusionModel:
        layout, two_clocks = self.recipe.latents, not self.recipe.schedule.synchronous
        match self.model:
            case LightningDiTConfig() as model:
                return LightningDiT(model, in_channels=layout.channels, input_size=layout.size, two_clocks=two_clocks)
            case DDTConfig() as model:
                return DDT(model, in_channels=layout.channels, input_size=layout.size, two_clocks=two_clocks)

    def make_loader(self, split: BatchSplit) -> LatentLoader:
        recipe, data = self.recipe, self.recipe.data
        if self.loss.alignment_weight == 0:
            data = dataclasses.replace(data, features="none")  # nothing uses them
        loader = open_loader(LatentLoader, recipe, split, data)
        check_classes(loader, self.model.conditioning.num_classes)
        if loader.shape != recipe.latents.shape:
            raise ValueError(f"latents: {recipe.latents.shape}, but the data in {data.path} has {loader.shape}")
        return loader

    def make_objective(self, loader: Loader, device: torch.device) -> SemanticFirstObjective:
        assert isinstance(loader, LatentLoader)
        recipe = self.recipe
        return SemanticFirstObjective(
            self.loss, recipe.latents, recipe.schedule, self.model.conditioning, recipe.seeds.noise,
            self.alignment_targets(loader, device),
        )  # fmt: skip

    def alignment_targets(self, loader: LatentLoader, device: torch.device) -> OnlineFeatures | DecodedFeatures | None:
        """Makes the alignment features of a batch; None where the data stores them, or the model needs none.

        Raises:
            ValueError: if the tokenizer is not that of the data, or the alignment head has another width.
        """
        recipe, alignment = self.recipe, self.model.alignment
        if alignment is None:
            return None
        targets: OnlineFeatures | DecodedFeatures | None = None
        if recipe.data.features == "online":
            online = make_features(recipe.tokenizer, device)
            check_fingerprint("vision", loader, online.fingerprints)
            targets = OnlineFeatures(online)
        elif recipe.data.features == "decoded":
            assert recipe.tokenizer.semantic is not None
            semantic = make_semantic(recipe.tokenizer.semantic, device)
            check_fingerprint("semantic", loader, {"semantic": semantic.fingerprint})
            targets = DecodedFeatures(semantic, recipe.latents, loader.stats.to(device))
        dim = loader.feature_dim if targets is None else targets.dim
        if dim is None:
            raise ValueError(
                f"data.features: shards, but {recipe.data.path} stores none; set data.features=decoded, or online "
                "where it stores images, or encode with store.features=shards"
            )
        if dim != alignment.dim:
            raise ValueError(f"model.alignment.dim: {alignment.dim}; the features have {dim} channels")
        return targets

    def example_inputs(self, samples: int) -> tuple[Tensor, ...]:
        x, t = torch.zeros(samples, *self.recipe.latents.shape), torch.zeros(samples)
        return x, t, t, self.model.conditioning.example(samples)

    def latent_loader(self) -> LatentLoader:
        return self.make_loader(split_batch(self.recipe.train.global_batch, None, 1))

    def sample_bytes(self) -> int:
        data, layout = self.recipe.data, self.recipe.latents
        values = math.prod(layout.shape)
        if data.features == "shards" and self.model.alignment is not None:
            values += layout.size**2 * self.model.alignment.dim
        size = values * STORED_BYTES * (2 if data.flip else 1)
        if data.features == "online" and self.recipe.tokenizer.vision is not None:
            size += 3 * self.recipe.tokenizer.vision.image_size**2
        return size

    def summary(self) -> dict[str, str]:
        layout = self.recipe.latents
        return {
            "model": self.model.description,
            "latents": f"{layout.texture_channels} texture + {layout.semantic_channels} semantic channels, "
            f"{layout.size} × {layout.size}",
            "semantic lead": f"delta_t {self.recipe.schedule.delta_t:g}",
        }
