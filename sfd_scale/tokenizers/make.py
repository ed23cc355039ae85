"""Settings of a composite tokenizer, and the functions that make its parts from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sfd_scale.diffusion.latents import LatentLayout
from sfd_scale.tokenizers.composite import CompositeTokenizer, FeatureTokenizer
from sfd_scale.tokenizers.patch_pca import PatchPCA, PatchPCAConfig
from sfd_scale.tokenizers.pca import FeaturePCA, FeaturePCAConfig
from sfd_scale.tokenizers.protocols import Precision, SemanticCodec, TextureCodec, VisionEncoder
from sfd_scale.tokenizers.semantic_codec import SemanticVAECodec, SemanticVAECodecConfig
from sfd_scale.tokenizers.small_vae import SmallVAECodec, SmallVAECodecConfig
from sfd_scale.tokenizers.texture_vae import AutoencoderKLCodec, AutoencoderKLConfig
from sfd_scale.tokenizers.vision_encoder import (
    ConvNetEncoder,
    ConvNetEncoderConfig,
    DINOv2,
    DINOv2Config,
    TimmEncoder,
    TimmEncoderConfig,
)

TextureConfig = AutoencoderKLConfig | PatchPCAConfig | SmallVAECodecConfig
VisionConfig = DINOv2Config | TimmEncoderConfig | ConvNetEncoderConfig
SemanticConfig = SemanticVAECodecConfig | FeaturePCAConfig


@dataclass(frozen=True, kw_only=True)
class CompositeConfig:
    """A texture codec, and a vision encoder whose features a semantic codec compresses. A part may be null if nothing
    needs it.

    precision: of encoding. Decoding is float32, with TF32 on GPUs unless an evaluation is in fp32.
    """

    texture: TextureConfig | None = None
    vision: VisionConfig | None = None
    semantic: SemanticConfig | None = None
    precision: Precision = "fp32"


def make_texture(config: TextureConfig, device: torch.device) -> TextureCodec:
    match config:
        case PatchPCAConfig():
            return PatchPCA.load(config).to(device)
        case SmallVAECodecConfig():
            return SmallVAECodec.load(config).to(device)
        case AutoencoderKLConfig():
            return AutoencoderKLCodec.load(config).to(device)


def make_vision(config: VisionConfig, device: torch.device) -> VisionEncoder:
    encoder: VisionEncoder
    match config:
        case DINOv2Config():
            encoder = DINOv2.load(config)
        case TimmEncoderConfig():
            encoder = TimmEncoder.load(config)
        case ConvNetEncoderConfig():
            encoder = ConvNetEncoder.load(config)
    return encoder.to(device)


def make_semantic(config: SemanticConfig, device: torch.device) -> SemanticCodec:
    codec = FeaturePCA.load(config) if isinstance(config, FeaturePCAConfig) else SemanticVAECodec.load(config)
    return codec.to(device)


def make_features(config: CompositeConfig, device: torch.device) -> FeatureTokenizer:
    """Make the vision encoder without codecs.

    Raises:
        ValueError: if there is none.
    """
    if config.vision is None:
        raise ValueError("tokenizer.vision: null; allowed: a vision encoder")
    return FeatureTokenizer(make_vision(config.vision, device), config.precision)


def make_composite(config: CompositeConfig, layout: LatentLayout, device: torch.device) -> CompositeTokenizer:
    """Make all parts.

    Raises:
        ValueError: if there is no texture codec, or the parts do not fit the layout or each other.
    """
    if config.texture is None:
        raise ValueError("tokenizer.texture: null; allowed: a texture codec")
    # The vision encoder comes last because it may be downloaded.
    semantic = None if config.semantic is None else make_semantic(config.semantic, device)
    texture = make_texture(config.texture, device)
    vision = None if config.vision is None else make_vision(config.vision, device)
    return CompositeTokenizer(texture, vision, semantic, layout, config.precision)
