"""What semantic latents know, measured on the latents of a study alone, before anything is trained on them.

N pictures · C channels · h, w grid · K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from sfd_scale.data.mds_reader import MDSReader
from sfd_scale.diffusion.latents import LatentLayout

_TRAIN = 0.75  # of the pictures; the others are held out
_RIDGE = 1e-3  # relative to the mean square of the inputs
_PENALTY = 1e-2  # of the squared weights of the probe


@dataclass(frozen=True)
class Knowledge:
    """All values are of held-out pictures.

    features_accuracy: of a linear probe of the class from the pooled features of the vision encoder; None without them.
    class_accuracy: of a linear probe from pooled semantic latents.
    by_label: share of the variance of texture latents that the means of the classes explain, at each position.
    by_semantics: share of the variance that remains then, explained by a linear map of the semantics around a position.
    """

    features_accuracy: float | None
    class_accuracy: float
    by_label: float
    by_semantics: float


def measure(latents: Tensor, labels: Tensor, layout: LatentLayout, pooled: Tensor | None = None) -> Knowledge:
    """Knowledge of composite latents (N, C, h, w), not normalised, with labels (N,).

    Args:
        pooled: (N, D) features of the vision encoder.

    Raises:
        ValueError: if a class has no picture in either part.
    """
    held_out = torch.arange(len(labels)) >= int(_TRAIN * len(labels))
    classes = int(labels.max()) + 1
    if len(labels[~held_out].unique()) < classes or not bool(held_out.any()):
        raise ValueError(f"{len(labels)} pictures of {classes} classes; allowed: more pictures")
    texture, semantic = layout.split(latents.float())
    semantic = _standardised(semantic, (0, 2, 3), ~held_out)
    means = torch.stack([texture[~held_out & (labels == label)].mean(0) for label in range(classes)])
    rest = texture - means[labels]
    spread = (texture[held_out] - texture[~held_out].mean(0)).square().sum()
    left = rest[held_out].square().sum()
    around = functional.unfold(semantic, 3, padding=1)  # (N, 9·C, h·w)
    predicted = _ridge(_rows(around), _rows(rest.flatten(2)), (~held_out).repeat_interleave(around.shape[2]))
    error = (_rows(rest.flatten(2)) - predicted)[held_out.repeat_interleave(around.shape[2])].square().sum()
    probes = [
        None if values is None else _probe(_standardised(values, (0,), ~held_out), labels, held_out)
        for values in (pooled, semantic.mean((2, 3)))
    ]
    assert probes[1] is not None
    return Knowledge(
        features_accuracy=probes[0],
        class_accuracy=probes[1],
        by_label=float(1 - left / spread),
        by_semantics=float(1 - error / left),
    )


def _standardised(values: Tensor, dims: tuple[int, ...], train: Tensor) -> Tensor:
    mean, std = values[train].mean(dims, keepdim=True), values[train].std(dims, keepdim=True)
    return (values - mean) / std.clamp(min=1e-6)


def _rows(values: Tensor) -> Tensor:
    """(N, C, P) → (N·P, C)."""
    return values.transpose(1, 2).flatten(0, 1)


def _ridge(inputs: Tensor, outputs: Tensor, train: Tensor) -> Tensor:
    """Predictions of a linear map with an offset, fitted to the rows of `train`: the shape of `outputs`."""
    wide = torch.cat([inputs, torch.ones(len(inputs), 1)], 1)
    x, y = wide[train], outputs[train]
    gram = (x.T @ x).double()
    gram += _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    return wide @ torch.linalg.solve(gram, (x.T @ y).double()).float()


def _probe(inputs: Tensor, labels: Tensor, held_out: Tensor) -> float:
    """Accuracy on held-out rows of logistic regression with a penalty."""
    weight = torch.zeros(inputs.shape[1] + 1, int(labels.max()) + 1, requires_grad=True)
    wide = torch.cat([inputs, torch.ones(len(inputs), 1)], 1)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(wide[~held_out] @ weight, labels[~held_out])
        loss = loss + _PENALTY * weight[:-1].square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    guesses = (wide[held_out] @ weight.detach()).argmax(1)
    return float((guesses == labels[held_out]).float().mean())


def read_latents(folder: Path, count: int | None = None) -> tuple[Tensor, Tensor]:
    """The first `count` latents of a folder of `sfd encode`, (N, C, h, w) float32, and labels (N,); all by default."""
    reader = MDSReader(folder)
    rows = range(reader.num_samples if count is None else min(count, reader.num_samples))
    latents, labels = reader.gather(rows, [["latents"] * len(rows), ["label"] * len(rows)])
    return torch.from_numpy(latents).float(), torch.from_numpy(labels)


def read_pooled_features(folder: Path) -> Tensor | None:
    """Pooled features of a folder of `sfd encode`, (N, D) float32; None if it stores none."""
    reader = MDSReader(folder)
    if not reader.num_samples or "features" not in reader.shards[0].columns:
        return None
    rows = torch.arange(reader.num_samples).split(500)
    parts = (reader.gather(part.tolist(), [["features"] * len(part)])[0] for part in rows)
    return torch.cat([torch.from_numpy(part).float().mean((2, 3)) for part in parts])
