"""Images → the features that scores are made of: pooled, spatial, and logits.

The default is the Inception network of the ADM evaluator, by way of torch-fidelity's port of its weights; the spatial
features of sFID are the first 7 channels of Mixed_6d's 1x1 branch, in (row, column, channel) order. Any extractor that
is registered with torch-fidelity can stand in.

N images · P pooled · S = h·w·c spatial · K logits.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor

from sfd_scale import distributed

logger = logging.getLogger(__name__)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SPATIAL_CHANNELS = 7


@dataclass(frozen=True, kw_only=True)
class InceptionConfig:
    """torch-fidelity's Inception weights: a file, or none to download them from `url` once a machine."""

    kind: Literal["inception"] = "inception"
    weights: Path | None = None
    url: str = URL_INCEPTION_V3
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


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """float32 that is float32: no autocast, no TF32 (the default for convolutions), one algorithm a shape.

    Under autocast Inception's features are off by a tenth, and float32 all the same.
    """
    backends = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    cudnn = torch.backends.cudnn
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


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"images of shape {tuple(images.shape)} and type {images.dtype}; features are taken of (N, 3, H, W) uint8"
        )


class InceptionFeatures:
    """ADM's Inception (arXiv 2105.05233, Sec. 2.2): pool 2048, spatial 17·17·7, logits without bias 1008."""

    spatial_grid = (17, 17, SPATIAL_CHANNELS)

    def __init__(self, state: dict[str, Tensor], device: torch.device, identity: str) -> None:
        self.identity, self.device = identity, device
        # torch-fidelity's constructor unpickles a file or downloads one; it gets tensors that are already checked.
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        layers = ["2048", "logits_unbiased"]  # the constructor takes a list and no tuple
        self.network = FeatureExtractorInceptionV3("inception-v3-compat", layers, feature_extractor_weights_path=buffer)
        self.network.to(device)
        self._spatial: Tensor | None = None
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._tap)

    def _tap(self, module: Any, args: Any, output: Tensor) -> None:
        # (N, 192, 17, 17) → (N, 17, 17, 7): TensorFlow's order, in which the stored mu_s and sigma_s are.
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).float()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        _check_images(images)
        with full_precision(self.device):
            pool, logits = self.network(images.to(self.device))
        spatial, self._spatial = self._spatial, None
        return _checked(Features(pool, spatial, logits))


class RegisteredFeatures:
    """Named layers of an extractor that is registered with torch-fidelity."""

    def __init__(self, config: RegisteredConfig, device: torch.device, identity: str) -> None:
        if config.name not in FEATURE_EXTRACTORS_REGISTRY:
            known = ", ".join(sorted(FEATURE_EXTRACTORS_REGISTRY))
            raise ValueError(f"extractor.name: {config.name}; allowed: {known}")
        self.identity, self.device, self.config = identity, device, config
        self.layers = [layer for layer in (config.pooled, config.spatial, config.logits) if layer is not None]
        provided = FEATURE_EXTRACTORS_REGISTRY[config.name].get_provided_features_list()
        for layer in self.layers:
            if layer not in provided:
                raise ValueError(f"extractor: {config.name} has no layer {layer}; allowed: {', '.join(provided)}")
        weights = None if config.weights is None else str(config.weights)
        self.network = create_feature_extractor(
            config.name, self.layers, cuda=False, feature_extractor_weights_path=weights, verbose=False
        ).to(device)
        grid = (
            self.network.spatial_grid if config.spatial is not None and hasattr(self.network, "spatial_grid") else None
        )
        self.spatial_grid: tuple[int, int, int] | None = grid

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        _check_images(images)
        with full_precision(self.device):
            values = self.network(images.to(self.device))
        by_layer = {layer: value.flatten(1).float() for layer, value in zip(self.layers, values, strict=True)}
        config = self.config
        spatial = None if config.spatial is None else by_layer[config.spatial]
        logits = None if config.logits is None else by_layer[config.logits]
        return _checked(Features(by_layer[config.pooled], spatial, logits))


def _checked(features: Features) -> Features:
    for name, tensor in features.tensors().items():
        if not bool(tensor.isfinite().all()):
            raise FloatingPointError(f"the extractor's {name} features are not finite: its weights are broken")
    return features


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


def build_extractor(config: ExtractorConfig, device: torch.device) -> Extractor:
    """The extractor on `device`; called by all ranks, of which one a machine downloads what is missing."""
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
