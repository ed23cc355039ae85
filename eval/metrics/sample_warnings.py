"""Warnings about samples whose scores mean less than they seem to."""

from __future__ import annotations

from torch import Tensor

PUBLISHED_COUNT = 50_000  # samples of the numbers in papers


def sample_warnings(count: int, dim: int, split: int, labels: Tensor | None) -> list[str]:
    """Sentences about the number and the order of `count` samples.

    Args:
        dim: feature channels of FID.
        split: samples per split of the Inception Score.
        labels: (count,) in the order of the samples, if they are known.
    """
    found = []
    if count <= dim:
        found.append(
            f"{count} samples for {dim} features: the covariance is singular and FID is biased upwards; compare it "
            f"only with FIDs of {count} samples"
        )
    if count < PUBLISHED_COUNT:
        found.append(
            f"{count} samples: FID falls and recall moves as the number of samples grows; published values are of "
            f"{PUBLISHED_COUNT:,}"
        )
    if count % split and count > split:
        found.append(
            f"{count} samples are not a multiple of the split of {split}: the last split of the Inception Score has "
            f"only {count % split} samples and lowers the mean; is_whole_splits leaves it out"
        )
    if labels is not None and len(labels) > split and _in_runs(labels):
        found.append("labels are in class order: the Inception Score over splits is far too low; shuffle the images")
    return found


def _in_runs(labels: Tensor) -> bool:
    """Whether neighbours share their class far more often than by chance, as in files in class order."""
    same = (labels[1:] == labels[:-1]).double().mean().item()
    shares = labels.unique(return_counts=True)[1].double() / len(labels)
    return same > shares.square().sum().item() + 0.3
