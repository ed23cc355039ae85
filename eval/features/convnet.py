"""SmallConvNet as a feature extractor of torch-fidelity, for images that Inception was not trained on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor
from torch.nn import functional
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from sfd_scale.export import EXPORT_KEY, read_note
from sfd_scale.runtime.weight_files import safetensors_metadata
from sfd_scale.tokenizers.vision_encoder import ConvNetEncoder, ConvNetEncoderConfig

NAME = "sfd-convnet"
CHANNELS = 7
_POOLED, _SPATIAL, _LOGITS = "pooled", "spatial", "logits"


class _Layers(TypedDict):
    pooled: str
    spatial: str
    logits: str


LAYERS: _Layers = {"pooled": _POOLED, "spatial": _SPATIAL, "logits": _LOGITS}


class ConvNetExtractor(FeatureExtractorBase):  # type: ignore[misc]
    """Layers: pooled (N, D); spatial (N, h·w·7), the first 7 channels of the grid; logits (N, K)."""

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(name, features_list)
        if feature_extractor_weights_path is None:
            raise ValueError("extractor.weights: missing; a convnet extractor needs an exported classifier")
        weights = Path(feature_extractor_weights_path)
        config = ConvNetEncoderConfig(weights=weights)
        config = dataclasses.replace(config, image_size=trained_size(weights) or config.image_size)
        encoder = ConvNetEncoder.load(config)
        self.model, self.image_size = encoder.model, config.image_size
        side = min(8, encoder.grid(config.image_size))
        self.spatial_grid = (side, side, CHANNELS)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(N, 3, H, W) uint8 → the requested layers, in their order."""
        if images.shape[-1] != self.image_size or images.shape[-2] != self.image_size:
            raise ValueError(
                f"the convnet extractor was trained on images of {self.image_size} pixels, these have "
                f"{tuple(images.shape[-2:])}; allowed: the Inception extractor, or a classifier for this size"
            )
        found = self.model(images)
        grid = functional.adaptive_avg_pool2d(found.grid[:, :CHANNELS], self.spatial_grid[:2])  # (N, 7, h, w)
        spatial = grid.permute(0, 2, 3, 1).flatten(1)
        values = {_POOLED: found.pooled, _SPATIAL: spatial, _LOGITS: found.logits}
        return tuple(values[layer] for layer in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return _POOLED, _SPATIAL, _LOGITS

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return {"isc": _LOGITS, "fid": _POOLED, "kid": _POOLED, "prc": _POOLED}[metric]

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> None:
        return None


def trained_size(weights: Path) -> int | None:
    """The side of the training images that the file records; None if it does not."""
    note = read_note(weights) if EXPORT_KEY in safetensors_metadata(weights) else {}
    size: int | None = note.get("recipe", {}).get("model", {}).get("image_size")
    return size


def register() -> str:
    """Register the extractor with torch-fidelity, once. Returns its name there."""
    if NAME not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(NAME, ConvNetExtractor)
    return NAME
