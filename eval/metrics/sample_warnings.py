"""Warnings about samples whose scores mean less than they seem to."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from eval.metrics.inception_score import inception_score
from eval.metrics.moments import BLOCK
from sfd_scale.runtime import seeding

# Neighbours agree in their class by this much more than by chance: class order. Labels are exact; predictions are not,
# so their bound is lower, and the Inception Score has to be lower than that of shuffled samples by `LOST_SCORE`, too.
LABEL_RUNS, PREDICTION_RUNS, DEVIATIONS = 0.3, 0.05, 5.0
LOST_SCORE = 0.9
REPEATED = 0.01  # a data set may have a few images twice
PUBLISHED_COUNT = 50_000  # samples of the numbers in papers


def sample_warnings(
    count: int,
    dim: int,
    split: int,
    labels: Tensor | None = None,
    logits: Tensor | None = None,
    is_mean: float | None = None,
) -> list[str]:
    """Sentences about the number and the order of `count` samples.

    Args:
        dim: feature channels of FID.
        split: samples per split of the Inception Score.
        labels: (count,) in the order of the samples, if they are known.
        logits: (count, K) in the order of the samples, with their Inception Score over splits, `is_mean`. Without
            labels they show class order, too.
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
    if labels is not None and len(labels) > split and _neighbours(labels).excess > LABEL_RUNS:
        found.append("labels are in class order: the Inception Score over splits is far too low; shuffle the images")
    elif logits is not None and is_mean is not None and (warning := _order_of_predictions(logits, split, is_mean)):
        found.append(warning)
    return found


def repeat_warnings(pool: Tensor) -> list[str]:
    """A sentence, if many of the features (N, D) float32 are equal bit for bit to those of an earlier sample."""
    # A random sum of the bits, modulo 2⁶⁴, is equal for equal rows, and hardly ever for others.
    factors = torch.randint(-(1 << 62), 1 << 62, (pool.shape[1],), generator=seeding.generator(0, "repeated samples"))
    keys = [(rows.contiguous().view(torch.int32).long() * factors).sum(1) for rows in pool.float().split(BLOCK)]
    repeated = len(pool) - len(torch.cat(keys).unique())
    if repeated <= REPEATED * len(pool):
        return []
    return [
        f"{repeated:,} of {len(pool):,} samples are the same as an earlier one, as where several processes draw with "
        "one seed, or files are copied: the scores are of fewer samples than their number says"
    ]


class _Neighbours(NamedTuple):
    """How often neighbours share their class, and how often by chance in a random order."""

    agreement: float
    chance: float

    @property
    def excess(self) -> float:
        return self.agreement - self.chance


def _neighbours(classes: Tensor) -> _Neighbours:
    same = (classes[1:] == classes[:-1]).double().mean().item()
    shares = classes.unique(return_counts=True)[1].double() / len(classes)
    return _Neighbours(same, shares.square().sum().item())


def _order_of_predictions(logits: Tensor, split: int, is_mean: float) -> str | None:
    """A warning if samples lie in the order of their predicted classes, and the Inception Score suffers.

    The comparison is with the score of the same samples, shuffled, over splits of the same size. The score of all
    samples as one split would not do: with many classes it is higher than that of any small split.
    """
    if len(logits) <= split:
        return None
    found = _neighbours(logits.argmax(1))
    deviation = math.sqrt(found.chance * (1 - found.chance) / (len(logits) - 1))
    if found.excess <= max(PREDICTION_RUNS, DEVIATIONS * deviation):
        return None
    order = seeding.permutation(0, "order of samples", len(logits))
    shuffled = inception_score(logits[order], split).mean
    if is_mean >= LOST_SCORE * shuffled:
        return None
    return (
        f"the samples are in class order: {found.agreement:.0%} of neighbours have the same predicted class, "
        f"{found.chance:.0%} by chance. The Inception Score over splits is too low; shuffled, it is {shuffled:.2f}: "
        "shuffle the images"
    )
