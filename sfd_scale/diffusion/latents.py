"""The composite latent: its texture and semantic channels, and their normalisation.

This file alone knows the channel order, texture first: [texture 0..T-1, semantic T..T+S-1], as in the official code.
The paper's formulas write [s, z].

N batch · C channels (T texture + S semantic) · H, W latent grid · D feature channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sfd_scale.runtime.files import write_atomically
from sfd_scale.runtime.settings import at_least
from sfd_scale.runtime.torch_file import TorchFile

# A std below this share of the mean is the rounding of float32 arithmetic.
CONSTANT = 1e-6
DETERMINISTIC_LOGVAR = -30.0  # stored for the latents of a codec without posterior variance


@dataclass(frozen=True, kw_only=True)
class LatentLayout:
    """Channels of the two parts, and height and width of the latent grid (ImageNet 256x256: 32 + 16 on 16x16)."""

    texture_channels: int = 32
    semantic_channels: int = 16
    size: int = 16

    def __post_init__(self) -> None:
        at_least(self, texture_channels=1, semantic_channels=0, size=1)

    @property
    def channels(self) -> int:
        return self.texture_channels + self.semantic_channels

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent."""
        return (self.channels, self.size, self.size)

    def split(self, x: Tensor, dim: int = 1) -> tuple[Tensor, Tensor]:
        """(texture, semantic) views of a tensor with C entries along `dim`.

        Raises:
            ValueError: if `dim` does not have C entries.
        """
        if x.shape[dim] != self.channels:
            raise ValueError(f"latents have {x.shape[dim]} channels; allowed: {self.channels}, as in {self}")
        texture, semantic = x.split([self.texture_channels, self.semantic_channels], dim)
        return texture, semantic

    def join(self, texture: Tensor, semantic: Tensor, dim: int = 1) -> Tensor:
        """The inverse of `split`."""
        joined = torch.cat([texture, semantic], dim)
        assert joined.shape[dim] == self.channels
        return joined

    def per_channel(self, texture: Tensor | float, semantic: Tensor | float, like: Tensor) -> Tensor:
        """Repeat one value per part (a number, a 0-d tensor or (N,)) over its channels: (N or 1, C, 1, 1).

        The result has the dtype and device of `like`.
        """
        # new_full fills a number in on the device; copying it there would make the host wait.
        parts = [
            v.to(like).reshape(-1, 1) if isinstance(v, Tensor) else like.new_full((1, 1), v)
            for v in (texture, semantic)
        ]
        rows = max(part.shape[0] for part in parts)
        wide = [
            part.expand(rows, count)
            for part, count in zip(parts, (self.texture_channels, self.semantic_channels), strict=True)
        ]
        return self.join(wide[0], wide[1])[:, :, None, None]


