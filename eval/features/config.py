"""Settings of feature extractors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sfd_scale.runtime.settings import at_least

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
Pooling = Literal["token", "avg", "map"]
INCEPTION_GRID = (17, 17, 7)  # rows, columns and channels of the spatial features


@dataclass(frozen=True, kw_only=True)
class InceptionConfig:
    """torch-fidelity's Inception weights: a file, or null to download them from `url` (91 MB), once per machine."""

    kind: Literal["inception"] = "inception"
    weights: Path | None = None
    url: str = INCEPTION_URL
    sha256: str = INCEPTION_SHA256


@dataclass(frozen=True, kw_only=True)
class RegisteredConfig:
    """Layers of an extractor that is registered with torch-fidelity.

    module: a Python module that registers the extractor; it is imported first.
    pooled, spatial, logits: names of layers.
    weights: loaded without running code from the file. Without weights, torch-fidelity's own extractors download theirs
        and run code from the download (vgg16, clip-*: a pickle; dinov2-*: a repository). `trust_remote_code` allows
        that.
    """

    name: str
    pooled: str
    spatial: str | None = None
    logits: str | None = None
    module: str | None = None
    weights: Path | None = None
    url: str | None = None
    sha256: str | None = None
    trust_remote_code: bool = False
    kind: Literal["registered"] = "registered"

    def __post_init__(self) -> None:
        _check_url(self.url, self.sha256)


@dataclass(frozen=True, kw_only=True)
class DINOv2ExtractorConfig:
    """The class token of a DINOv2 (arXiv 2304.07193), for FD-DINOv2 (arXiv 2306.04675). No spatial features, no logits.

    weights: an official file of DINOv2, such as dinov2_vitl14_pretrain.pth; or null, with its `url` and `sha256`.
    """

    weights: Path | None = None
    url: str | None = None
    sha256: str | None = None
    model: str = "vit_large_patch14_dinov2"
    kind: Literal["dinov2"] = "dinov2"

    def __post_init__(self) -> None:
        _check_url(self.url, self.sha256)
        if self.weights is None and self.url is None:
            raise ValueError("weights: null; allowed: an official file of DINOv2, or its url and sha256")


@dataclass(frozen=True, kw_only=True)
class TimmExtractorConfig:
    """A network of timm: pooled features, and logits if it has a classifier. No spatial features.

    model, weights, mean, std: as for `tokenizer.vision.kind: timm`. Weights have to be given.
    block: a module whose output, averaged over its positions, gives the pooled features, without logits; null for the
        input of the classifier. A block with fewer channels needs fewer samples.
    input_size: the side to which images are resized; null for that of the network's config in timm. Where it is no
        multiple of the patch, zeros are added.
    pooling: null for the input of the classifier. `token` is the class token, `avg` the mean of the patches or places,
        `map` the attention pooling of SigLIP; these give no logits.
    interpolation, antialias: of the resize.
    """

    model: str
    weights: Path
    block: str | None = None
    input_size: int | None = 224
    pooling: Pooling | None = None
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    antialias: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    kind: Literal["timm"] = "timm"

    def __post_init__(self) -> None:
        at_least(self, input_size=1)
        if self.block is not None and self.pooling not in (None, "avg"):
            raise ValueError(f"pooling: {self.pooling}, with a block; allowed: avg")
        if self.interpolation == "bilinear" and not self.antialias:
            raise ValueError("interpolation: bilinear, with antialias false; allowed: bicubic, or antialias true")


PresetName = Literal["convnextv2_b", "dinov2_l", "dinov3_l", "mae_l", "siglip2", "clip_l"]
ExtractorName = Literal["inception", PresetName]


@dataclass(frozen=True, kw_only=True)
class PresetConfig:
    """A network of timm under a short name, with the settings of FD-loss (arXiv 2604.28190).

    weights: a safetensors or torch file of timm or of the network's official code.
    """

    kind: PresetName
    weights: Path


def _check_url(url: str | None, sha256: str | None) -> None:
    if url is not None and sha256 is None:
        raise ValueError(f"sha256: null, with the url {url}; allowed: the SHA-256 of that file")


@dataclass(frozen=True, kw_only=True)
class ConvNetConfig:
    """A SmallConvNet classifier from `sfd export`, for data that Inception was not trained on."""

    weights: Path
    kind: Literal["convnet"] = "convnet"


ExtractorConfig = (
    InceptionConfig | RegisteredConfig | ConvNetConfig | DINOv2ExtractorConfig | TimmExtractorConfig | PresetConfig
)
