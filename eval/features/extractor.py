"""Images → the features that scores are made of: pooled, spatial, and logits.

The default is the Inception network of the ADM evaluator, by way of torch-fidelity's port of its weights; the spatial
features of sFID are the first 7 channels of Mixed_6d's 1x1 branch, in (row, column, channel) order. Any extractor that
is registered with torch-fidelity can stand in.

N images · P pooled · S = h·w·c spatial · K logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from eval.features.config import (
    ConvNetConfig,
    DINOv2ExtractorConfig,
    ExtractorConfig,
    InceptionConfig,
    RegisteredConfig,
)
from eval.features.downloads import fetch, load_state
from sfd_scale.runtime.files import file_sha256

INCEPTION_GRID = (17, 17, 7)


class Features(NamedTuple):
    """Float32 rows: pool (N, P), spatial (N, S) or None, logits (N, K) or None."""

    pool: Tensor
    spatial: Tensor | None
    logits: Tensor | None

    def tensors(self) -> dict[str, Tensor]:
        named = {"pool": self.pool, "spatial": self.spatial, "logits": self.logits}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


class Extractor(Protocol):
    """`identity` names the network and its weights."""

    fingerprint: str

    def __call__(self, images: Tensor) -> Features:
        """images (N, 3, H, W) uint8, on any device."""
        ...


class LazyExtractor:
    """An extractor that is built when it is first needed: a score of features that exist needs its identity only.

    `get` has to be called by all ranks together, as one a machine may download the weights.
    """

    def __init__(self, fingerprint: str, build: Callable[[], Extractor]) -> None:
        self.fingerprint, self._build = fingerprint, build
        self._built: Extractor | None = None

    def get(self) -> Extractor:
        if self._built is None:
            self._built = self._build()
            assert self._built.fingerprint == self.fingerprint
        return self._built


# ------------------------------------------------------------------------------------------------- building


def identify(config: ExtractorConfig) -> str:
    """What the extractor is, to the last bit of its weights, without building it."""
    match config:
        case InceptionConfig():
            return f"inception-v3-compat:{config.sha256}"
        case ConvNetConfig():
            return f"sfd-convnet:{file_sha256(config.weights)}"
        case DINOv2ExtractorConfig():
            return f"dinov2:{config.model}:{_weights_hash(config)}"
        case RegisteredConfig():
            code = [] if config.module is None else [config.module]
            weights = _weights_hash(config)
            return ":".join([*code, config.name, config.pooled, str(config.spatial), str(config.logits), weights])


def _weights_hash(config: RegisteredConfig | DINOv2ExtractorConfig) -> str:
    if config.sha256 is not None:
        return config.sha256
    return "its own" if config.weights is None else file_sha256(config.weights)


def make_extractor(config: ExtractorConfig, device: torch.device) -> LazyExtractor:
    """The extractor of a recipe, to be built when needed."""
    return LazyExtractor(identify(config), lambda: build_extractor(config, device))


def build_extractor(config: ExtractorConfig, device: torch.device) -> Extractor:
    """The extractor on `device`; called by all ranks, of which one a machine downloads what is missing."""
    # torch-fidelity and timm take seconds to import, and most commands build no extractor.
    from eval.features import extractors

    match config:
        case InceptionConfig():
            state = load_state(fetch(config.weights, config.url, config.sha256))
            return extractors.InceptionFeatures(state, device, identify(config))
        case ConvNetConfig():
            from eval.features.convnet import LAYERS, register

            registered = RegisteredConfig(name=register(), weights=config.weights, **LAYERS)
            return extractors.RegisteredFeatures(registered, device, identify(config))
        case DINOv2ExtractorConfig():
            state = load_state(fetch(config.weights, config.url, config.sha256))
            return extractors.DINOv2Features(config, state, device, identify(config))
        case RegisteredConfig():
            return extractors.RegisteredFeatures(config, device, identify(config))
