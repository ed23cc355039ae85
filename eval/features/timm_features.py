"""A network of timm as a feature extractor. N images · D feature channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from eval.features.config import TimmExtractorConfig
from eval.features.extractor import Features, check_images, checked
from sfd_scale.runtime.matmul import strict_float32
from sfd_scale.tokenizers import timm_network


class TimmFeatures:
    """Pooled features: the input of the network's classifier, or another pooling. Logits: its classes, if any.

    Images are padded with zeros to whole patches.

    Raises:
        ValueError: if the weights do not fit the network, or the network lacks the pooling.
    """

    def __init__(self, config: TimmExtractorConfig, device: torch.device, fingerprint: str) -> None:
        self.fingerprint, self.device, self.config = fingerprint, device, config
        own_size, patch = network_size(config.model)
        self.size = config.input_size or own_size
        self.padding = -self.size % patch
        self.has_logits = config.block is None and config.pooling is None
        network = timm_network.load_network(
            config.model, config.weights, input_size=self.size + self.padding, head=self.has_logits,
            key="extractor.weights",
        )  # fmt: skip
        check_pooling(config, network)
        self.network = network.to(device, memory_format=torch.channels_last)
        mean, std = timm_network.statistics(network)
        self.mean, self.std = config.mean or mean, config.std or std

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        check_images(images)
        with strict_float32(self.device):
            pixels = self._pixels(images.to(self.device))
            if not self.has_logits:
                return checked(Features(pooled(self.network, pixels, self.config).float(), None, None))
            rows = self.network.forward_head(self.network.forward_features(pixels), pre_logits=True)
            logits = self.network.get_classifier()(rows).float() if self.network.num_classes else None
        return checked(Features(rows.float(), None, logits))

    def _pixels(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 → normalised (N, 3, S, S) float32."""
        given: Tensor = images
        if self.config.antialias and images.shape[2:] != (self.size, self.size):
            given = functional.interpolate(
                images.float(), size=(self.size, self.size), mode=self.config.interpolation, antialias=True
            )
        pixels = timm_network.preprocess(given, self.size, self.mean, self.std)
        return functional.pad(pixels, (0, self.padding, 0, self.padding)) if self.padding else pixels


def pooled(network: Any, pixels: Tensor, config: TimmExtractorConfig) -> Tensor:
    """The features of normalised images (N, 3, S, S) by the settings' block and pooling: (N, D)."""
    if config.block is not None or config.pooling == "avg":
        return timm_network.feature_grid(network, pixels, config.block).mean((2, 3))
    features: Tensor = network.forward_features(pixels)
    return features[:, 0] if config.pooling == "token" else network.attn_pool(features)


def network_size(model: str) -> tuple[int, int]:
    """The side of the images that timm names for a network, and that of its patches; 1 for other networks than ViTs.

    Raises:
        ValueError: if timm does not know the network.
    """
    import timm

    try:
        with torch.device("meta"):
            network = timm.create_model(model, pretrained=False)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"extractor.model: {model}: {error}") from error
    embed = network._modules.get("patch_embed")
    patch = int(vars(embed)["patch_size"][0]) if embed is not None and "patch_size" in vars(embed) else 1
    return int(network.pretrained_cfg["input_size"][-1]), patch


def check_pooling(config: TimmExtractorConfig, network: Any) -> None:
    """Raises ValueError if the network has no class token or no attention pooling."""
    if config.pooling == "token" and not vars(network).get("num_prefix_tokens"):
        raise ValueError(f"extractor.pooling: token; {config.model} has no class token; allowed: null, avg or map")
    if config.pooling == "map" and network._modules.get("attn_pool") is None:
        raise ValueError(
            f"extractor.pooling: map; {config.model} has no attention pooling; allowed: null, token or avg"
        )
