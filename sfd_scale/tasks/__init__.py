"""The kinds of training runs. The objective of a recipe decides its kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

from sfd_scale.models.semantic_vae import SemanticVAEConfig
from sfd_scale.tasks.classifier import ClassifierTask
from sfd_scale.tasks.diffusion import DiffusionModelConfig, DiffusionTask
from sfd_scale.tasks.semantic_vae import SemanticVAETask
from sfd_scale.tasks.task import Task
from sfd_scale.tasks.texture_vae import TextureVAETask
from sfd_scale.toy.convnet import SmallConvNetConfig
from sfd_scale.toy.small_vae import SmallVAEConfig
from sfd_scale.training.classification import ClassificationConfig
from sfd_scale.training.semantic_first import SemanticFirstConfig
from sfd_scale.training.semantic_vae import SemanticVAELossConfig
from sfd_scale.training.texture_vae import TextureVAELossConfig

if TYPE_CHECKING:
    from sfd_scale.recipe import TrainRecipe

ModelConfig = DiffusionModelConfig | SemanticVAEConfig | SmallConvNetConfig | SmallVAEConfig
ObjectiveConfig = SemanticFirstConfig | SemanticVAELossConfig | ClassificationConfig | TextureVAELossConfig


def task_of(recipe: TrainRecipe) -> Task:
    """The kind of a run.

    Raises:
        ValueError: for an objective that does not train the recipe's model.
    """
    model: ModelConfig = recipe.model
    allowed: Any
    match recipe.objective:
        case SemanticFirstConfig() as loss:
            if isinstance(model, DiffusionModelConfig):
                return DiffusionTask(recipe, model, loss)
            allowed = DiffusionModelConfig
        case SemanticVAELossConfig() as loss:
            if isinstance(model, SemanticVAEConfig):
                return SemanticVAETask(recipe, model, loss)
            allowed = SemanticVAEConfig
        case ClassificationConfig() as loss:
            if isinstance(model, SmallConvNetConfig):
                return ClassifierTask(recipe, model, loss)
            allowed = SmallConvNetConfig
        case TextureVAELossConfig() as loss:
            if isinstance(model, SmallVAEConfig):
                return TextureVAETask(recipe, model, loss)
            allowed = SmallVAEConfig
    kinds = " or ".join(repr(option.kind) for option in get_args(allowed) or (allowed,))
    raise ValueError(
        f"model.kind: {model.kind!r} with objective.kind {recipe.objective.kind!r}; that objective trains {kinds}"
    )


def diffusion_task(recipe: TrainRecipe) -> DiffusionTask:
    """The task of a recipe that trains a diffusion model.

    Raises:
        ValueError: for a recipe of another kind.
    """
    task = recipe.task
    if not isinstance(task, DiffusionTask):
        raise ValueError(
            f"objective.kind: {recipe.objective.kind!r} trains no diffusion model; allowed here: 'semantic_first'"
        )
    return task
