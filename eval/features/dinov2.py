"""DINOv2, for FD-DINOv2 (arXiv 2306.04675). N images · D feature channels."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from eval.features.config import DINOv2ExtractorConfig
from eval.features.extractor import Features, check_images, checked
from sfd_scale.runtime.matmul import strict_float32
from sfd_scale.tokenizers.vision_encoder import IMAGENET_MEAN, IMAGENET_STD

SIZE = 224


class DINOv2Features:
    """The class token of a DINOv2 for images resized to 224 pixels.

    The resize is that of EDM2 (arXiv 2312.02696): bicubic with anti-aliasing. torch-fidelity's is bilinear without
    anti-aliasing; do not compare distances of the two.
    """

    def __init__(
        self, config: DINOv2ExtractorConfig, state: dict[str, Tensor], device: torch.device, fingerprint: str
    ) -> None:
        import timm
        from timm.models.vision_transformer import checkpoint_filter_fn

        self.fingerprint, self.device = fingerprint, device
        try:
            network = timm.create_model(config.model, pretrained=False, img_size=SIZE, num_classes=0)
        except RuntimeError as error:
            raise ValueError(f"extractor.model: {config.model}: {error}") from error
        try:
            side = network.patch_embed.grid_size[0]
            state = {**state, "pos_embed": resized_positions(state["pos_embed"], side)}
            network.load_state_dict(checkpoint_filter_fn(state, network))
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"extractor.weights: not those of {config.model}: {error}") from error
        self.network = network.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        check_images(images)
        pixels = images.to(self.device).float()
        with strict_float32(self.device):
            size = (SIZE, SIZE)
            pixels = functional.interpolate(pixels, size=size, mode="bicubic", antialias=True)
            mean, std = (torch.tensor(v, device=self.device)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
            token = self.network((pixels / 255 - mean) / std)
        return checked(Features(token.float(), None, None))


def resized_positions(positions: Tensor, side: int) -> Tensor:
    """Position embeddings (1, 1 + n·n, D) of the class token and a grid, for a grid of `side`: (1, 1 + side·side, D).

    As in the official DINOv2 code: bicubic by the factor (side + 0.1) / n, without anti-aliasing.
    """
    n = math.isqrt(positions.shape[1] - 1)
    if n == side:
        return positions
    grid = positions[:, 1:].float().unflatten(1, (n, n)).permute(0, 3, 1, 2)  # (1, D, n, n)
    factor = (side + 0.1) / n
    grid = functional.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
    assert grid.shape[2:] == (side, side)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
