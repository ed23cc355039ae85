"""A small image classifier. Its feature grid serves as a vision encoder, its pooled features as a feature extractor.

N batch · H, W image · h, w feature grid · D channels · K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from sfd_scale.runtime import seeding
from sfd_scale.runtime.settings import at_least

_GROUPS = 8


@dataclass(frozen=True, kw_only=True)
class SmallConvNetConfig:
    """One stage per width; each halves the image. The last stage gives the feature grid, whose mean is classified."""

    kind: Literal["convnet"] = "convnet"
    widths: tuple[int, ...] = (32, 96, 128)
    num_classes: int = 10
    image_size: int = 32

    def __post_init__(self) -> None:
        if not self.widths or any(width < 1 or width % _GROUPS for width in self.widths):
            raise ValueError(f"widths: {self.widths}; allowed: one or more multiples of {_GROUPS}")
        at_least(self, num_classes=2)
        step = 2 ** len(self.widths)
        if self.image_size < step or self.image_size % step:
            raise ValueError(f"image_size: {self.image_size}; allowed: multiples of {step} (each width halves it)")

    @property
    def description(self) -> str:
        return f"{self.kind}, widths {', '.join(map(str, self.widths))}"

    @property
    def grid(self) -> int:
        """Side of the feature grid."""
        return self.image_size // 2 ** len(self.widths)


class ConvFeatures(NamedTuple):
    """grid: (N, D, h, w), normalised over D at each position. pooled: (N, D), its mean. logits: (N, K). All float32."""

    grid: Tensor
    pooled: Tensor
    logits: Tensor


class Stage(nn.Module):
    """Strided convolution, then a residual convolution: (N, D, H, W) → (N, D', H/2, W/2)."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(inside, outside, kernel_size=3, stride=2, padding=1)
        self.norm = nn.GroupNorm(_GROUPS, outside)
        self.conv = nn.Conv2d(outside, outside, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return x + self.conv(functional.silu(self.norm(x)))


class SmallConvNet(nn.Module):
    """A convnet with group norm, so that the features of a sample do not depend on its batch.

    The classifier is linear in the mean of the grid. So every position must show the class (class activation maps,
    arXiv 1512.04150), like the patch tokens of a vision transformer.
    """

    def __init__(self, config: SmallConvNetConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList([Stage(a, b) for a, b in zip((3, *config.widths[:-1]), config.widths, strict=True)])
        self.classifier = nn.Linear(config.widths[-1], config.num_classes)

    def forward(self, images: Tensor) -> ConvFeatures:
        """(N, 3, H, W) uint8 → features and logits."""
        x = (images.float() / 127.5 - 1).to(self.classifier.weight.dtype)
        for stage in self.blocks:
            x = stage(x)
        # Unit scale at each position, like DINOv2's patch tokens after their norm.
        grid = functional.layer_norm(x.float().movedim(1, -1), x.shape[1:2]).movedim(-1, 1)
        pooled = grid.mean(dim=(2, 3))  # (N, D)
        return ConvFeatures(grid, pooled, self.classifier(pooled.to(x.dtype)).float())

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Kaiming-normal convolutions (arXiv 1502.01852, Eq. 10), a small classifier, zero biases, unit norms."""
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, seed))


def initial_value(name: str, shape: torch.Size, seed: int) -> Tensor:
    """The initial value of a parameter: its full shape, float32, on the CPU."""
    value = torch.zeros(shape)
    if name.endswith("bias"):
        return value
    if "norm" in name:
        return value.fill_(1)
    scale = 1.0 if name.startswith("classifier") else 2.0
    std = (scale / shape[1:].numel()) ** 0.5
    return value.normal_(0, std, generator=seeding.generator(seed, f"init:{name}"))


def config_of(state: Mapping[str, Tensor], image_size: int) -> SmallConvNetConfig:
    """The config of a SmallConvNet, from the shapes of its weights.

    Raises:
        ValueError: if these are not weights of a SmallConvNet.
    """
    widths: list[int] = []
    while f"blocks.{len(widths)}.down.weight" in state:
        widths.append(state[f"blocks.{len(widths)}.down.weight"].shape[0])
    if not widths or "classifier.weight" not in state:
        raise ValueError("these are not the weights of a convnet: blocks.0.down.weight or classifier.weight is missing")
    classes = state["classifier.weight"].shape[0]
    return SmallConvNetConfig(widths=tuple(widths), num_classes=classes, image_size=image_size)
