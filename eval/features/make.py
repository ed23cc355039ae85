"""The extractor of a recipe, from its settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from eval.features.config import (
    ConvNetConfig,
    DINOv2ExtractorConfig,
    ExtractorConfig,
    InceptionConfig,
    PresetConfig,
    RegisteredConfig,
    TimmExtractorConfig,
)
from eval.features.downloads import fetch, load_state
from eval.features.extractor import Extractor, LazyExtractor
from eval.features.presets import timm_config
from sfd_scale.runtime.files import file_sha256
from sfd_scale.tokenizers.timm_network import weights_path


def make_extractor(config: ExtractorConfig, device: torch.device) -> LazyExtractor:
    """The extractor, to be built when it is needed."""
    return LazyExtractor(fingerprint(config), lambda: build_extractor(config, device))


def make_extractors(configs: Mapping[str, ExtractorConfig], device: torch.device) -> dict[str, LazyExtractor]:
    """Several extractors by name, each to be built when it is needed."""
    return {name: make_extractor(config, device) for name, config in configs.items()}


def fingerprint(config: ExtractorConfig) -> str:
    """The network and the hash of its weights, without building it."""
    match config:
        case InceptionConfig():
            return f"inception-v3-compat:{config.sha256}"
        case ConvNetConfig():
            return f"sfd-convnet:{file_sha256(config.weights)}"
        case DINOv2ExtractorConfig():
            return f"dinov2:{config.model}:{_weights_hash(config)}"
        case TimmExtractorConfig():
            settings = f"{config.block}:{config.input_size}:{config.mean}:{config.std}"
            if config.pooling is not None or config.antialias:
                settings += f":{config.pooling}:{config.interpolation}:{config.antialias}"
            return f"timm:{config.model}:{settings}:{file_sha256(_weights_file(config))}"
        case RegisteredConfig():
            code = [] if config.module is None else [config.module]
            weights = _weights_hash(config)
            return ":".join([*code, config.name, config.pooled, str(config.spatial), str(config.logits), weights])
        case PresetConfig():
            return fingerprint(timm_config(config))


def _weights_file(config: TimmExtractorConfig) -> Path:
    path = weights_path(config.weights)
    if not path.is_file():
        raise ValueError(f"extractor.weights: {path} does not exist; allowed: a file of {config.model}")
    return path


def _weights_hash(config: RegisteredConfig | DINOv2ExtractorConfig) -> str:
    if config.sha256 is not None:
        return config.sha256
    return "its own" if config.weights is None else file_sha256(config.weights)


def build_extractor(config: ExtractorConfig, device: torch.device) -> Extractor:
    """The extractor on `device`. All ranks have to call this; one rank per machine downloads what is missing."""
    # torch-fidelity and timm take seconds to import, and most commands build no extractor.
    match config:
        case InceptionConfig():
            from eval.features.inception import InceptionFeatures

            state = load_state(fetch(config.weights, config.url, config.sha256))
            return InceptionFeatures(state, device, fingerprint(config))
        case ConvNetConfig():
            from eval.features.convnet import LAYERS, register
            from eval.features.registered import RegisteredFeatures

            registered = RegisteredConfig(name=register(), weights=config.weights, **LAYERS)
            return RegisteredFeatures(registered, device, fingerprint(config))
        case DINOv2ExtractorConfig():
            from eval.features.dinov2 import DINOv2Features

            state = load_state(fetch(config.weights, config.url, config.sha256))
            return DINOv2Features(config, state, device, fingerprint(config))
        case TimmExtractorConfig():
            from eval.features.timm_features import TimmFeatures

            return TimmFeatures(config, device, fingerprint(config))
        case RegisteredConfig():
            from eval.features.registered import RegisteredFeatures

            return RegisteredFeatures(config, device, fingerprint(config))
        case PresetConfig():
            return build_extractor(timm_config(config), device)
