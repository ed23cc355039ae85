"""The picture of `sfd sample --over-time`: how the semantics and the texture of a few images form.

N images · K columns · C channels (texture and semantic) · h, w latent grid · H, W image.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sfd_scale.data.image_files import require_picture
from sfd_scale.diffusion.fixed_step import FixedStepConfig
from sfd_scale.diffusion.guidance import GuidanceConfig
from sfd_scale.diffusion.latents import LatentLayout
from sfd_scale.diffusion.sampler import Sampler
from sfd_scale.diffusion.schedule import Clocks
from sfd_scale.runtime.files import atomically
from sfd_scale.runtime.matmul import bf16_matmul_on_cpu
from sfd_scale.sample import Pipeline

logger = logging.getLogger(__name__)
_TILE, _GAP, _MARGIN = 128, 6, 128  # pixels: of a tile, between tiles, and left of the tiles
_INK, _SOFT = (28, 33, 40), (90, 99, 112)


@dataclass(frozen=True)
class State:
    """The latents of all images at one global time: x (N, C, h, w), normalised, and the clocks of both parts."""

    x: Tensor
    texture: float
    semantic: float


def over_time(
    pipeline: Pipeline, out: Path, *, labels: Sequence[int], columns: int, steps: int, seed: int,
    guidance: GuidanceConfig,
) -> Path:  # fmt: skip
    """Draw a PNG with two rows per image: its semantic and its texture latents at `columns` global times.

    The latents are the states of Euler's method, with their noise. Texture is decoded to pixels. Semantics are the
    first three principal components of the finished latents, as red, green and blue. The number in a tile is the cosine
    similarity to the finished latents of that part.

    Raises:
        ValueError: for a model without semantic channels, fewer steps than columns, or an `out` that is no picture.
    """
    require_picture(out)
    layout, schedule = pipeline.loaded.layout, pipeline.loaded.schedule
    if layout.semantic_channels == 0:
        raise ValueError("--over-time: this model has no semantic channels; leave --over-time out")
    if not 2 <= columns <= steps + 1:
        raise ValueError(f"--grid: {columns}; allowed with --over-time and {steps} steps: 2 to {steps + 1} columns")
    sampler = pipeline.sampler(guidance, FixedStepConfig(kind="euler", num_steps=steps), seed, len(labels))
    with bf16_matmul_on_cpu(pipeline.device):
        found = states(sampler, torch.tensor(labels))
        chosen = [found[round(i * (len(found) - 1) / (columns - 1))] for i in range(columns)]
        images = [pipeline.loaded.decode(sampler.stats.denormalize(state.x)).cpu() for state in chosen]
    colours = semantic_colours([state.x.cpu() for state in chosen], layout)
    rows = [[maps[number] for maps in part] for number in range(len(labels)) for part in (colours, images)]
    similar = similarities(chosen, layout)
    marks = [[f"{value:.2f}" for value in part[number]] for number in range(len(labels)) for part in similar]
    heads = [f"semantics {state.semantic:.2f}\ntexture {state.texture:.2f}" for state in chosen]
    with atomically(out) as temporary:
        _sheet(rows, marks, heads, ["semantics", "texture"] * len(labels)).save(temporary)
    logger.info(
        "%s: %d images at %d global times, 0 to %g; the semantics lead by delta_t %g", out, len(labels), columns,
        schedule.end, schedule.delta_t,
    )  # fmt: skip
    return out


def states(sampler: Sampler, labels: Tensor) -> list[State]:
    """The states of a solver with one evaluation per step: before each step, and after the last."""
    velocity, found = sampler.velocity, []

    def recorded(x: Tensor, clocks: Clocks, y: Tensor) -> Tensor:
        found.append(State(x.clone(), float(clocks.texture[0]), float(clocks.semantic[0])))
        return velocity(x, clocks, y)

    drawn = dataclasses.replace(sampler, velocity=recorded).draw(range(len(labels)), labels)
    return [*found, State(sampler.stats.normalize(drawn.latents), 1.0, 1.0)]


def similarities(found: Sequence[State], layout: LatentLayout) -> tuple[list[list[float]], list[list[float]]]:
    """Cosine similarity of each state to the last, for semantics and for texture: N lists of K numbers each."""
    parts = [layout.split(state.x.float().cpu()) for state in found]  # (texture, semantic)
    values = [
        [torch.cosine_similarity(part[index].flatten(1), parts[-1][index].flatten(1)) for part in parts]
        for index in (1, 0)
    ]
    semantic, texture = (torch.stack(columns, 1).tolist() for columns in values)
    return semantic, texture


def semantic_colours(latents: Sequence[Tensor], layout: LatentLayout) -> list[Tensor]:
    """The semantic parts of latents (N, C, h, w) as colours: (N, 3, h, w) uint8 each, by one projection.

    The projection is a PCA of the last latents. Two standard deviations on each side fill the range of a colour.
    """
    rows = [layout.split(x)[1].movedim(1, -1).flatten(0, 2).float() for x in latents]  # (N·h·w, S)
    mean = rows[-1].mean(0)
    directions = torch.linalg.svd(rows[-1] - mean, full_matrices=False).Vh[:3]  # (3, S), or fewer
    scale = 2 * ((rows[-1] - mean) @ directions.T).std(0).clamp(min=1e-6)
    found = []
    for x, part in zip(latents, rows, strict=True):
        unit = 0.5 + 0.5 * ((part - mean) @ directions.T / scale).clamp(-1, 1)
        wide = torch.nn.functional.pad(unit, (0, 3 - len(directions)), value=0.5)
        colours = wide.unflatten(0, (len(x), *x.shape[2:])).movedim(-1, 1)
        found.append((255 * colours).round().to(torch.uint8))
    return found


def _sheet(
    rows: Sequence[Sequence[Tensor]], marks: Sequence[Sequence[str]], heads: Sequence[str], names: Sequence[str]
) -> Image.Image:
    """Tiles (3, H, W) uint8. Texts are in each, above each column and left of each row. Two rows belong together."""
    top, step = 3 * _GAP + 44, _TILE + _GAP
    height = top + len(rows) * step + (len(rows) // 2) * 2 * _GAP
    sheet = Image.new("RGB", (_MARGIN + len(heads) * step, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    small = ImageFont.load_default(14)
    for column, text in enumerate(heads):
        draw.multiline_text((_MARGIN + column * step, _GAP), text, fill=_SOFT, font=font, spacing=6)
    for number, (row, name) in enumerate(zip(rows, names, strict=True)):
        y = top + number * step + (number // 2) * 2 * _GAP
        draw.text((_GAP, y + _TILE // 2 - 8), name, fill=_INK, font=font)
        for column, tile in enumerate(row):
            image, x = Image.fromarray(tile.permute(1, 2, 0).contiguous().numpy()), _MARGIN + column * step
            sheet.paste(image.resize((_TILE, _TILE), Image.Resampling.NEAREST), (x, y))
            draw.rectangle((x, y + _TILE - 19, x + 35, y + _TILE - 1), fill="white")
            draw.text((x + 3, y + _TILE - 18), marks[number][column], fill=_SOFT, font=small)
    return sheet
