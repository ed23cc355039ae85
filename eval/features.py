"""Images → the features that scores are made of: pooled, spatial, and logits.

The default is the Inception network of the ADM evaluator, by way of torch-fidelity's port of its weights; the spatial
features of sFID are the first 7 channels of Mixed_6d's 1x1 branch, in (row, column, channel) order. Any extractor that
is registered with torch-fidelity can stand in.

N images · P pooled · S = h·w·c spatial · K logits.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from sfd_scale import distributed

logger = logging.getLogger(__name__)
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_GRID = (17, 17, 7)


@dataclass(frozen=True, kw_only=True)
class InceptionConfig:
    """torch-fidelity's Inception weights: a file, or none to download them from `url` once a machine."""

    kind: Literal["inception"] = "inception"
    weights: Path | None = None
    url: str = INCEPTION_URL
    sha256: str = INCEPTION_SHA256


@dataclass(frozen=True, kw_only=True)
class RegisteredConfig:
    """An extractor registered with torch-fidelity, such as dinov2-vit-b-14 (layer dinov2) or clip-vit-b-32."""

    name: str
    pooled: str
    spatial: str | None = None
    logits: str | None = None
    weights: Path | None = None
    kind: Literal["registered"] = "registered"


@dataclass(frozen=True, kw_only=True)
class ConvNetConfig:
    """A SmallConvNet that was trained to classify, from `sfd export`: for data that Inception was not made for."""

    weights: Path
    kind: Literal["convnet"] = "convnet"


ExtractorConfig = InceptionConfig | RegisteredConfig | ConvNetConfig


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
def full_precision(device: torch.device) -> Iterator[None]:
    """float32 that is float32: no autocast, no TF32 (the default for convolutions), one algorithm a shape.

    Under autocast Inception's features are off by a tenth, and float32 all the same.
    """
    cudnn: Any = torch.backends.cudnn
    backends = (cudnn.conv, torch.backends.cuda.matmul)
    before = [backend.fp32_precision for backend in backends]
    flags = cudnn.deterministic, cudnn.benchmark
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        cudnn.deterministic, cudnn.benchmark = True, False
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        cudnn.deterministic, cudnn.benchmark = flags
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value


# ------------------------------------------------------------------------------------------------- building


def identify(config: ExtractorConfig) -> str:
    """What the extractor is, to the last bit of its weights, without building it."""
    match config:
        case InceptionConfig():
            return f"inception-v3-compat:{config.sha256}"
        case ConvNetConfig():
            return f"sfd-convnet:{file_sha256(config.weights)}"
        case RegisteredConfig():
            weights = "its own" if config.weights is None else file_sha256(config.weights)
            return ":".join([config.name, config.pooled, str(config.spatial), str(config.logits), weights])


def make_extractor(config: ExtractorConfig, device: torch.device) -> LazyExtractor:
    """The extractor of a recipe, to be built when needed."""
    return LazyExtractor(identify(config), lambda: build_extractor(config, device))


def build_extractor(config: ExtractorConfig, device: torch.device) -> Extractor:
    """The extractor on `device`; called by all ranks, of which one a machine downloads what is missing."""
    # torch-fidelity takes seconds to import, and most commands build no extractor.
    from eval.extractors import InceptionFeatures, RegisteredFeatures

    match config:
        case InceptionConfig():
            weights = inception_weights(config)
            state = torch.load(weights, map_location="cpu", weights_only=True)
            return InceptionFeatures(state, device, identify(config))
        case ConvNetConfig():
            from eval.convnet import LAYERS, register

            registered = RegisteredConfig(name=register(), weights=config.weights, **LAYERS)
            return RegisteredFeatures(registered, device, identify(config))
        case RegisteredConfig():
            return RegisteredFeatures(config, device, identify(config))


def inception_weights(config: InceptionConfig) -> Path:
    """The weights' file with its checksum verified, downloaded by one rank of each machine if none is given.

    Raises:
        ValueError: for a missing file, a wrong checksum, or a download that failed, saying what to do.
    """
    path = config.weights
    if path is None:
        path = Path(torch.hub.get_dir()) / "checkpoints" / f"inception-{config.sha256[:8]}.pth"
        if distributed.local_rank() == 0 and not path.exists():
            _download(config.url, path, config.sha256)
        distributed.barrier()
    if not path.exists():
        raise ValueError(
            f"extractor.weights: {path} does not exist; download {config.url} (91 MB) and give its path, or leave the "
            "key out where there is a network"
        )
    found = file_sha256(path)
    if found != config.sha256:
        raise ValueError(
            f"extractor.weights: {path} has SHA-256 {found}, expected {config.sha256}; download it again, or give its "
            "own checksum as extractor.sha256 if it is meant to be another network"
        )
    return path


def _download(url: str, path: Path, sha256: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    logger.info("downloading %s to %s", url, path)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=False)
    except (OSError, RuntimeError) as error:
        # The other ranks wait at the barrier, find no file, and say what to do; so does this one.
        logger.warning("the download of %s failed: %s", url, error)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        ValueError: if there is no such file.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
