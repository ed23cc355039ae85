"""What a kind of training run has to provide, and the checks that the kinds share."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor, nn

from sfd_scale.data.dataloader import DataConfig, FeatureLoader, ImageLoader, LatentLoader
from sfd_scale.runtime import distributed
from sfd_scale.runtime.batch_split import BatchSplit
from sfd_scale.runtime.errors import reason
from sfd_scale.training.objective import Objective

if TYPE_CHECKING:
    from sfd_scale.recipe import TrainRecipe

logger = logging.getLogger(__name__)
Loader = LatentLoader | ImageLoader | FeatureLoader
L = TypeVar("L", LatentLoader, ImageLoader, FeatureLoader)

STORED_BYTES = 2  # of one value of a latent or a feature in the shards


class Task(Protocol):
    """The kind of a run, made from one recipe: everything that depends on the kind is asked of this object."""

    def check(self) -> None:
        """Raises ValueError for settings of the recipe that contradict each other."""
        ...

    def make_model(self) -> nn.Module:
        """The model as its class builds it; `init_weights` draws its start values."""
        ...

    def make_loader(self, split: BatchSplit) -> Loader:
        """The data of this rank. Raises ValueError where the data does not fit the recipe."""
        ...

    def make_objective(self, loader: Loader, device: torch.device) -> Objective:
        """The loss. Raises ValueError where a frozen network does not fit the data or the model."""
        ...

    def example_inputs(self, samples: int) -> tuple[Tensor, ...]:
        """Arguments of the model for a batch, of the right shapes and types: FLOPs and memory are measured with them.

        They are zeros on the default device."""
        ...

    def latent_loader(self) -> LatentLoader | None:
        """The data of one rank, whose statistics belong to every sample drawn from the model; None for a model that
        draws no latents."""
        ...

    def sample_bytes(self) -> int:
        """Size of one sample in the shards, both flips, as far as this run reads it."""
        ...

    def summary(self) -> dict[str, str]:
        """Facts about model and data for people: the start of a run and model cards show them."""
        ...


def meta_model(task: Task) -> nn.Module:
    """The model without memory for its weights, for their shapes.

    Raises:
        ValueError: if a size is larger than PyTorch can count.
    """
    try:
        with torch.device("meta"):
            return task.make_model()
    except (RuntimeError, OverflowError, TypeError) as error:
        why = reason(error).splitlines()[0]
        raise ValueError(f"model: it is too large for any machine ({why}); use a smaller one") from error


def open_loader(kind: type[L], recipe: TrainRecipe, split: BatchSplit, data: DataConfig | None = None) -> L:
    """The loader of this rank; `data` replaces the recipe's."""
    return kind(recipe.data if data is None else data, seed=recipe.seeds.data, split=split, rank=distributed.rank())


def check_classes(loader: Loader, num_classes: int) -> None:
    """Compare the classes of a model with those of the data; a model may have more, with a warning.

    Raises:
        ValueError: for labels that the model does not have.
    """
    path, found = loader.config.path, loader.num_classes
    if found > num_classes:
        raise ValueError(f"model.num_classes: {num_classes}, but the data in {path} has {found}")
    if found < num_classes:
        logger.warning(
            "model.num_classes: %d, of which the data in %s has %d; an evaluation draws labels of all of them",
            num_classes, path, found,
        )  # fmt: skip


def check_fingerprint(part: str, loader: Loader, own: Mapping[str, str]) -> None:
    """Raises ValueError where a tokenizer is not the one that the data was encoded with."""
    noted = loader.manifest.tokenizers.get(part)
    if noted is not None and noted != own[part]:
        raise ValueError(f"tokenizer.{part}: {own[part]}, but the data was encoded with {noted}; name that one")
