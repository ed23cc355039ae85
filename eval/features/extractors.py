"""Feature extractors: torch-fidelity's Inception with the spatial tap of sFID, any registered one, and DINOv2.

N images · P pooled · S = h·w·c spatial · K logits.
"""

from __future__ import annotations

import importlib
import io
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor

from eval.features.config import DINOv2ExtractorConfig, RegisteredConfig
from eval.features.downloads import fetch, load_state
from eval.features.extractor import INCEPTION_GRID, Features
from sfd_scale.runtime import distributed
from sfd_scale.runtime.matmul import strict_float32
from sfd_scale.tokenizers.vision_encoder import IMAGENET_MEAN, IMAGENET_STD

PICKLES = frozenset({"inception-v3-compat", "vgg16"})  # torch-fidelity's own; they unpickle what they load
CODE = ("clip-", "dinov2-")  # TorchScript, and a repository of code
DINOV2_SIZE = 224


class InceptionFeatures:
    """ADM's Inception (arXiv 2105.05233, Sec. 2.2): pool 2048, spatial 17·17·7, logits without bias 1008."""

    def __init__(self, state: dict[str, Tensor], device: torch.device, fingerprint: str) -> None:
        self.fingerprint, self.device = fingerprint, device
        layers = ["2048", "logits_unbiased"]  # the constructor takes a list and no tuple
        self.network = FeatureExtractorInceptionV3(
            "inception-v3-compat", layers, feature_extractor_weights_path=as_file(state)
        )
        self.network.to(device)
        self._spatial: Tensor | None = None
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._tap)

    def _tap(self, module: Any, args: Any, output: Tensor) -> None:
        # (N, 192, 17, 17) → (N, 17, 17, 7): TensorFlow's order, in which the stored mu_s and sigma_s are.
        self._spatial = output[:, : INCEPTION_GRID[2]].permute(0, 2, 3, 1).flatten(1).float()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        _check_images(images)
        with strict_float32(self.device):
            pool, logits = self.network(images.to(self.device))
        spatial, self._spatial = self._spatial, None
        return _checked(Features(pool, spatial, logits))


class RegisteredFeatures:
    """Named layers of an extractor that is registered with torch-fidelity."""

    def __init__(self, config: RegisteredConfig, device: torch.device, fingerprint: str) -> None:
        if config.module is not None:
            try:
                importlib.import_module(config.module)
            except ImportError as error:
                raise ValueError(f"extractor.module: {config.module} cannot be imported: {error}") from error
        if config.name not in FEATURE_EXTRACTORS_REGISTRY:
            known = ", ".join(sorted(FEATURE_EXTRACTORS_REGISTRY))
            raise ValueError(f"extractor.name: {config.name}; allowed: {known}")
        self.fingerprint, self.device, self.config = fingerprint, device, config
        self.layers = [layer for layer in (config.pooled, config.spatial, config.logits) if layer is not None]
        provided = FEATURE_EXTRACTORS_REGISTRY[config.name].get_provided_features_list()
        for layer in self.layers:
            if layer not in provided:
                raise ValueError(f"extractor: {config.name} has no layer {layer}; allowed: {', '.join(provided)}")
        self.network = _registered(config, self.layers).to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        _check_images(images)
        with strict_float32(self.device):
            values = self.network(images.to(self.device))
        by_layer = {layer: value.flatten(1).float() for layer, value in zip(self.layers, values, strict=True)}
        config = self.config
        spatial = None if config.spatial is None else by_layer[config.spatial]
        logits = None if config.logits is None else by_layer[config.logits]
        return _checked(Features(by_layer[config.pooled], spatial, logits))


def _registered(config: RegisteredConfig, layers: list[str]) -> Any:
    """The network, on the CPU; its weights are not unpickled, and downloaded by one rank of each machine.

    Raises:
        ValueError: where it would run what it loads or downloads, and that is not allowed.
    """

    def create(weights: Any) -> Any:
        return create_feature_extractor(
            config.name, layers, cuda=False, feature_extractor_weights_path=weights, verbose=False
        )

    path = None
    if config.weights is not None or config.url is not None:
        path = fetch(config.weights, config.url, config.sha256)
    if config.name in PICKLES and path is not None:
        return create(as_file(load_state(path)))
    if config.name.startswith(CODE) or config.name in PICKLES:
        if path is not None and config.name.startswith("dinov2-"):
            raise ValueError("extractor.weights: torch-fidelity's DINOv2 takes none; take extractor.kind dinov2")
        if not config.trust_remote_code:
            source = "downloads" if path is None else "loads"
            raise ValueError(
                f"extractor: {config.name} runs what it {source}; allowed: trust_remote_code=true if that is "
                "meant, weights of inception-v3-compat or vgg16, or kind dinov2"
            )
        if path is None and distributed.local_rank() == 0:
            create(None)
        distributed.barrier()
    return create(None if path is None else str(path))


def as_file(state: dict[str, Tensor]) -> io.BytesIO:
    """Tensors that are checked already, for a constructor that would unpickle a file."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


class DINOv2Features:
    """The class token of a DINOv2 on images of 224 pixels, resized as EDM2 does it (arXiv 2312.02696): bicubic with
    anti-aliasing. torch-fidelity's is bilinear without: their distances cannot be compared."""

    def __init__(
        self, config: DINOv2ExtractorConfig, state: dict[str, Tensor], device: torch.device, fingerprint: str
    ) -> None:
        import timm
        from timm.models.vision_transformer import checkpoint_filter_fn

        self.fingerprint, self.device = fingerprint, device
        try:
            network = timm.create_model(config.model, pretrained=False, img_size=DINOV2_SIZE, num_classes=0)
        except RuntimeError as error:
            raise ValueError(f"extractor.model: {config.model}: {error}") from error
        try:
            side = network.patch_embed.grid_size[0]
            state = {**state, "pos_embed": dinov2_positions(state["pos_embed"], side)}
            network.load_state_dict(checkpoint_filter_fn(state, network))
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"extractor.weights: not those of {config.model}: {error}") from error
        self.network = network.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        _check_images(images)
        pixels = images.to(self.device).float()
        with strict_float32(self.device):
            size = (DINOV2_SIZE, DINOV2_SIZE)
            pixels = functional.interpolate(pixels, size=size, mode="bicubic", antialias=True)
            mean, std = (torch.tensor(v, device=self.device)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
            token = self.network((pixels / 255 - mean) / std)
        return _checked(Features(token.float(), None, None))


def dinov2_positions(positions: Tensor, side: int) -> Tensor:
    """Positions (1, 1 + n·n, D) of the class token and a grid, for a grid of `side`: (1, 1 + side·side, D).

    As in the DINOv2 authors' code: bicubic by the factor (side + 0.1) / n, without anti-aliasing.
    """
    n = math.isqrt(positions.shape[1] - 1)
    if n == side:
        return positions
    grid = positions[:, 1:].float().unflatten(1, (n, n)).permute(0, 3, 1, 2)  # (1, D, n, n)
    factor = (side + 0.1) / n
    grid = functional.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
    assert grid.shape[2:] == (side, side)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"images of shape {tuple(images.shape)} and type {images.dtype}; features are taken of (N, 3, H, W) uint8"
        )


def _checked(features: Features) -> Features:
    for name, tensor in features.tensors().items():
        if not bool(tensor.isfinite().all()):
            raise FloatingPointError(f"the extractor's {name} features are not finite: its weights are broken")
    return features
