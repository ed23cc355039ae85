"""Scores of cells that share their images' noise and labels: differences with intervals, and what chance does.

N samples · K cells · R bootstrap rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from eval.comparison.compare import resampled_means
from eval.features.extract import open_features, read_features
from eval.metrics.config import MetricsConfig
from eval.metrics.influence import Influence
from eval.metrics.reference import Reference
from eval.metrics.scores import SCORES, Score

ROUNDS = 1000


def score_named(key: str) -> Score:
    """The score with this key.

    Raises:
        ValueError: for a key that no score has.
    """
    found = {score.key: score for score in SCORES}
    if key not in found:
        raise ValueError(f"--by: {key}; allowed: {', '.join(found)}")
    return found[key]


def influence_of(score: Score, folder: Path, reference: Reference, settings: MetricsConfig) -> Influence | None:
    """How much each image of a folder moves a score; None for scores without intervals. All ranks call this."""
    if score.influence is None:
        return None
    return score.influence(read_features(open_features(folder)), reference, settings)


def luck_of_the_best(influences: Sequence[Influence], rounds: int = ROUNDS, *, lower_is_better: bool = True) -> float:
    """How much better the best of K equally good cells looks, on average, by the choice of its images alone.

    The bootstrap draws the same images for all cells (Efron 1979, Ann. Statist. 7, Sec. 2), so errors that cells share
    drop out: they favour no cell. In each round one cell looks best. Its distance from the mean of the cells, averaged
    over the rounds, is the bias of a choice by the same data (Cawley and Talbot 2010, JMLR 11).
    """
    moves = torch.stack([resampled_means(cell.per_image, "search", rounds) for cell in influences], 1)  # (R, K)
    ahead = moves.mean(1, keepdim=True) - moves
    return (ahead if lower_is_better else -ahead).amax(1).mean().item()
