"""The pretext task of the study's vision encoder: which way a scene is turned."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from sfd_scale import config
from sfd_scale.data.batches import ImageBatch
from sfd_scale.recipe import TrainRecipe
from sfd_scale.training.classification import ClassificationConfig, ClassificationObjective


def batch_of(count: int) -> ImageBatch:
    images = torch.arange(count * 3 * 16).remainder(251).to(torch.uint8).view(count, 3, 4, 4)
    keys = torch.stack([torch.zeros(count, dtype=torch.int64), torch.arange(count)], 1)
    return ImageBatch(images, torch.full((count,), 9), keys)


def test_rotation_asks_for_the_turn_and_not_for_the_class() -> None:
    batch = batch_of(60)
    pretext = ClassificationObjective(ClassificationConfig(pretext="rotation", label_smoothing=0.0), seed=0)
    images, turns = pretext.rotate(batch.images, batch.keys)
    assert set(turns.tolist()) == {0, 1, 2, 3}
    back = torch.stack([image.rot90(-int(turn), (1, 2)) for image, turn in zip(images, turns, strict=True)])
    assert torch.equal(back, batch.images)
    part = batch.slice(7, 20)
    assert torch.equal(pretext.rotate(part.images, part.keys)[0], images[7:20]), "a draw belongs to its sample"

    def model(seen: Tensor) -> SimpleNamespace:
        assert torch.equal(seen, images)
        return SimpleNamespace(logits=30.0 * torch.nn.functional.one_hot(turns, 4))

    found = pretext(model, batch)
    assert found.measures["accuracy"] == 1 and found.total < 1e-6


def test_rotation_has_four_classes() -> None:
    assert config.load("study/vision", TrainRecipe).model.num_classes == 4
    with pytest.raises(ValueError, match="num_classes: 10; allowed: 4 with objective.pretext rotation"):
        config.load("study/vision", TrainRecipe, ["model.num_classes=10"])


# ----------------------------------------------------------------------------------------- aligned codec
