"""From a seed and image numbers to images. Image i is a function of (weights, sampler, seed, i) and nothing else.

Its noise comes from a generator of its own and its label from one table; batches have one fixed size, so that every
kernel sees the same rows whatever the number of ranks or the order in which batches are done.

N images · C channels · H, W latent grid · B the fixed batch.
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
    """images (N, 3, H', W') uint8 and the velocity evaluations that each took, nfe (N,) int64."""

    images: Tensor
    nfe: Tensor


@dataclass(frozen=True)
class DrawnLatents:
    """Latents as the codec takes them, (B, C, H, W) with the copies that fill the batch up; nfe (N,) int64."""

    latents: Tensor
    nfe: Tensor


@dataclass(frozen=True)
class Sampler:
    """All that turns image numbers into images. `kinks` are further jumps of the velocity (guidance.interval_kinks);
    `decode_batch` latents are decoded at once, all of a batch by default."""

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
        """The images of the given numbers and labels (N,), N at most B; see `draw` and `pixels`."""
        drawn = self.draw(indices, labels)
        return Sampled(self.pixels(drawn), drawn.nfe)

    @torch.no_grad()
    def draw(self, indices: Sequence[int], labels: Tensor) -> DrawnLatents:
        """The latents of the given numbers and labels (N,), N at most B.

        A short batch is filled up with its last image: B rows are always computed.

        Raises:
            FloatingPointError: if a latent is not finite, naming the image.
        """
        assert 0 < len(indices) <= self.batch and len(labels) == len(indices)
        padding = self.batch - len(indices)
        padded = [*indices, *[indices[-1]] * padding]
        classes = torch.cat([labels, labels[-1:].expand(padding)]).to(self.device)
        noise = noise_of(self.seed, padded, self.layout).to(self.device)
        result = sample(self.velocity, noise, classes, self.schedule, self.layout, self.config, self.discontinuities)
        _check_finite(result.x, padded)
        return DrawnLatents(self.stats.denormalize(result.x), result.nfe[: len(indices)].cpu())

    @torch.no_grad()
    def pixels(self, drawn: DrawnLatents) -> Tensor:
        """Decode latents, `decode_batch` at a time, and drop the copies: (N, 3, H', W') uint8."""
        parts = [self.decode(part) for part in drawn.latents.split(self.decode_batch or self.batch)]
        images = torch.cat(parts) if len(parts) > 1 else parts[0]
        assert images.dtype == torch.uint8
        return images[: len(drawn.nfe)]


def noise_of(seed: int, indices: Sequence[int], layout: LatentLayout) -> Tensor:
    """The starting noise of each image, from its own CPU generator: (N, C, H, W) float32."""
    return seeding.normal(seed, "sample_noise", [(index,) for index in indices], layout.shape)


def balanced_labels(seed: int, count: int, num_classes: int) -> Tensor:
    """The label of every image, each class as often as the others to within one: (count,) int64.

    Shuffled: in class order, an Inception Score over splits of the file halves.
    """
    return (torch.arange(count) % num_classes)[seeding.permutation(seed, "labels", count)]


def iid_labels(seed: int, count: int, num_classes: int) -> Tensor:
    """Independent uniform labels: (count,) int64."""
    return torch.randint(num_classes, (count,), generator=seeding.generator(seed, "labels_iid"))


def _check_finite(x: Tensor, indices: Sequence[int]) -> None:
    bad = (~x.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    if bad:
        numbers = sorted({indices[row] for row in bad})
        raise FloatingPointError(
            f"{len(numbers)} images have latents that are not finite (image {numbers[0]} first): the weights are "
            "broken, or bf16 or the guidance scale is too much for them; try precision=fp32, or a smaller scale"
        )
