"""Compressible images and a small vision encoder, for tests of tokenizers."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sfd_scale.tokenizers import protocols as codec
from sfd_scale.tokenizers.vision_encoder import ConvNetEncoderConfig
from sfd_scale.toy.convnet import SmallConvNet, SmallConvNetConfig

CPU = torch.device("cpu")


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def smooth_images(count: int, size: int = 32, seed: int = 0) -> Tensor:
    """Images whose neighbouring pixels correlate, so that PCA can compress them: (N, 3, H, W) uint8."""
    coarse = draws(count, 3, size // 4, size // 4, seed=seed)
    fine = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")
    return codec.to_uint8(0.4 * fine + 0.02 * draws(count, 3, size, size, seed=seed + 1))


def convnet(path: Path) -> ConvNetEncoderConfig:
    model = SmallConvNet(SmallConvNetConfig(widths=(8, 16)))
    model.init_weights(0)
    save_file(model.state_dict(), path)
    return ConvNetEncoderConfig(weights=path)
