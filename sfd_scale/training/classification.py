"""The objective of a small image classifier: cross entropy, on labels or on a pretext task.

N batch · H, W image · K classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from sfd_scale.data.batches import ImageBatch
from sfd_scale.runtime import seeding
from sfd_scale.runtime.settings import at_least
from sfd_scale.training.objective import LossTerms, sample_keys

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
        batch = batch if batch.augmented else self._augmented(batch)
        logits = model(batch.images).logits.float()
        total = functional.cross_entropy(logits, batch.labels, label_smoothing=self.config.label_smoothing)
        accuracy = (logits.detach().argmax(1) == batch.labels).float().mean()
        return LossTerms(total, {"loss": total.detach()}, measures={"accuracy": accuracy})

    def prepare(self, batch: ImageBatch, /) -> ImageBatch:
        """Change the images of a batch at random before its step; page-locked where there is a GPU."""
        batch = self._augmented(batch)
        return batch.pin_memory() if torch.cuda.is_available() else batch

    def _augmented(self, batch: ImageBatch) -> ImageBatch:
        images, labels = self.augment(batch), batch.labels
        if self.config.pretext == "rotation":
            images, labels = self.rotate(images, batch.keys)
        return dataclasses.replace(batch, images=images, labels=labels, augmented=True)

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
