"""Networks of timm under short names, and what FD-loss (arXiv 2604.28190) measured with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from eval.features.config import (
    ExtractorConfig,
    ExtractorName,
    InceptionConfig,
    Pooling,
    PresetConfig,
    PresetName,
    RegisteredConfig,
    TimmExtractorConfig,
)

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


@dataclass(frozen=True)
class Preset:
    """A network of timm with its pooling and the side of its images, as FD-loss (arXiv 2604.28190) uses it."""

    model: str
    pooling: Pooling
    size: int


PRESETS: dict[PresetName, Preset] = {
    "convnextv2_b": Preset("convnextv2_base.fcmae_ft_in22k_in1k", "avg", 224),
    "dinov2_l": Preset("vit_large_patch14_dinov2.lvd142m", "token", 256),
    "dinov3_l": Preset("vit_large_patch16_dinov3.lvd1689m", "token", 256),  # not of FD-loss
    "mae_l": Preset("vit_large_patch16_224.mae", "token", 224),
    "siglip2": Preset("vit_so400m_patch16_siglip_256.v2_webli", "map", 224),
    "clip_l": Preset("vit_large_patch14_clip_224.openai", "token", 256),
}
# FD of ImageNet's validation set at 256 pixels against the training set, rounded as published: FD-loss (arXiv
# 2604.28190), with the statistics of its release; RAEv2 (arXiv 2605.18324) divides by the same numbers. The mean of the
# six ratios is FDr6. The networks ran in bfloat16 there; here they run in float32.
PUBLISHED_VALIDATION_FD: dict[ExtractorName, float] = {
    "inception": 1.68,
    "convnextv2_b": 56.87,
    "dinov2_l": 14.19,
    "mae_l": 0.04,
    "siglip2": 0.60,
    "clip_l": 5.60,
}


def timm_config(config: PresetConfig) -> TimmExtractorConfig:
    """The settings that a short name stands for."""
    preset = PRESETS[config.kind]
    return TimmExtractorConfig(
        model=preset.model, weights=config.weights, pooling=preset.pooling, input_size=preset.size, antialias=True
    )


def by_name(name: ExtractorName, folder: Path | None) -> InceptionConfig | PresetConfig:
    """The extractor of a short name, with the weights NAME.safetensors, .pth, .pt or .bin of a folder.

    Raises:
        ValueError: if the folder has no such file. Inception's weights are then downloaded, as without a folder.
    """
    found = [] if folder is None else [folder / f"{name}{suffix}" for suffix in SUFFIXES]
    weights = next((path for path in found if path.is_file()), None)
    if name == "inception":
        return InceptionConfig(weights=weights)
    if weights is None:
        where = "extractor_weights: null" if folder is None else f"extractor_weights: {folder} has no {name}.*"
        raise ValueError(
            f"{where}; allowed: a folder with {name}{SUFFIXES[0]} (or {', '.join(SUFFIXES[1:])}), or "
            f"{{kind: {name}, weights: FILE}} in extractors"
        )
    return PresetConfig(kind=name, weights=weights)


def short_name(config: ExtractorConfig) -> str:
    """The name of an extractor in results and of its folders."""
    match config:
        case TimmExtractorConfig(model=model):
            return model if config.block is None else f"{model}.{config.block}"
        case RegisteredConfig(name=name):
            return name
        case _:
            return config.kind


def named(configs: list[ExtractorConfig]) -> Mapping[str, ExtractorConfig]:
    """The extractors by their names. A name that occurs again gets a number."""
    found: dict[str, ExtractorConfig] = {}
    for config in configs:
        name, count = short_name(config).replace("/", "_").replace(":", "_"), 1
        unique = name
        while unique in found:
            count += 1
            unique = f"{name}-{count}"
        found[unique] = config
    return found