@dataclass(frozen=True)
class LatentStats:
    """Mean and standard deviation of each channel over the training set: (C,) float64 each."""

    mean: Tensor
    std: Tensor

    def __post_init__(self) -> None:
        if self.mean.shape != self.std.shape or self.mean.ndim != 1:
            raise ValueError(
                f"statistics of shapes {tuple(self.mean.shape)} and {tuple(self.std.shape)}; allowed: (C,) for both"
            )
        wrong = ~(self.std.isfinite() & self.mean.isfinite())
        if bool(wrong.any()):
            raise ValueError(
                f"latent {_listed(wrong.nonzero().flatten().tolist(), len(self.std))}: mean or std is not finite; "
                "compute the statistics again, from latents that are finite"
            )
        if constant := (self.std <= 0).nonzero().flatten().tolist():
            raise ValueError(constant_channels_error(constant, len(self.std)))

    def normalize(self, x: Tensor) -> Tensor:
        """(x − mean) / std for raw latents (N, C, H, W)."""
        return (x - self._wide(self.mean, x)) / self._wide(self.std, x)

    def denormalize(self, x: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        return x * self._wide(self.std, x) + self._wide(self.mean, x)

    def to(self, device: torch.device) -> LatentStats:
        """A copy on `device`, so that normalising there copies nothing from the host."""
        return LatentStats(self.mean.to(device), self.std.to(device))

    @staticmethod
    def _wide(values: Tensor, like: Tensor) -> Tensor:
        return values.to(like.device, like.dtype)[:, None, None]

    @property
    def hash(self) -> str:
        """SHA-256 over mean and std as float64 bytes. Every checkpoint stores it, to identify its data."""
        both = torch.cat([self.mean, self.std]).to("cpu", torch.float64).contiguous()
        return hashlib.sha256(both.numpy().tobytes()).hexdigest()

    def save(self, path: Path) -> None:
        from safetensors.torch import save  # here: models and losses need torch alone

        write_atomically(path, save({"mean": self.mean.double().contiguous(), "std": self.std.double().contiguous()}))

    @classmethod
    def load(cls, path: Path) -> LatentStats:
        """Read a file of `save`.

        Raises:
            ValueError: names the file, if it is damaged, is another kind of file, or a channel is constant.
        """
        from sfd_scale.runtime.weight_files import read_safetensors  # here: models and losses need torch alone

        state = read_safetensors(path)
        if not {"mean", "std"} <= state.keys():
            raise ValueError(f"{path}: not latent statistics: it has {', '.join(sorted(state))}, not mean and std")
        try:
            return cls(state["mean"], state["std"])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_official(cls, texture: Path, semantic: Path, layout: LatentLayout | None = None) -> LatentStats:
        """Read the official `latents_stats.pt` and `latents_sv_stats.pt` (mean and std of shape [1, C, 1, 1]).

        Raises:
            ValueError: if a file cannot be read, or does not fit its part of `layout`; the message names the file.
        """
        counts = (None, None) if layout is None else (layout.texture_channels, layout.semantic_channels)
        parts = [_official_stats(path, count) for path, count in zip((texture, semantic), counts, strict=True)]
        mean, std = (torch.cat([part[key].double().flatten() for part in parts]) for key in ("mean", "std"))
        try:
            return cls(mean, std)
        except ValueError as error:
            raise ValueError(
                f"{texture} (the first {parts[0]['mean'].numel()} channels), {semantic}: {error}"
            ) from error


def _official_stats(path: Path, channels: int | None) -> dict[str, Tensor]:
    file = TorchFile(path)
    content = file.content if isinstance(file.content, dict) else {}
    found = file.load({key: content.get(key) for key in ("mean", "std")})
    if not all(isinstance(part, Tensor) for part in found.values()):
        raise ValueError(f"{path}: no latent statistics; allowed: a dictionary with the tensors mean and std")
    if channels is not None and found["mean"].numel() != channels:
        raise ValueError(f"{path}: {found['mean'].numel()} channels; allowed here: {channels} (give texture first)")
    return found


def constant_channels_error(constant: Sequence[int], channels: int) -> str:
    """A sentence that names constant channels of `channels`, and the usual causes."""
    return (
        f"latent {_listed(constant, channels)}: constant, so normalisation would divide by 0; usual causes: an "
        "encoder without its trained weights, a codec with unused channels, or a source of equal images"
    )


def _listed(numbers: Sequence[int], channels: int) -> str:
    """Channel numbers in order, runs as `first-last`: "channels 3, 32-47 of 48"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    names = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    more = f" and {len(names) - 12} more ranges" if len(names) > 12 else ""
    return f"channel{'s' if len(numbers) > 1 else ''} {', '.join(names[:12])}{more} of {channels}"


class StatsAccumulator:
    """Per-channel mean and variance in one streaming pass, float64.

    Chan, Golub and LeVeque's pairwise update (1979). Chunks merged in a fixed order give the same bits for any number
    of ranks.
    """

    def __init__(self, channels: int) -> None:
        self.count = torch.zeros((), dtype=torch.float64)
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self.m2 = torch.zeros(channels, dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        """Add raw latents (N, C, H, W)."""
        values = x.detach().to("cpu", torch.float64).transpose(0, 1).flatten(1)  # (C, N·H·W)
        mean = values.mean(1)
        count = torch.tensor(values.shape[1], dtype=torch.float64)
        self._combine(count, mean, (values - mean[:, None]).square().sum(1))

    def merge(self, other: StatsAccumulator) -> None:
        self._combine(other.count, other.mean, other.m2)

    def _combine(self, count: Tensor, mean: Tensor, m2: Tensor) -> None:
        total = self.count + count
        if total == 0:
            return
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.m2 = self.m2 + m2 + delta.square() * (self.count * count / total)
        self.count = total

    def state(self) -> dict[str, Tensor]:
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> StatsAccumulator:
        new = cls(state["mean"].numel())
        new.count, new.mean, new.m2 = (state[key].double() for key in ("count", "mean", "m2"))
        return new

    def constant_channels(self) -> list[int]:
        """Channels whose std is 0 up to the precision of float32."""
        return ((self.m2 / self.count).sqrt() <= CONSTANT * self.mean.abs()).nonzero().flatten().tolist()

    def finish(self) -> LatentStats:
        """The statistics of all samples.

        Raises:
            ValueError: if there are none, or naming the channels that are constant.
        """
        if self.count == 0:
            raise ValueError("latent statistics of no samples; encode at least one image")
        if constant := self.constant_channels():
            raise ValueError(constant_channels_error(constant, len(self.mean)))
        return LatentStats(self.mean, (self.m2 / self.count).sqrt())
