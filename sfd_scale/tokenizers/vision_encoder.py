"""Pretrained, frozen vision encoders: DINOv2 and other networks of timm, and the small convnet of the quickstart.

N batch · D feature channels · H, W image · h, w feature grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional

from sfd_scale.runtime.settings import at_least
from sfd_scale.tokenizers import timm_network
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
        side = config.image_size * 14 // 16
        model = timm_network.load_network(
            config.model, config.weights, input_size=side, head=False, key="tokenizer.vision.weights"
        )
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
    return timm_network.preprocess(images, images.shape[2] * 14 // 16, IMAGENET_MEAN, IMAGENET_STD)


@dataclass(frozen=True, kw_only=True)
class TimmEncoderConfig:
    """A network of timm: a vision transformer or a convolutional network.

    model: a name of timm, such as vit_base_patch16_dinov3, or hf-hub:owner/repository.
    weights: a safetensors or torch file of timm or of the network's official code; `pip:` and the name of an installed
        package with one such file; null to download them from the hub.
    block: a module whose output gives the features, such as blocks.4; null for the last features, after the last norm.
    image_size: the side of the images. input_size: the side to which they are resized; null for image_size.
    mean, std: of the channels in [0, 1]; null for those that the network was trained with.
    layer_norm: normalise the channels at each position, without weights, as the last norm of DINOv2 does.
    """

    kind: Literal["timm"] = "timm"
    model: str
    weights: Path | None = None
    block: str | None = None
    image_size: int = 256
    input_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    layer_norm: bool = False

    def __post_init__(self) -> None:
        at_least(self, image_size=1)
        if self.input_size is not None:
            at_least(self, input_size=1)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != 3:
                raise ValueError(f"{name}: {values}; allowed: three numbers, or null")


class TimmEncoder(Frozen[Any]):
    """The feature grid of a block of a timm network.

    Raises:
        ValueError: if the network has no such block, or its features are no square grid.
    """

    def __init__(self, model: Any, config: TimmEncoderConfig) -> None:
        super().__init__(
            model.to(memory_format=torch.channels_last)
        )  # convolutions on CPUs take two thirds of the time
        self.config = config
        self.input_size = config.input_size or config.image_size
        mean, std = timm_network.statistics(model)
        self.mean, self.std = config.mean or mean, config.std or std
        blank = torch.zeros(1, 3, config.image_size, config.image_size, dtype=torch.uint8)
        try:
            self.dim, self._grid, width = self.features(blank).shape[1:]
        except AttributeError as error:
            raise ValueError(f"block: {config.block}; allowed: a module of {config.model}: {error}") from error
        if self._grid != width:
            raise ValueError(f"block: {config.block}; its features are no square grid: {self._grid} × {width}")
        settings = f"{config.model} {config.block} {self.input_size} {self.mean} {self.std} {config.layer_norm}"
        self.fingerprint = fingerprint("timm", model.state_dict(), settings)

    @classmethod
    def load(cls, config: TimmEncoderConfig) -> Self:
        size = config.input_size or config.image_size
        return cls(
            timm_network.load_network(
                config.model, config.weights, input_size=size, head=False, key="tokenizer.vision.weights"
            ),
            config,
        )

    def grid(self, image_size: int) -> int:
        """The side of the feature grid.

        Raises:
            ValueError: for another size of images than the encoder was made for.
        """
        if image_size != self.config.image_size:
            raise ValueError(f"tokenizer.vision.image_size: {self.config.image_size}; allowed: {image_size}")
        return self._grid

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 → (N, D, h, w) float32."""
        size = self.config.image_size
        if images.shape[2:] != (size, size):
            raise ValueError(
                f"images are {tuple(images.shape[2:])}; allowed: {size}, as tokenizer.vision.image_size says"
            )
        pixels = timm_network.preprocess(images, self.input_size, self.mean, self.std)
        grid = timm_network.feature_grid(self.model, pixels, self.config.block)
        if self.config.layer_norm:
            grid = functional.layer_norm(grid.movedim(1, -1), (grid.shape[1],)).movedim(-1, 1).contiguous()
        return grid


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
