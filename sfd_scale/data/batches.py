"""Training batches: latents, features or images, with labels and sample keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FlowDraws:
    """Random draws of a batch: noise (N, C, H, W), global times g (N,), and where labels are dropped (N,) bool."""

    noise: Tensor
    g: Tensor
    dropped: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> FlowDraws:
        return FlowDraws(change(self.noise), change(self.g), change(self.dropped))


@dataclass(frozen=True)
class LatentBatch:
    """Latents for a diffusion model. All fields come from the same flip of an image.

    latents: (N, C, H, W) float32, normalised. labels: (N,) int64.
    keys: (N, 2) int64, (epoch, sample id) of each sample. They seed its random draws.
    features: alignment features (N, D, H, W) of the clean image, in the 16 bits of the shards; or None.
    images: (N, 3, H, W) uint8, if the features are computed from them during training; or None.
    draws: the random draws of the objective, if they were made ahead; or None.
    """

    latents: Tensor
    labels: Tensor
    keys: Tensor
    features: Tensor | None = None
    images: Tensor | None = None
    draws: FlowDraws | None = None

    def __len__(self) -> int:
        return self.latents.shape[0]

    def slice(self, start: int, stop: int) -> LatentBatch:
        """Samples start to stop - 1, as views."""
        features, images = (part if part is None else part[start:stop] for part in (self.features, self.images))
        draws = None if self.draws is None else self.draws.map(lambda part: part[start:stop])
        return LatentBatch(
            self.latents[start:stop], self.labels[start:stop], self.keys[start:stop], features, images, draws
        )

    def to(self, device: torch.device) -> LatentBatch:
        return self._moved(lambda part: part.to(device, non_blocking=True))

    def pin_memory(self) -> LatentBatch:
        """Copy to page-locked memory, so that a copy to a GPU is asynchronous. DataLoader calls this."""
        return self._moved(Tensor.pin_memory)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> LatentBatch:
        # The keys stay on the CPU: they seed CPU generators.
        features, images = (part if part is None else move(part) for part in (self.features, self.images))
        draws = None if self.draws is None else self.draws.map(move)
        return LatentBatch(move(self.latents), move(self.labels), self.keys, features, images, draws)


@dataclass(frozen=True)
class FeatureBatch:
    """Features (N, D, H, W) in 16 bits, labels (N,) int64, keys as in LatentBatch; for semantic VAEs.

    noise: the noise of the posterior (N, T, c), if it was drawn ahead; or None.
    """

    features: Tensor
    labels: Tensor
    keys: Tensor
    noise: Tensor | None = None

    def __len__(self) -> int:
        return self.features.shape[0]

    def to(self, device: torch.device) -> FeatureBatch:
        return self._moved(lambda part: part.to(device, non_blocking=True))

    def pin_memory(self) -> FeatureBatch:
        """See LatentBatch.pin_memory."""
        return self._moved(Tensor.pin_memory)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> FeatureBatch:
        noise = None if self.noise is None else move(self.noise)
        return FeatureBatch(move(self.features), move(self.labels), self.keys, noise)


@dataclass(frozen=True)
class ImageBatch:
    """Images (N, 3, H, W) uint8, labels (N,) int64, keys as in LatentBatch; for models that train on pixels.

    noise: as in FeatureBatch.
    augmented: whether the random changes of the objective were made to the images and labels.
    """

    images: Tensor
    labels: Tensor
    keys: Tensor
    noise: Tensor | None = None
    augmented: bool = False

    def __len__(self) -> int:
        return self.images.shape[0]

    def slice(self, start: int, stop: int) -> ImageBatch:
        """Samples start to stop - 1, as views."""
        noise = None if self.noise is None else self.noise[start:stop]
        return ImageBatch(
            self.images[start:stop], self.labels[start:stop], self.keys[start:stop], noise, self.augmented
        )  # fmt: skip

    def to(self, device: torch.device) -> ImageBatch:
        return self._moved(lambda part: part.to(device, non_blocking=True))

    def pin_memory(self) -> ImageBatch:
        """See LatentBatch.pin_memory."""
        return self._moved(Tensor.pin_memory)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> ImageBatch:
        noise = None if self.noise is None else move(self.noise)
        return ImageBatch(move(self.images), move(self.labels), self.keys, noise, self.augmented)
