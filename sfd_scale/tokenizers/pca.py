"""Principal component analysis (PCA), and PCA of vision features as semantic latents (ReDi, arXiv 2504.16064).

N batch · R rows · D feature channels · C components · h, w grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sfd_scale.runtime import distributed
from sfd_scale.runtime.files import atomically
from sfd_scale.runtime.settings import at_least
from sfd_scale.tokenizers.protocols import Posterior, fingerprint, read_safetensors


@dataclass(frozen=True)
class Components:
    """mean (D,); directions (C, D), strongest first; variance (C,) of the latents; float32.

    restoring: (C, D), the decoder. None for PCA, whose directions of unit length also decode.
    """

    mean: Tensor
    directions: Tensor
    variance: Tensor
    restoring: Tensor | None = None


class CovarianceAccumulator:
    """Count, mean and centred outer products of rows in one pass, float64 (Chan, Golub and LeVeque, 1979)."""

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64)

    @classmethod
    def of(cls, rows: Tensor) -> Self:
        """The accumulator of one batch of rows (R, D)."""
        wide = rows.detach().double().cpu()
        new = cls(wide.shape[1])
        new.count, new.mean = len(wide), wide.mean(0)
        centred = wide - new.mean  # without centring, squares of a large mean would lose digits
        new.outer = centred.T @ centred
        return new

    def merge(self, other: CovarianceAccumulator) -> None:
        total, delta = self.count + other.count, other.mean - self.mean
        self.mean = self.mean + delta * (other.count / total)
        self.outer += other.outer + delta.outer(delta) * (self.count * other.count / total)
        self.count = total

    def components(self, number: int) -> Components:
        """The strongest `number` eigenvectors of the covariance. The sign makes the largest entry of each positive.

        Raises:
            ValueError: if there are fewer rows or columns than components.
        """
        dim = len(self.mean)
        if not 1 <= number <= dim or self.count <= number:
            raise ValueError(f"channels: {number}; allowed: 1 to {dim}, and fewer than the rows to fit, {self.count}")
        values, vectors = torch.linalg.eigh(self.outer / self.count)
        directions = vectors.flip(1)[:, :number].T  # (C, D)
        largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
        variance = values.flip(0)[:number].clamp(min=0)
        return Components(self.mean.float(), (directions * largest.sign()).float(), variance.float())

    def aligned(self, number: int, inputs: int, alignment: float) -> Components:
        """The best linear latents of x that also predict features f, where each row is [x (inputs values), f].

        They are z = E·x, with `number` values, E and the decoders D and A minimising the mean of
        ‖x − D·z‖² + w·‖f − A·z‖². x and f are centred. w = alignment · var(x) / var(f), so that alignment 1 weights
        features and pixels equally, the balance of VA-VAE (arXiv 2501.01423).

        The solution is reduced-rank regression (Izenman, 1975) of [x; √w·f] on x: PCA of the prediction from x.

        Raises:
            ValueError: if there are fewer rows or columns than components.
        """
        if not 1 <= number <= inputs or self.count <= number:
            raise ValueError(
                f"channels: {number}; allowed: 1 to {inputs}, and fewer than the rows to fit, {self.count}"
            )
        covariance = self.outer / self.count
        own, cross = covariance[:inputs, :inputs], covariance[inputs:, :inputs]  # (D, D), (F, D)
        variances = covariance.diagonal()
        weight = alignment * variances[:inputs].sum() / variances[inputs:].sum().clamp(min=1e-30)
        predicts = cross @ torch.linalg.pinv(own, hermitian=True, rtol=1e-10) * weight.sqrt()  # √w·f from x: (F, D)
        both = torch.cat([torch.eye(inputs, dtype=own.dtype), predicts])  # [x; √w·f] from x
        _, vectors = torch.linalg.eigh(both @ own @ both.T)
        outputs = vectors.flip(1)[:, :number].T  # (C, D + F)
        largest = outputs.gather(1, outputs.abs().argmax(1, keepdim=True))
        outputs = outputs * largest.sign()
        encoder = outputs @ both  # (C, D)
        variance = ((encoder @ own) * encoder).sum(1).clamp(min=0)
        return Components(
            self.mean[:inputs].float(), encoder.float(), variance.float(), outputs[:, :inputs].contiguous().float()
        )


def fit_components(batches: Iterable[Tensor], number: int) -> Components:
    """Principal components of batches of rows (R, D), in this process alone."""
    total: CovarianceAccumulator | None = None
    for part in map(CovarianceAccumulator.of, batches):
        if total is None:
            total = part
        else:
            total.merge(part)
    if total is None:
        raise ValueError(f"channels: {number}; the data has no rows to fit principal components to")
    return total.components(number)


def fit_in_order(
    own: Iterable[Tensor], count: int, number: int, reduce: Callable[[CovarianceAccumulator], Components] | None = None
) -> Components:
    """Principal components of rows in `count` batches that are distributed over the ranks.

    Rank 0 merges the sums of all batches in order, so that the bits do not depend on the number of ranks. The ranks
    send only sums, (D, D) per batch.

    Args:
        own: this rank's batches: number rank, rank + world_size, rank + 2·world_size, …
        reduce: makes the components from the sums; by default `CovarianceAccumulator.components`.
    """
    batches, found = iter(own), None
    total: CovarianceAccumulator | None = None
    for first in range(0, count, distributed.world_size()):
        part = CovarianceAccumulator.of(next(batches)) if first + distributed.rank() < count else None
        for other in distributed.all_gather_object(part):
            if total is None:
                total = other
            elif other is not None and distributed.is_main():
                total.merge(other)
    if distributed.is_main():
        if total is None:
            raise ValueError(f"channels: {number}; the data has no rows to fit principal components to")
        found = total.components(number) if reduce is None else reduce(total)
    components: Components = distributed.broadcast_object(found)
    return components


class ComponentBuffers(nn.Module):
    """Components as a module, so that they can be moved to a device and saved by name."""

    mean: Tensor
    directions: Tensor
    variance: Tensor
    restoring: Tensor | None

    def __init__(self, components: Components) -> None:
        super().__init__()
        self.register_buffer("mean", components.mean)
        self.register_buffer("directions", components.directions)
        self.register_buffer("variance", components.variance)
        self.register_buffer("restoring", components.restoring)

    @property
    def channels(self) -> int:
        return len(self.directions)

    def project(self, rows: Tensor) -> Tensor:
        """(..., D) → (..., C). Always float32: compared with the vision encoder, this costs no time."""
        with torch.autocast(rows.device.type, enabled=False):
            return (rows.float() - self.mean) @ self.directions.T

    def restore(self, latents: Tensor) -> Tensor:
        """(..., C) → (..., D), a point in the span of the components."""
        return latents.float() @ (self.directions if self.restoring is None else self.restoring) + self.mean

    def save(self, path: Path) -> None:
        with atomically(path) as partial:
            save_file({name: value.contiguous().cpu() for name, value in self.state_dict().items()}, partial)


def load_components(path: Path, what: str) -> Components:
    """Read components from a file of `ComponentBuffers.save`.

    Raises:
        ValueError: if the file cannot be read, or lacks a tensor.
    """
    state = read_safetensors(path, what)
    missing = {"mean", "directions", "variance"} - state.keys()
    if missing:
        raise ValueError(f"weights: {path} is not {what}: tensors are missing: {', '.join(sorted(missing))}")
    return Components(state["mean"], state["directions"], state["variance"], state.get("restoring"))


@dataclass(frozen=True, kw_only=True)
class FeaturePCAFitConfig:
    """Keep the strongest `channels` components of the features of a vision encoder; ReDi keeps 8."""

    kind: Literal["pca"] = "pca"
    channels: int = 8

    def __post_init__(self) -> None:
        at_least(self, channels=1)


def feature_rows(features: Tensor) -> Tensor:
    """(N, D, h, w) → (N·h·w, D)."""
    return features.movedim(1, -1).flatten(0, -2)


@dataclass(frozen=True, kw_only=True)
class FeaturePCAConfig:
    """weights: a safetensors file from FeaturePCA.save."""

    kind: Literal["pca"] = "pca"
    weights: Path


class FeaturePCA(ComponentBuffers):
    """A semantic codec without training: PCA of the features."""

    @classmethod
    def fit(cls, features: Iterable[Tensor], channels: int = 8) -> Self:
        """Fit batches of features (N, D, h, w)."""
        return cls(fit_components(map(feature_rows, features), channels))

    @classmethod
    def load(cls, config: FeaturePCAConfig) -> Self:
        return cls(load_components(config.weights, "a feature PCA"))

    @property
    def dim(self) -> int:
        return len(self.mean)

    @property
    def fingerprint(self) -> str:
        return fingerprint("pca", self.state_dict())

    def encode(self, features: Tensor) -> Posterior:
        """(N, D, h, w) → (N, C, h, w)."""
        return Posterior(self.project(features.movedim(1, -1)).movedim(-1, 1), None)

    def decode(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) → (N, D, h, w)."""
        return self.restore(latents.movedim(1, -1)).movedim(-1, 1)
