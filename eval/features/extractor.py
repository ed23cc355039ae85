"""What a feature extractor is: images → pooled features, spatial features and logits.

N images · P pooled features · S = h·w·c spatial features · K logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Features(NamedTuple):
    """Float32 rows: pool (N, P), spatial (N, S) or None, logits (N, K) or None."""

    pool: Tensor
    spatial: Tensor | None
    logits: Tensor | None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that there are, by name."""
        named = {"pool": self.pool, "spatial": self.spatial, "logits": self.logits}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


class Extractor(Protocol):
    """`fingerprint` names the network and its weights."""

    fingerprint: str

    def __call__(self, images: Tensor) -> Features:
        """Features of images (N, 3, H, W) uint8, which may be on any device."""
        ...


class LazyExtractor:
    """An extractor that is built when it is first needed. Scores of stored features need only its fingerprint.

    All ranks have to call `get` together, because one rank per machine may download the weights.
    """

    def __init__(self, fingerprint: str, build: Callable[[], Extractor]) -> None:
        self.fingerprint, self._build = fingerprint, build
        self._built: Extractor | None = None

    def get(self) -> Extractor:
        if self._built is None:
            self._built = self._build()
            assert self._built.fingerprint == self.fingerprint
        return self._built


def check_images(images: Tensor) -> None:
    """Raises ValueError for anything but (N, 3, H, W) uint8."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"images of shape {tuple(images.shape)} and type {images.dtype}; an extractor takes (N, 3, H, W) uint8"
        )


def checked(features: Features) -> Features:
    """The same features.

    Raises:
        FloatingPointError: if one is not finite.
    """
    for name, tensor in features.tensors().items():
        if not bool(tensor.isfinite().all()):
            raise FloatingPointError(f"the extractor's {name} features are not finite: its weights are broken")
    return features
