"""What a velocity model is conditioned on beside the time. Class labels are the only kind so far.

A condition is a tensor with one entry per sample. Its class makes the null condition of classifier-free guidance (arXiv
2207.12598), examples for a model, and the conditions of an evaluation. Another kind is another class in `Conditioning`.

N batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sfd_scale.runtime import seeding


@dataclass(frozen=True)
class ClassLabels:
    """Labels (N,) int64 from 0 to `num_classes` − 1; the label `num_classes` is the null condition."""

    num_classes: int

    def __str__(self) -> str:
        return f"{self.num_classes} classes"

    @property
    def null(self) -> int:
        return self.num_classes

    def null_like(self, labels: Tensor) -> Tensor:
        """The null condition for each sample."""
        return torch.full_like(labels, self.null)

    def dropped(self, labels: Tensor, where: Tensor) -> Tensor:
        """The labels, with the null condition in the rows of `where` ((N,) bool on any device)."""
        return labels.masked_fill(where.to(labels.device, non_blocking=True), self.null)

    def given(self, labels: Tensor) -> Tensor:
        """The conditions of a model for labels (N,) of the data: the labels. Another kind looks its conditions up."""
        return labels

    def check(self, labels: Tensor, key: str) -> None:
        """Raises ValueError, which starts with `key`, for values that are no classes."""
        if not bool(((labels >= 0) & (labels < self.num_classes)).all()):
            low, high = int(labels.min()), int(labels.max())
            values = str(low) if low == high else f"values from {low} to {high}"
            raise ValueError(f"{key}: {values}; allowed: 0 to {self.num_classes - 1}")

    def example(self, samples: int) -> Tensor:
        """Labels of the right shape and type, on the default device."""
        return torch.zeros(samples, dtype=torch.long)

    def in_turn(self, count: int) -> Tensor:
        """0, 1, … and again from 0: (count,)."""
        return torch.arange(count) % self.num_classes

    def balanced(self, seed: int, count: int) -> Tensor:
        """Each class as often as the others to within one, in random order: (count,).

        In class order, an Inception Score over splits of the samples would be too low.
        """
        return self.in_turn(count)[seeding.permutation(seed, "labels", count)]

    def independent(self, seed: int, count: int) -> Tensor:
        """Independent uniform labels: (count,)."""
        return torch.randint(self.num_classes, (count,), generator=seeding.generator(seed, "labels_iid"))


Conditioning = ClassLabels
