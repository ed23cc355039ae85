"""Feature extractors by way of torch-fidelity: Inception with the spatial tap of sFID, and any registered one.

N images · P pooled · S = h·w·c spatial · K logits.
"""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor

from eval.features import INCEPTION_GRID, Features, RegisteredConfig, full_precision


class InceptionFeatures:
    """ADM's Inception (arXiv 2105.05233, Sec. 2.2): pool 2048, spatial 17·17·7, logits without bias 1008."""

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
        self._spatial = output[:, : INCEPTION_GRID[2]].permute(0, 2, 3, 1).flatten(1).float()

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
