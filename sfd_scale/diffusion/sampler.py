"""Generate images from a seed and image numbers. Image i depends on (weights, sampler, seed, i) and nothing else.

Each image has its own noise generator, and its label comes from one table. Batches have a fixed size, so that kernels
give the same result for any number of ranks and any order of the batches.

N images · C channels · H, W latent grid · B the fixed batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfd_scale.diffusion.guidance import Velocity
from sfd_scale.diffusion.latents import LatentLayout, LatentStats
from sfd_scale.diffusion.samplers import SamplerConfig, sample
from sfd_scale.diffusion.schedule import SemanticFirstSchedule
from sfd_scale.runtime import seeding

Decode = Callable[[Tensor], Tensor]
"""Raw latents (N, C, H, W) → images (N, 3, H', W') uint8."""


@dataclass(frozen=True)
class Sampled:
    """images (N, 3, H', W') uint8; nfe (N,) int64, the number of velocity evaluations of each image."""

    images: Tensor
    nfe: Tensor


@dataclass(frozen=True)
class DrawnLatents:
    """latents (B, C, H, W), not normalised, with padding rows after the first N; nfe (N,) int64."""

    latents: Tensor
    nfe: Tensor


@dataclass(frozen=True)
class Sampler:
    """Everything needed to turn image numbers into images.

    discontinuities: of the velocity, in addition to the schedule's (guidance.interval_discontinuities).
    decode_batch: latents to decode at once; all of a batch by default.
    """

    velocity: Velocity
    layout: LatentLayout
    schedule: SemanticFirstSchedule
    config: SamplerConfig
    stats: LatentStats
    decode: Decode
    seed: int
    batch: int
    device: torch.device
    discontinuities: tuple[float, ...] = ()
    decode_batch: int | None = None

    def images(self, indices: Sequence[int], labels: Tensor) -> Sampled:
        """The images with these numbers and labels (N,), N at most B; see `draw` and `pixels`."""
        drawn = self.draw(indices, labels)
        return Sampled(self.pixels(drawn), drawn.nfe)

    @torch.no_grad()
    def draw(self, indices: Sequence[int], labels: Tensor) -> DrawnLatents:
        """The latents of the images with these numbers and conditions (N, …), such as labels; N at most B.

        Always computes B rows: the last image pads a short batch.

        Raises:
            FloatingPointError: if a latent is not finite; the message names the image.
        """
        assert 0 < len(indices) <= self.batch and len(labels) == len(indices)
        padding = self.batch - len(indices)
        padded = [*indices, *[indices[-1]] * padding]
        classes = torch.cat([labels, labels[-1:].expand(padding, *labels.shape[1:])]).to(self.device)
        noise = noise_of(self.seed, padded, self.layout).to(self.device)
        result = sample(self.velocity, noise, classes, self.schedule, self.layout, self.config, self.discontinuities)
        _check_finite(result.x, padded)
        return DrawnLatents(self.stats.denormalize(result.x), result.nfe[: len(indices)].cpu())

    @torch.no_grad()
    def pixels(self, drawn: DrawnLatents) -> Tensor:
        """Decode latents, `decode_batch` at a time, and drop the padding: (N, 3, H', W') uint8."""
        parts = [self.decode(part) for part in drawn.latents.split(self.decode_batch or self.batch)]
        images = torch.cat(parts) if len(parts) > 1 else parts[0]
        assert images.dtype == torch.uint8
        return images[: len(drawn.nfe)]


def noise_of(seed: int, indices: Sequence[int], layout: LatentLayout) -> Tensor:
    """The starting noise of each image, from its own CPU generator: (N, C, H, W) float32."""
    return seeding.normal(seed, "sample_noise", [(index,) for index in indices], layout.shape)


def _check_finite(x: Tensor, indices: Sequence[int]) -> None:
    bad = (~x.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    if bad:
        numbers = sorted({indices[row] for row in bad})
        raise FloatingPointError(
            f"{len(numbers)} images have latents that are not finite (the first is image {numbers[0]}); try "
            "precision=fp32 or a smaller guidance scale, and check that the weights are finite"
        )
