"""Pretrained, frozen vision encoders: DINOv2 from timm, and the small convnet of the quickstart.

N batch · D feature channels · H, W image · h, w feature grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional

from sfd_scale.runtime.weight_files import read_weights
from sfd_scale.tokenizers.protocols import Frozen, fingerprint, read_safetensors, with_weights
from sfd_scale.toy.convnet import SmallConvNet, config_of

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class DINOv2Config:
    """model: a name of timm, or hf-hub:owner/repository.

    weights: a safetensors or torch file of timm or of the official DINOv2 code; null to download them from the hub.
    """

    kind: Literal["dinov2"] = "dinov2"
    model: str = "vit_base_patch14_reg4_dinov2.lvd142m"
    weights: Path | None = None
    image_size: int = 256

    def __post_init__(self) -> None:
        if self.image_size < 16 or self.image_size % 16:
            raise ValueError(f"image_size: {self.image_size}; allowed: multiples of 16")


class DINOv2(Frozen[Any]):
    """Patch tokens of DINOv2 after its last norm (arXiv 2304.07193).

    Images are resized by 14/16, so that a patch of 14 pixels covers 16 pixels of the image.
    """

    def __init__(self, model: Any, image_size: int) -> None:
        super().__init__(model)
        self.image_size = image_size
        self.dim: int = model.embed_dim
        self.fingerprint = fingerprint("dinov2", model.state_dict())

    @classmethod
    def load(cls, config: DINOv2Config) -> Self:
        """Build the model with timm. Position embeddings are resampled to the grid of image_size / 16.

        Raises:
            ValueError: if timm does not know the model, or the weights do not fit it.
        """
        import timm
        from timm.models.vision_transformer import checkpoint_filter_fn

        side = config.image_size * 14 // 16
        try:
            model = timm.create_model(config.model, pretrained=config.weights is None, img_size=side, num_classes=0)
        except (RuntimeError, OSError, ValueError) as error:
            raise ValueError(
                f"model: {config.model}: {error}; to load no weights from the hub, set tokenizer.vision.weights"
            ) from error
        if config.weights is not None:
            try:
                model.load_state_dict(checkpoint_filter_fn(read_weights(config.weights), model))
            except RuntimeError as error:
                raise ValueError(f"weights: {config.weights} does not fit {config.model}: {error}") from error
        return cls(model, config.image_size)

    def grid(self, image_size: int) -> int:
        return image_size // 16

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 → (N, D, H/16, W/16) float32."""
        if images.shape[2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"images are {tuple(images.shape[2:])}; allowed: {self.image_size}, as tokenizer.vision.image_size says"
            )
        tokens = self.model.forward_features(preprocess(images))[:, self.model.num_prefix_tokens :]  # (N, T, D)
        grid = self.grid(self.image_size)
        return tokens.transpose(1, 2).unflatten(2, (grid, grid)).float().contiguous()


def preprocess(images: Tensor) -> Tensor:
    """Normalise uint8 images by ImageNet's mean and std, and resize them by 14/16: (N, 3, 14·H/16, 14·W/16) float32.

    The resize is bicubic without anti-aliasing.
    """
    # Channel by channel with Python numbers, so that the host does not wait for a copy to the device.
    channels = zip(images.unbind(1), IMAGENET_MEAN, IMAGENET_STD, strict=True)
    scaled = torch.stack([(channel.float() / 255 - mean) / std for channel, mean, std in channels], dim=1)
    return functional.interpolate(scaled, size=images.shape[2] * 14 // 16, mode="bicubic")


@dataclass(frozen=True, kw_only=True)
class ConvNetEncoderConfig:
    """weights: a safetensors export of a trained SmallConvNet."""

    kind: Literal["convnet"] = "convnet"
    weights: Path
    image_size: int = 32


class ConvNetEncoder(Frozen[SmallConvNet]):
    """The feature grid of a SmallConvNet."""

    def __init__(self, model: SmallConvNet) -> None:
        super().__init__(model)
        self.dim = model.config.widths[-1]
        self.fingerprint = fingerprint("convnet", model.state_dict())

    @classmethod
    def load(cls, config: ConvNetEncoderConfig) -> Self:
        state = read_safetensors(config.weights, "a convnet")
        return cls(with_weights(lambda: SmallConvNet(config_of(state, config.image_size)), state, config.weights))

    def grid(self, image_size: int) -> int:
        return image_size // 2 ** len(self.model.config.widths)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 → (N, D, h, w) float32."""
        return self.model(images).grid
