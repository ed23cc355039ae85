"""Extractors that are registered with torch-fidelity. N images."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor

from eval.features.config import RegisteredConfig
from eval.features.downloads import as_file, fetch, load_state
from eval.features.extractor import Features, check_images, checked
from sfd_scale.runtime import distributed
from sfd_scale.runtime.matmul import strict_float32

PICKLES = frozenset({"inception-v3-compat", "vgg16"})  # torch-fidelity's own extractors that unpickle their weights
CODE = ("clip-", "dinov2-")  # prefixes of those that run TorchScript, or the code of a repository


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
        check_images(images)
        with strict_float32(self.device):
            values = self.network(images.to(self.device))
        by_layer = {layer: value.flatten(1).float() for layer, value in zip(self.layers, values, strict=True)}
        config = self.config
        spatial = None if config.spatial is None else by_layer[config.spatial]
        logits = None if config.logits is None else by_layer[config.logits]
        return checked(Features(by_layer[config.pooled], spatial, logits))


def _registered(config: RegisteredConfig, layers: list[str]) -> Any:
    """The network, on the CPU. One rank per machine downloads its weights. They are not unpickled.

    Raises:
        ValueError: if the network would run code from its weights or its download, and that is not allowed.
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
                f"extractor: {config.name} runs code from what it {source}; allowed: trust_remote_code=true if that is "
                "intended, weights of inception-v3-compat or vgg16, or kind dinov2"
            )
        if path is None and distributed.local_rank() == 0:
            create(None)
        distributed.barrier()
    return create(None if path is None else str(path))
