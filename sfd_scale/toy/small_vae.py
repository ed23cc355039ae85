"""A small variational autoencoder of images (arXiv 1312.6114). It serves as a texture VAE on a CPU.

N batch · C latent channels · H, W image · P pixels per side of a patch · h, w latent grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from sfd_scale.runtime import seeding
from sfd_scale.runtime.settings import at_least

_GROUPS = 8
_LOGVAR_BOUNDS = (-30.0, 20.0)  # as in latent diffusion's VAE (arXiv 2112.10752)


@dataclass(frozen=True, kw_only=True)
class SmallVAEConfig:
    """The encoder reads patches of `patch` pixels per side. Every width but the first halves the grid.

    blocks: residual blocks per width, in the encoder and in the decoder.
    """

    kind: Literal["small_vae"] = "small_vae"
    patch: int = 4
    widths: tuple[int, ...] = (64, 96, 128)
    blocks: int = 2
    latent_channels: int = 16
    image_size: int = 64

    def __post_init__(self) -> None:
        if not self.widths or any(width < 1 or width % _GROUPS for width in self.widths):
            raise ValueError(f"widths: {self.widths}; allowed: one or more multiples of {_GROUPS}")
        at_least(self, patch=1, blocks=1, latent_channels=1)
        step = self.downsample
        if self.image_size < step or self.image_size % step:
            raise ValueError(f"image_size: {self.image_size}; allowed: multiples of {step} (one latent position)")

    @property
    def downsample(self) -> int:
        """Pixels per side of one position of the latent grid."""
        return self.patch * 2 ** (len(self.widths) - 1)

    @property
    def grid(self) -> int:
        """Side of the latent grid."""
        return self.image_size // self.downsample

    @property
    def description(self) -> str:
        widths = ", ".join(map(str, self.widths))
        return f"{self.kind}, 1/{self.downsample}, {self.latent_channels} channels, widths {widths}"


class Residual(nn.Module):
    """(N, D, h, w) → the same. The last convolution starts at zero (arXiv 1901.09321)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(_GROUPS, width)
        self.conv = nn.Conv2d(width, width, kernel_size=3, padding=1)
        self.out = nn.Conv2d(width, width, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return x + self.out(functional.silu(self.conv(functional.silu(self.norm(x)))))


class SmallVAE(nn.Module):
    """Its decoder has convolutions at every resolution, so that neighbouring latents join without an edge."""

    def __init__(self, config: SmallVAEConfig) -> None:
        super().__init__()
        self.config = config
        widths, channels, pixels = config.widths, config.latent_channels, 3 * config.patch**2
        steps = list(pairwise(widths))
        self.encoder_in = nn.Conv2d(pixels, widths[0], kernel_size=3, padding=1)
        self.down = nn.ModuleList([nn.Conv2d(4 * a, b, kernel_size=1) for a, b in steps])
        self.encoder_blocks = nn.ModuleList([_level(width, config.blocks) for width in widths])
        self.encoder_norm = nn.GroupNorm(_GROUPS, widths[-1])
        self.encoder_out = nn.Conv2d(widths[-1], 2 * channels, kernel_size=1)
        self.decoder_in = nn.Conv2d(channels, widths[-1], kernel_size=3, padding=1)
        self.up = nn.ModuleList([nn.Conv2d(b, 4 * a, kernel_size=1) for a, b in steps])
        self.decoder_blocks = nn.ModuleList([_level(width, config.blocks) for width in widths])
        self.decoder_norm = nn.GroupNorm(_GROUPS, widths[0])
        self.decoder_out = nn.Conv2d(widths[0], pixels, kernel_size=3, padding=1)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W) in [−1, 1] → mean and log-variance, (N, C, h, w) float32 each."""
        x = self.encoder_in(functional.pixel_unshuffle(images, self.config.patch).to(self.encoder_in.weight.dtype))
        for number, level in enumerate(self.encoder_blocks):
            x = level(x if number == 0 else self.down[number - 1](functional.pixel_unshuffle(x, 2)))
        mean, logvar = self.encoder_out(self.encoder_norm(x)).float().chunk(2, dim=1)
        return mean, logvar.clamp(*_LOGVAR_BOUNDS)

    def reconstruct(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) → (N, 3, H, W) float32; [−1, 1] is the range of pixels."""
        x = self.decoder_in(latents.to(self.decoder_in.weight.dtype))
        for number in reversed(range(len(self.decoder_blocks))):
            x = self.decoder_blocks[number](x)
            if number:
                x = functional.pixel_shuffle(self.up[number - 1](x), 2)
        pixels = self.decoder_out(functional.silu(self.decoder_norm(x)))
        return functional.pixel_shuffle(pixels, self.config.patch).float()

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (N, 3, H, W) in [−1, 1], standard normal noise (N, C, h, w) → reconstruction, mean, log-variance."""
        mean, logvar = self.posterior(images)
        return self.reconstruct(mean + torch.exp(0.5 * logvar) * noise), mean, logvar

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Normal convolutions of unit gain, zero biases, unit norms; residual blocks start as the identity."""
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, seed))


def _level(width: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(*[Residual(width) for _ in range(blocks)])


def initial_value(name: str, shape: torch.Size, seed: int) -> Tensor:
    """The initial value of a parameter: its full shape, float32, on the CPU."""
    value = torch.zeros(shape)
    if name.endswith(("bias", ".out.weight")):
        return value
    if "norm" in name:
        return value.fill_(1)
    return value.normal_(0, shape[1:].numel() ** -0.5, generator=seeding.generator(seed, f"init:{name}"))


def config_of(state: Mapping[str, Tensor]) -> SmallVAEConfig:
    """The config of a SmallVAE, from the shapes of its weights; `image_size` is one latent position.

    Raises:
        ValueError: if these are not weights of a SmallVAE.
    """
    needed = ("encoder_in.weight", "decoder_in.weight", "encoder_blocks.0.0.out.weight")
    missing = [name for name in needed if name not in state]
    if missing:
        raise ValueError(f"these are not the weights of a small_vae: {', '.join(missing)} is missing")
    first = state["encoder_in.weight"]
    widths = [first.shape[0]]
    while f"down.{len(widths) - 1}.weight" in state:
        widths.append(state[f"down.{len(widths) - 1}.weight"].shape[0])
    blocks = 0
    while f"encoder_blocks.0.{blocks}.out.weight" in state:
        blocks += 1
    patch = round((first.shape[1] / 3) ** 0.5)
    return SmallVAEConfig(
        patch=patch, widths=tuple(widths), blocks=blocks, latent_channels=state["decoder_in.weight"].shape[1],
        image_size=patch * 2 ** (len(widths) - 1),
    )  # fmt: skip
