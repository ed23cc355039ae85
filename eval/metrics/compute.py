"""Every score of a folder of features: what it needs, and its computation.

The table of scores names these functions. All ranks call each of them, so it may use collectives. It returns a task,
which one rank runs, or None if the samples or the reference lack what the score needs. A task gives values by key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.features.extract import read_rows
from eval.metrics import precision_recall as neighbours
from eval.metrics.config import MetricsConfig
from eval.metrics.density_coverage import density_coverage
from eval.metrics.frechet import frechet_distance
from eval.metrics.inception_score import inception_score
from eval.metrics.kernel_distance import kernel_distance
from eval.metrics.moments import FeatureMoments, MomentSums, moments
from eval.metrics.monge_inception import monge_inception_distance
from eval.metrics.reference import Reference
from eval.work.chunks import ChunkFolder
from sfd_scale.runtime import distributed


@dataclass(frozen=True)
class ScoreInputs:
    """The features of the samples, the reference, and the settings of the scores."""

    samples: ChunkFolder
    reference: Reference
    settings: MetricsConfig
    device: torch.device

    def rows(self, name: str) -> Tensor:
        """All rows of a tensor of the samples that is known to be there, on the device."""
        rows = read_rows(self.samples, name)
        assert rows is not None
        return rows.to(self.device)


Task = Callable[[], dict[str, float]]
Prepare = Callable[[ScoreInputs], Task | None]


def fid(inputs: ScoreInputs) -> Task | None:
    """FID, of pooled features (arXiv 1706.08500)."""
    return _frechet(inputs, "fid", "pool", inputs.reference.pool)


def sfid(inputs: ScoreInputs) -> Task | None:
    """sFID, of spatial features (arXiv 2103.03841)."""
    if inputs.reference.spatial is None or "spatial" not in inputs.samples.names():
        return None
    return _frechet(inputs, "sfid", "spatial", inputs.reference.spatial)


def _frechet(inputs: ScoreInputs, key: str, name: str, real: FeatureMoments) -> Task:
    summed = _summed_moments(inputs.samples, name) if inputs.settings.mode == "low_memory" else None

    def task() -> dict[str, float]:
        own = moments(inputs.rows(name)) if summed is None else summed.to(inputs.device)
        return {key: frechet_distance(own, real.to(inputs.device), inputs.settings.frechet)}

    return task


def _summed_moments(folder: ChunkFolder, name: str) -> FeatureMoments:
    """Moments from sums over the chunks of each rank."""
    shift = next(folder.read(name)).double().mean(0)
    sums = MomentSums(len(shift), shift)
    for rows in folder.read(name, range(distributed.rank(), folder.count, distributed.world_size())):
        sums.update(rows)
    distributed.all_reduce_sum(sums.sums)
    found = sums.finish()
    assert found.count == folder.total
    return found


def inception(inputs: ScoreInputs) -> Task | None:
    """The Inception Score, of logits (arXiv 1606.03498)."""
    if "logits" not in inputs.samples.names():
        return None

    def task() -> dict[str, float]:
        logits = (part.to(inputs.device) for part in inputs.samples.read("logits"))
        found = inception_score(logits, inputs.settings.is_split)
        return {"is_mean": found.mean, "is_std": found.std, "is_whole_splits": found.whole_splits}

    return task


def precision_recall(inputs: ScoreInputs) -> Task | None:
    """Precision and recall, of pooled features (arXiv 1904.06991). All ranks compute their share of the rows here."""
    reference, settings = inputs.reference.features, inputs.settings
    if reference is None:
        return None
    found = neighbours.precision_recall(
        inputs.rows("pool"), reference.to(inputs.device), settings.neighbours, settings.distances
    )
    return found._asdict


def kernel(inputs: ScoreInputs) -> Task | None:
    """KID, of pooled features (arXiv 1801.01401)."""
    reference, settings = inputs.reference.features, inputs.settings
    if reference is None or not settings.kid_subsets:
        return None

    def task() -> dict[str, float]:
        assert reference is not None
        found = kernel_distance(
            inputs.rows("pool"), reference.to(inputs.device), settings.kid_subsets, settings.kid_size
        )
        return {"kid_mean": found.mean, "kid_std": found.std}

    return task


def monge(inputs: ScoreInputs) -> Task | None:
    """MIND, of pooled features (arXiv 2605.06797)."""
    reference, settings = inputs.reference.features, inputs.settings
    if reference is None or not settings.mind_projections:
        return None

    def task() -> dict[str, float]:
        assert reference is not None
        pool, real = inputs.rows("pool"), reference.to(inputs.device)
        return {"mind": monge_inception_distance(pool, real, settings.mind_samples, settings.mind_projections)}

    return task


def density(inputs: ScoreInputs) -> Task | None:
    """Density and coverage, of pooled features (arXiv 2002.09797). All ranks compute their share of the rows here."""
    reference, k = inputs.reference.features, inputs.settings.density_neighbours
    if reference is None or not k or len(reference) <= k:
        return None
    return density_coverage(inputs.rows("pool"), reference.to(inputs.device), k)._asdict
