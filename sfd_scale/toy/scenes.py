"""The study's images: colour scenes of several handwritten digits on backgrounds with long-range structure.

The class of a scene is its most frequent digit. The background has two regions, a front and a back one; each has one
wave pattern over its whole area. Scene i of a split is a function of (seed, split, i).
"""

from __future__ import annotations

import colorsys
import functools
import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from sfd_scale.runtime import seeding
from sfd_scale.toy.digits import NUM_CLASSES, digits_by_class

SceneSplit = Literal["train", "reference", "classifier"]
# Of every five handwritten digits of a class: three for training, one for reference images, one for the classifier.
_SPLITS: dict[str, tuple[int, ...]] = {"reference": (0,), "classifier": (1,), "train": (2, 3, 4)}
_CELLS = 3  # per side: nine cells, one digit each at most
_MAX_DIGITS = 5  # in a scene


@functools.cache
def scene_digits(split: SceneSplit) -> tuple[Tensor, ...]:
    """The digits of a split, by class, upsampled: ten tensors (n, 24, 24). The splits share no digit."""
    chosen = []
    for own in digits_by_class():
        turn = torch.arange(len(own)) % 5
        picked = own[torch.isin(turn, torch.tensor(_SPLITS[split]))]
        chosen.append(functional.interpolate(picked[:, None], size=(24, 24), mode="bicubic", align_corners=False)[:, 0])
    return tuple(chosen)


def scene_image(seed: int, split: SceneSplit, index: int, size: int = 64) -> tuple[Tensor, int]:
    """Scene `index` of a split: ((3, size, size) uint8, class). The class is index mod 10, so classes are balanced.

    In the classifier's split all digits of a scene have its class: a small network then learns the digits sooner.
    """
    label = index % NUM_CLASSES
    generator = seeding.generator(seed, f"scenes_{split}", index)
    u = torch.rand(64, generator=generator).tolist()
    shown = _contents(label, u[0], torch.randperm(NUM_CLASSES - 1, generator=generator).tolist())
    if split == "classifier":
        shown = [label] * len(shown)
    places = torch.randperm(_CELLS**2, generator=generator)[: len(shown)].tolist()
    background, dark = _background(u[1:15], size)
    masks = _placed(split, shown, places, u[15 : 15 + 5 * _MAX_DIGITS], size)  # (n, size, size)
    image = background
    for mask, hue in zip(masks, u[40 : 40 + _MAX_DIGITS], strict=False):
        ink = _colour(hue, 0.35, 1.0) if dark else _colour(hue, 0.95, 0.3)
        image = torch.lerp(image, ink.expand_as(image), mask)
    return (image * 255).round().clamp(0, 255).to(torch.uint8), label


def _contents(label: int, u: float, others: list[int]) -> list[int]:
    """Three to five digits: the class two or three times, others once each."""
    same, more = ((2, 1), (2, 2), (3, 1), (3, 2))[int(4 * u)]
    return [label] * same + [other + (other >= label) for other in others[:more]]


def _placed(split: SceneSplit, shown: list[int], places: list[int], u: list[float], size: int) -> Tensor:
    """A mask for each digit, (n, size, size) in [0, 1]: in its cell, shifted, rotated and scaled a little."""
    sets = scene_digits(split)
    digits, matrices = [], []
    for number, (digit, place) in enumerate(zip(shown, places, strict=True)):
        which, dx, dy, turn, zoom = u[5 * number : 5 * number + 5]
        digits.append(sets[digit][int(which * len(sets[digit]))])
        scale = _CELLS / (0.95 + 0.2 * zoom)  # from the scene's coordinates to the digit's
        cos, sin = (scale * f(math.radians(20 * turn - 10)) for f in (math.cos, math.sin))
        x = (2 * (place % _CELLS) + 1) / _CELLS - 1 + 0.12 * (dx - 0.5)
        y = (2 * (place // _CELLS) + 1) / _CELLS - 1 + 0.12 * (dy - 0.5)
        matrices.append([[cos, -sin, -cos * x + sin * y], [sin, cos, -sin * x - cos * y]])
    grid = (_homogeneous(size) @ torch.tensor(matrices).mT).view(len(shown), size, size, 2)
    ink = functional.grid_sample(torch.stack(digits)[:, None], grid, mode="bilinear", align_corners=False)[:, 0]
    return ((ink - 0.25) / 0.4).clamp(0, 1)


@functools.cache
def _coordinates(size: int) -> tuple[Tensor, Tensor]:
    axis = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return y, x


@functools.cache
def _homogeneous(size: int) -> Tensor:
    """(x, y, 1) of each pixel's centre: (size · size, 3)."""
    axis = (torch.arange(size) * 2 + 1) / size - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)], -1).view(-1, 3)


def _colour(hue: float, saturation: float, value: float) -> Tensor:
    """A colour, (3, 1, 1) in [0, 1]. Python floats are faster than tensors for three numbers."""
    return torch.tensor(colorsys.hsv_to_rgb(hue, saturation, value)).view(3, 1, 1)


def _background(u: list[float], size: int) -> tuple[Tensor, bool]:
    """The background, (3, size, size) in [0, 1], and whether it is dark. The front region is a disc or a half plane."""
    y, x = _coordinates(size)
    dark, angle = u[0] < 0.5, 2 * math.pi * u[1]
    if u[2] < 0.5:
        edge = x * math.cos(angle) + y * math.sin(angle) - (u[3] - 0.5)
    else:
        edge = 0.45 + 0.35 * u[3] - torch.hypot(x - 0.8 * (u[4] - 0.5), y - 0.8 * (u[5] - 0.5))
    front = (edge * (size / 4) + 0.5).clamp(0, 1)
    hue = u[6]
    weights = [_wave(u[7 + 3 * part : 10 + 3 * part], part, x, y) for part in (0, 1)]
    low, high = (0.14, 0.42) if dark else (0.66, 0.95)
    colours = []
    for part, weight in enumerate(weights):
        own = (hue + (0.3 + 0.4 * u[13]) * part) % 1
        colours.append(torch.lerp(_colour(own, 0.65, low), _colour((own + 0.08) % 1, 0.4, high), weight))
    return torch.lerp(colours[0], colours[1], front), dark


def _wave(u: list[float], part: int, x: Tensor, y: Tensor) -> Tensor:
    """A weight in [0, 1] at each point: stripes with one phase over the region, or rings."""
    frequency, phase, angle = 4 + 6 * u[0], 2 * math.pi * u[1], 2 * math.pi * u[2]
    if part == 0 and u[2] < 0.3:
        along = torch.hypot(x - math.cos(9 * angle), y - math.sin(9 * angle))
    else:
        along = x * math.cos(angle) + y * math.sin(angle)
    return 0.5 + 0.5 * torch.sin(frequency * along + phase)
