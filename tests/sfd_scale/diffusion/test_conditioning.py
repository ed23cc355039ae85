"""Class labels as the condition of a model: the null condition, dropping, and the labels of an evaluation."""

from __future__ import annotations

import pytest
import torch

from sfd_scale.diffusion.conditioning import ClassLabels
from sfd_scale.models.layers import condition_embedder

LABELS = ClassLabels(4)


def test_the_null_condition_is_the_label_after_the_last_class() -> None:
    labels = torch.tensor([3, 0, 2])
    assert LABELS.null_like(labels).tolist() == [4, 4, 4]
    assert LABELS.dropped(labels, torch.tensor([False, True, False])).tolist() == [3, 4, 2]
    assert labels.tolist() == [3, 0, 2]
    embedder = condition_embedder(LABELS, 6)
    assert embedder(LABELS.null_like(labels)).shape == (3, 6)
    with pytest.raises(IndexError):
        embedder(torch.tensor([5]))


def test_values_that_are_no_classes_are_refused() -> None:
    LABELS.check(torch.tensor([0, 3]), "labels")
    with pytest.raises(ValueError, match=r"^--label: 4; allowed: 0 to 3$"):
        LABELS.check(torch.tensor([4, 4]), "--label")
    with pytest.raises(ValueError, match=r"^labels: values from -1 to 2; allowed: 0 to 3$"):
        LABELS.check(torch.tensor([2, -1]), "labels")


def test_labels_of_an_evaluation() -> None:
    assert LABELS.in_turn(6).tolist() == [0, 1, 2, 3, 0, 1]
    balanced = LABELS.balanced(0, 4000)
    assert balanced.bincount().tolist() == [1000] * 4
    counts = LABELS.independent(0, 4000).bincount(minlength=4)
    # Not exactly balanced; five standard deviations of a binomial count are 137.
    assert counts.tolist() != [1000] * 4 and (counts - 1000).abs().max() < 137
    assert not torch.equal(balanced, LABELS.balanced(1, 4000))
