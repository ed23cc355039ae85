"""Whether two results differ: the difference of their scores with a bootstrap interval, paired by image number.

A score is linearised around each result: its influence function says by how much one image moves it, and the mean of
these over resampled images is the resampled score. Unlike scores of resampled sets, which contain copies, this has no
bias upwards, and it costs one pass.

N samples · M reference images · D feature channels · K logits.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from eval.features.extract import FeatureSet, open_features, read_features
from eval.metrics import metrics
from eval.metrics import precision_recall as neighbours
from eval.metrics.metrics import FeatureMoments, MetricsConfig
from eval.reference import Reference, read_reference
from eval.results import Results
from sfd_scale import config
from sfd_scale.runtime import distributed, seeding
from sfd_scale.runtime.files import write_json

logger = logging.getLogger(__name__)
LEVEL = 0.95


@dataclass(frozen=True)
class Influence:
    """A score, and by how much each image (N,) or reference image (M,) moves it times their number, mean 0."""

    value: float
    per_image: Tensor


@dataclass(frozen=True)
class Difference:
    """A score of A and of B, B − A, and its bootstrap interval."""

    score: str
    a: float
    b: float
    difference: float
    low: float
    high: float

    @property
    def differs(self) -> bool:
        """Whether the interval leaves zero out."""
        return not self.low <= 0 <= self.high


def compare(a: Path, b: Path, *, rounds: int = 2000, out: Path | None = None) -> list[Difference]:
    """Compare two scored sets, given by their results.json or its folder; prints a table and writes `out`.

    Raises:
        ValueError: if they were scored against different references or with different settings.
    """
    first, second = Results.read(a), Results.read(b)
    _check_comparable(first, second)
    paired = first.paired_with(second)
    reference = read_reference(_cached(first, a), first.reference)
    sets = [read_features(open_features(_features(r, p))) for r, p in ((first, a), (second, b))]
    differences = [
        difference(name, *(influence(found, reference, first.metrics) for found in sets), paired=pairs, rounds=rounds)
        for name, influence, pairs in _scores(sets, reference, paired)
    ]
    if not distributed.is_main():
        return differences
    others = settings_that_differ(first, second)
    _show(differences, paired, others)
    if out is not None:
        rows = [{**vars(found), "differs": found.differs} for found in differences]
        data = {
            "a": str(a), "b": str(b), "paired": paired, "level": LEVEL, "rounds": rounds, "scores": rows,
            "settings": others,
        }  # fmt: skip
        write_json(out, data)
    return differences


def difference(name: str, a: Influence, b: Influence, *, paired: bool, rounds: int) -> Difference:
    """B − A with its interval, by the bootstrap (Efron 1979, Ann. Statist. 7, Sec. 2) of linearised scores.

    Args:
        paired: whether row i of both is the same image number (or reference image) and is drawn together.
    """
    if paired:
        moves = resampled_means(b.per_image - a.per_image, "paired", rounds)
    else:
        moves = resampled_means(b.per_image, "b", rounds) - resampled_means(a.per_image, "a", rounds)
    low, high = torch.quantile(moves, torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2]).double()).tolist()
    observed = b.value - a.value
    return Difference(name, a.value, b.value, observed, observed + low, observed + high)


def resampled_means(values: Tensor, stream: str, rounds: int) -> Tensor:
    """Means over `rounds` resamples with replacement (Efron 1979, Sec. 2) of values (N,): (rounds,)."""
    count = len(values)
    draws = (
        torch.randint(count, (count,), generator=seeding.generator(0, f"bootstrap_{stream}", number))
        for number in range(rounds)
    )
    return torch.stack([values[rows].mean() for rows in draws])


# ------------------------------------------------------------------------------------------------- influence


def frechet_influence(features: Tensor, reference: FeatureMoments) -> Influence:
    """Of the Fréchet distance (arXiv 1706.08500, Eq. 6), for features (N, D).

    d|μ − m|² = 2 (μ − m)·dμ, and dF/dΣ = I − T with T the optimal transport map between the Gaussians,
    T = Σ^−½ (Σ^½ S Σ^½)^½ Σ^−½ (Takatsu 2011, Osaka J. Math. 48, Sec. 2), on the range of Σ.
    """
    own = metrics.moments(features)
    values, vectors = torch.linalg.eigh(own.cov)
    kept = values > values.max() * 1e-10
    roots, basis = values[kept].sqrt(), vectors[:, kept]
    inner = (basis * roots).T @ reference.cov @ (basis * roots)
    eigen, turn = torch.linalg.eigh((inner + inner.T) / 2)
    # |(Σ^½ S Σ^½)^¼ Σ^−½ (x − μ)|² for each row.
    whiten = (basis / roots) @ turn * eigen.clamp(min=0).pow(0.25)
    parts = []
    for block in features.split(metrics.BLOCK):
        centred = block.double() - own.mean
        shifted = 2 * centred @ (own.mean - reference.mean)
        parts.append(shifted + centred.square().sum(1) - (centred @ whiten).square().sum(1))
    moved = torch.cat(parts)
    return Influence(metrics.frechet_distance(own, reference), moved - moved.mean())


def inception_influence(logits: Tensor, split: int) -> Influence:
    """Of the Inception Score (arXiv 1606.03498, Sec. 4): in a split, IS · (KL(p_i ‖ q) − its mean)."""
    moved = []
    parts = logits.split(split)
    for part in parts:
        log_p = part.double().log_softmax(1)
        q = log_p.exp().mean(0)
        divergence = (log_p.exp() * (log_p - q.clamp(min=1e-300).log())).sum(1)
        mean = divergence.mean()
        # A split counts the same however many images it has.
        moved.append(mean.exp() * (divergence - mean) * (len(logits) / len(parts) / len(part)))
    return Influence(metrics.inception_score(logits, split).mean, torch.cat(moved))


def share_influence(inside: Tensor) -> Influence:
    """Of a share (arXiv 1904.06991, Eq. 2): whether each row (N,) is inside, less the share."""
    values = inside.double()
    return Influence(values.mean().item(), values - values.mean())


Measure = Callable[[FeatureSet, Reference, MetricsConfig], Influence]


def _scores(sets: list[FeatureSet], reference: Reference, paired: bool) -> list[tuple[str, Measure, bool]]:
    """(name, influence, whether rows pair) of the scores that both sets have."""
    found: list[tuple[str, Measure, bool]] = [("fid", lambda f, r, m: frechet_influence(f.pool, r.pool), paired)]
    if reference.spatial is not None and all(f.spatial is not None for f in sets):
        found.append(("sfid", _spatial, paired))
    if all(f.logits is not None for f in sets):
        found.append(("is_mean", _inception, paired))
    if reference.features is not None:
        found += [("precision", _precision, paired), ("recall", _recall, True)]
    return found


def _spatial(features: FeatureSet, reference: Reference, settings: MetricsConfig) -> Influence:
    assert features.spatial is not None and reference.spatial is not None
    return frechet_influence(features.spatial, reference.spatial)


def _inception(features: FeatureSet, reference: Reference, settings: MetricsConfig) -> Influence:
    assert features.logits is not None
    return inception_influence(features.logits, settings.is_split)


def _precision(features: FeatureSet, reference: Reference, settings: MetricsConfig) -> Influence:
    assert reference.features is not None
    return share_influence(_inside(features.pool, reference.features, settings))


def _recall(features: FeatureSet, reference: Reference, settings: MetricsConfig) -> Influence:
    assert reference.features is not None
    return share_influence(_inside(reference.features, features.pool, settings))


def _inside(rows: Tensor, centres: Tensor, settings: MetricsConfig) -> Tensor:
    radii = neighbours.radii(centres, settings.neighbours, settings.distances)
    return neighbours.within(rows, centres, radii, settings.distances)


# ------------------------------------------------------------------------------------------------- two results


def _check_comparable(a: Results, b: Results) -> None:
    for what, key in (("reference", "data"), ("extractor", "extractor")):
        if a.reference[key] != b.reference[key]:
            raise ValueError(f"{what}: {a.reference[key]} and {b.reference[key]}; scores have to share it")
    if a.metrics != b.metrics:
        raise ValueError(f"metrics: {a.metrics} and {b.metrics}; scores have to share them")


def settings_that_differ(a: Results, b: Results) -> dict[str, tuple[str, str]]:
    """Everything that determined the two results and is not the same, by dotted key."""
    left, right = (config.flatten({"samples": side.samples, "versions": side.versions}) for side in (a, b))
    keys = dict.fromkeys([*left, *right])
    pairs = {key: (str(left.get(key, "–")), str(right.get(key, "–"))) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _cached(results: Results, path: Path) -> Path:
    file = Path(results.run.reference)
    if not file.is_file():
        raise ValueError(f"{path}: its reference {file} is no longer in the cache; score it again")
    return file


def _features(results: Results, path: Path) -> Path:
    """The folder of features that the results are of: beside them, or where it was scored."""
    beside = path if path.is_dir() else path.parent
    for folder in (beside, Path(results.run.features)):
        file = folder / "config.json"
        if file.is_file() and json.loads(file.read_text(encoding="utf-8")) == results.samples:
            return folder
    raise ValueError(f"{path}: the features that it was scored from are neither beside it nor where they were")


def _show(differences: list[Difference], paired: bool, others: dict[str, tuple[str, str]]) -> None:
    title = "B − A, paired by image number" if paired else "B − A, not paired: the images do not share noise and labels"
    table = Table("score", "A", "B", "B − A", f"{100 * LEVEL:.0f}% interval", "", title=title)
    for found in differences:
        verdict = "differs" if found.differs else "not told apart"
        interval = f"{found.low:+.4g} to {found.high:+.4g}"
        table.add_row(found.score, f"{found.a:.5g}", f"{found.b:.5g}", f"{found.difference:+.4g}", interval, verdict)
    Console().print(table)
    settings = Table("what differs", "A", "B")
    for key, (left, right) in others.items():
        settings.add_row(key, left, right)
    Console().print(settings if others else "A and B are of the same settings.")
