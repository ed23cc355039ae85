"""Images → the features that scores are made of: pooled, spatial, and logits.

The default is the Inception network of the ADM evaluator, by way of torch-fidelity's port of its weights; the spatial
features of sFID are the first 7 channels of Mixed_6d's 1x1 branch, in (row, column, channel) order. Any extractor that
is registered with torch-fidelity can stand in.

N images · P pooled · S = h·w·c spatial · K logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from eval.weights import fetch, file_sha256, load_state
from sfd_scale.accelerators import ieee_float32

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_GRID = (17, 17, 7)


@dataclass(frozen=True, kw_only=True)
class InceptionConfig:
    """torch-fidelity's Inception weights: a file, or none to download them from `url` (91 MB) once a machine."""

    kind: Literal["inception"] = "inception"
    weights: Path | None = None
    url: str = INCEPTION_URL
    sha256: str = INCEPTION_SHA256


@dataclass(frozen=True, kw_only=True)
class RegisteredConfig:
    """Named layers of an extractor that is registered with torch-fidelity, by it or by a `module`, which is imported.

    weights: loaded without running anything in them. torch-fidelity's own extractors download theirs where none are
        given, and run what comes (vgg16, clip-*: a pickle; dinov2-*: the code of a repository): `trust_remote_code`
        allows that.
    """

    name: str
    pooled: str
    spatial: str | None = None
    logits: str | None = None
    module: str | None = None
    weights: Path | None = None
    url: str | None = None
    sha256: str | None = None
    trust_remote_code: bool = False
    kind: Literal["registered"] = "registered"

    def __post_init__(self) -> None:
        _check_url(self.url, self.sha256)


@dataclass(frozen=True, kw_only=True)
class DINOv2Config:
    """The class token of a DINOv2 (arXiv 2304.07193), for FD-DINOv2 (arXiv 2306.04675): no spatial features, no logits.

    `weights`: a file of the DINOv2 authors, such as dinov2_vitl14_pretrain.pth, or its `url` and `sha256`.
    """

    weights: Path | None = None
    url: str | None = None
    sha256: str | None = None
    model: str = "vit_large_patch14_dinov2"
    kind: Literal["dinov2"] = "dinov2"

    def __post_init__(self) -> None:
        _check_url(self.url, self.sha256)
        if self.weights is None and self.url is None:
            raise ValueError("weights: null; allowed: a file of the DINOv2 authors, or its url and sha256")


def _check_url(url: str | None, sha256: str | None) -> None:
    if url is not None and sha256 is None:
        raise ValueError(f"sha256: null, with the url {url}; allowed: the checksum of the file that it gives")


@dataclass(frozen=True, kw_only=True)
class ConvNetConfig:
    """A SmallConvNet that was trained to classify, from `sfd export`: for data that Inception was not made for."""

    weights: Path
    kind: Literal["convnet"] = "convnet"


ExtractorConfig = InceptionConfig | RegisteredConfig | ConvNetConfig | DINOv2Config


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

    identity: str

    def __call__(self, images: Tensor) -> Features:
        """images (N, 3, H, W) uint8, on any device."""
        ...


class LazyExtractor:
    """An extractor that is built when it is first needed: a score of features that exist needs its identity only.

    `get` has to be called by all ranks together, as one a machine may download the weights.
    """

    def __init__(self, identity: str, build: Callable[[], Extractor]) -> None:
        self.identity, self._build = identity, build
        self._built: Extractor | None = None

    def get(self) -> Extractor:
        if self._built is None:
            self._built = self._build()
            assert self._built.identity == self.identity
        return self._built


@contextmanager
def one_algorithm() -> Iterator[None]:
    """Convolutions on a GPU by one algorithm a shape, that adds up in one order."""
    cudnn: Any = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    try:
        cudnn.deterministic, cudnn.benchmark = True, False
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """float32 that is float32: no autocast, no TF32 (the default for convolutions), one algorithm a shape.

    Under autocast Inception's features are off by a tenth, and float32 all the same.
    """
    with ieee_float32(), one_algorithm(), torch.autocast(device.type, enabled=False):
        yield


# ------------------------------------------------------------------------------------------------- building


def identify(config: ExtractorConfig) -> str:
    """What the extractor is, to the last bit of its weights, without building it."""
    match config:
        case InceptionConfig():
            return f"inception-v3-compat:{config.sha256}"
        case ConvNetConfig():
            return f"sfd-convnet:{file_sha256(config.weights)}"
        case DINOv2Config():
            return f"dinov2:{config.model}:{_weights_hash(config)}"
        case RegisteredConfig():
            code = [] if config.module is None else [config.module]
            weights = _weights_hash(config)
            return ":".join([*code, config.name, config.pooled, str(config.spatial), str(config.logits), weights])


def _weights_hash(config: RegisteredConfig | DINOv2Config) -> str:
    if config.sha256 is not None:
        return config.sha256
    return "its own" if config.weights is None else file_sha256(config.weights)


def make_extractor(config: ExtractorConfig, device: torch.device) -> LazyExtractor:
    """The extractor of a recipe, to be built when needed."""
    return LazyExtractor(identify(config), lambda: build_extractor(config, device))


def build_extractor(config: ExtractorConfig, device: torch.device) -> Extractor:
    """The extractor on `device`; called by all ranks, of which one a machine downloads what is missing."""
    # torch-fidelity and timm take seconds to import, and most commands build no extractor.
    from eval import extractors

    match config:
        case InceptionConfig():
            state = load_state(fetch(config.weights, config.url, config.sha256))
            return extractors.InceptionFeatures(state, device, identify(config))
        case ConvNetConfig():
            from eval.convnet import LAYERS, register

            registered = RegisteredConfig(name=register(), weights=config.weights, **LAYERS)
            return extractors.RegisteredFeatures(registered, device, identify(config))
        case DINOv2Config():
            state = load_state(fetch(config.weights, config.url, config.sha256))
            return extractors.DINOv2Features(config, state, device, identify(config))
        case RegisteredConfig():
            return extractors.RegisteredFeatures(config, device, identify(config))
