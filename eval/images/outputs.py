"""Images that generation stores on request: an .npz for ADM's evaluator, PNG files, and a grid by class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from eval.images import npz
from eval.work.chunks import ChunkFolder
from sfd_scale.runtime.files import atomically, write_atomically
from sfd_scale.runtime.settings import at_least

GRID, NPZ, PNG = "grid.png", "samples.npz", "png"


@dataclass(frozen=True, kw_only=True)
class OutputsConfig:
    """Which images are stored. The chunks then hold them too.

    npz: all images, in one file for ADM's evaluator.
    png: all images, in a folder.
    grid: images per class in grid.png; 0: no grid. grid_classes: its classes.
    """

    npz: bool = False
    png: bool = False
    grid: int = 8
    grid_classes: int = 16

    def __post_init__(self) -> None:
        at_least(self, grid=0, grid_classes=1)

    @property
    def all_images(self) -> bool:
        return self.npz or self.png


def kept_images(config: OutputsConfig) -> dict[str, Any]:
    """The settings that decide which images the chunks hold."""
    if config.all_images:
        return {"all": True}
    return {"grid": config.grid, "grid_classes": config.grid_classes}


def kept_rows(config: OutputsConfig, labels: Tensor) -> set[int]:
    """Numbers of the images that the chunks hold: all, or those in the grid."""
    if config.all_images:
        return set(range(len(labels)))
    return {number for row in grid_rows(config, labels) for number in row}


def grid_rows(config: OutputsConfig, labels: Tensor) -> list[list[int]]:
    """Numbers of the images in the grid, one class per row."""
    return rows_by_class(labels, config.grid_classes, config.grid) if config.grid else []


def rows_by_class(labels: Tensor, classes: int, each: int) -> list[list[int]]:
    """The first `each` images of up to `classes` classes, spread evenly over the classes that occur."""
    present = labels.unique()
    chosen = present[torch.linspace(0, len(present) - 1, min(classes, len(present))).round().long()]
    return [(labels == label).nonzero().flatten()[:each].tolist() for label in chosen]


def write(config: OutputsConfig, folder: ChunkFolder, labels: Tensor) -> None:
    """Write the requested files from the committed chunks."""
    if config.grid:
        rows = grid_rows(config, labels)
        images = images_by_number(folder, {number for row in rows for number in row})
        save_grid([[images[number] for number in row] for row in rows], folder.path / GRID)
    if config.npz:
        first = next(folder.read("images"))
        size = (first.shape[2], first.shape[3])
        npz.write_images(folder.path / NPZ, folder.read("images"), folder.total, size, labels)
    if config.png:
        _write_png(folder, labels)


def images_by_number(folder: ChunkFolder, wanted: set[int]) -> dict[int, Tensor]:
    """Images (3, H, W) uint8 of the chunks, by their number."""
    found = {}
    for images, numbers in zip(folder.read("images"), folder.read("image_numbers"), strict=True):
        found.update(
            {number: image for image, number in zip(images, numbers.tolist(), strict=True) if number in wanted}
        )
    return found


def save_grid(rows: list[list[Tensor]], path: Path, gap: int = 2) -> None:
    """Write a PNG with one row of images per class. Short rows end in white."""
    with atomically(path) as temporary:
        to_image(tile(rows, gap)).save(temporary)


def tile(rows: list[list[Tensor]], gap: int = 2) -> Tensor:
    """Images (3, H, W) uint8 in rows → one image (3, H', W') uint8 on white."""
    _, height, width = rows[0][0].shape
    columns = max(len(row) for row in rows)
    sheet = torch.full((3, len(rows) * (height + gap) - gap, columns * (width + gap) - gap), 255, dtype=torch.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            top, left = i * (height + gap), j * (width + gap)
            sheet[:, top : top + height, left : left + width] = image
    return sheet


def to_image(image: Tensor) -> Image.Image:
    """(3, H, W) uint8 → a PIL image."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def _write_png(folder: ChunkFolder, labels: Tensor) -> None:
    """One file per image, named by its number, and labels.txt. Names by class would order the files by class, and
    scores of such a folder are wrong."""
    out = folder.path / PNG
    number = 0
    for images in folder.read("images"):
        for image in images:
            path = out / f"{number:06d}.png"
            if not path.exists():
                with atomically(path, sync=False) as temporary:
                    to_image(image).save(temporary)
            number += 1
    write_atomically(out / "labels.txt", "".join(f"{label}\n" for label in labels.tolist()))
