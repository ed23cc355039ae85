"""The quickstart's images: handwritten digits (scikit-learn's dataset) on procedural backgrounds.

The digit is the semantics. Its colour, its placement and the background are the texture. Image i of a split is a
function of (seed, split, i).
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from sfd_scale.runtime import seeding

Split = Literal["train", "reference"]
NUM_CLASSES = 10
_REFERENCE_EVERY = 5  # every fifth handwritten digit of a class is for reference images


@functools.cache
def digits_by_class() -> tuple[Tensor, ...]:
    """All handwritten digits: ten tensors (n, 8, 8) in [0, 1]."""
    try:
        from sklearn.datasets import load_digits  # takes half a second to import
    except ModuleNotFoundError as error:
        raise ValueError(
            "source.kind: digits, which come with scikit-learn; install it: pip install 'sfd-scale[quickstart]'"
        ) from error

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float() / 16.0
    labels = torch.from_numpy(bunch.target)
    return tuple(images[labels == label] for label in range(NUM_CLASSES))


@functools.cache
def handwritten(split: Split) -> tuple[Tensor, ...]:
    """The digits of a split, by class: ten tensors (n, 8, 8) in [0, 1]. The splits share no digit."""
    chosen = []
    for own in digits_by_class():
        reference = torch.arange(len(own)) % _REFERENCE_EVERY == 0
        chosen.append(own[reference if split == "reference" else ~reference])
    return tuple(chosen)


def digit_image(seed: int, split: Split, index: int, size: int = 32) -> tuple[Tensor, int]:
    """Image `index` of a split: ((3, size, size) uint8, class). The class is index mod 10, so classes are balanced."""
    label = index % NUM_CLASSES
    generator = seeding.generator(seed, f"digits_{split}", index)
    uniform = torch.rand(32, generator=generator).tolist()
    digits = handwritten(split)[label]
    mask = _placed(digits[int(uniform[0] * len(digits))], uniform[1:6], size)
    ink, dark, light = _colours(uniform[6:12])
    weight = _pattern(uniform[12:20], size)
    background = dark[:, None, None] * (1 - weight) + light[:, None, None] * weight
    image = background * (1 - mask) + ink[:, None, None] * mask
    return (image * 255).round().clamp(0, 255).to(torch.uint8), label


def _placed(digit: Tensor, u: list[float], size: int) -> Tensor:
    """The digit's mask, (1, size, size) in [0, 1]: rotated by up to 10°, 70 to 90 % of the image's height, shifted."""
    angle = math.radians(20 * u[0] - 10)
    zoom = 1 / (0.72 + 0.2 * u[1])
    cos, sin = zoom * math.cos(angle), zoom * math.sin(angle)
    shift = [0.24 * (v - 0.5) for v in u[2:4]]
    matrix = torch.tensor([[[cos, -sin, shift[0]], [sin, cos, shift[1]]]])
    grid = functional.affine_grid(matrix, [1, 1, size, size], align_corners=False)
    # Upsample smoothly first: 8 pixels sampled directly to 32 would show blocks.
    smooth = functional.interpolate(digit[None, None], scale_factor=4, mode="bicubic", align_corners=False)
    ink = functional.grid_sample(smooth, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[0]
    return ((ink - 0.25) / 0.4).clamp(0, 1)


def _colours(u: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """The digit's colour and the two background colours, (3,) each in [0, 1]. The digit is much lighter or darker."""
    hue, other = u[0], (u[0] + 0.08 + 0.12 * u[1]) % 1
    ink_hue = (hue + 0.35 + 0.3 * u[2]) % 1
    if u[3] < 0.5:
        return _hsv(ink_hue, 0.25 + 0.5 * u[4], 1.0), _hsv(hue, 0.8, 0.2), _hsv(other, 0.7, 0.32 + 0.15 * u[5])
    return _hsv(ink_hue, 0.9, 0.1 + 0.25 * u[4]), _hsv(hue, 0.45, 0.72), _hsv(other, 0.3, 0.88 + 0.1 * u[5])


def _hsv(hue: float, saturation: float, value: float) -> Tensor:
    """Hue, saturation and value in [0, 1] → red, green, blue (3,)."""
    phase = (hue * 6 + torch.tensor([0.0, 4.0, 2.0])) % 6
    return value * (1 - saturation * (1 - ((phase - 3).abs() - 1).clamp(0, 1)))


def _pattern(u: list[float], size: int) -> Tensor:
    """Weight of the light background colour, (1, size, size) in [0, 1]: a gradient, stripes, rings or checks."""
    axis = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    angle, frequency, phase = 2 * math.pi * u[0], 3 + 5 * u[1], 2 * math.pi * u[2]
    along = x * math.cos(angle) + y * math.sin(angle)
    across = -x * math.sin(angle) + y * math.cos(angle)
    kind = int(4 * u[3])
    if kind == 0:
        wave = along / math.sqrt(2)
    elif kind == 1:
        wave = torch.sin(frequency * along + phase)
    elif kind == 2:
        wave = torch.sin(frequency * torch.hypot(x - u[4] + 0.5, y - u[5] + 0.5) + phase)
    else:
        wave = torch.sin(frequency * along + phase) * torch.sin(frequency * across + phase)
    return (0.5 + 0.5 * wave)[None]
