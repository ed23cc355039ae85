"""A network of timm as a feature extractor. N images."""

from __future__ import annotations

import torch
from torch import Tensor

from eval.features.config import TimmExtractorConfig
from eval.features.extractor import Features, check_images, checked
from sfd_scale.runtime.matmul import strict_float32
from sfd_scale.tokenizers import timm_network


class TimmFeatures:
    """Pooled features: the input of the network's classifier, or the mean of a block. Logits: its classes, if any."""

    def __init__(self, config: TimmExtractorConfig, device: torch.device, fingerprint: str) -> None:
        self.fingerprint, self.device, self.config = fingerprint, device, config
        network = timm_network.load_network(
            config.model, config.weights, input_size=config.input_size, key="extractor.weights"
        )
        self.network = network.to(device, memory_format=torch.channels_last)
        mean, std = timm_network.statistics(network)
        self.mean, self.std = config.mean or mean, config.std or std

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        check_images(images)
        with strict_float32(self.device):
            pixels = timm_network.preprocess(images.to(self.device), self.config.input_size, self.mean, self.std)
            if self.config.block is not None:
                grid = timm_network.feature_grid(self.network, pixels, self.config.block)
                return checked(Features(grid.mean((2, 3)), None, None))
            maps = self.network.forward_features(pixels)
            pooled = self.network.forward_head(maps, pre_logits=True)
            logits = self.network.get_classifier()(pooled).float() if self.network.num_classes else None
        return checked(Features(pooled.float(), None, logits))
