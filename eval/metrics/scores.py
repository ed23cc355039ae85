"""The one table of scores: how each is computed, compared and shown, and which direction is better.

A new score is its function in compute.py and one field of `Scores`. Everything that lists scores reads this table:
results.json, pages, the tables of sweeps and studies, curves, W&B and the model card.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from eval.features.extract import FeatureSet
from eval.metrics import compute, influence
from eval.metrics.compute import Prepare
from eval.metrics.config import MetricsConfig
from eval.metrics.influence import Influence
from eval.metrics.reference import Reference

InfluenceOf = Callable[[FeatureSet, Reference, MetricsConfig], Influence | None]


@dataclass(frozen=True, kw_only=True)
class Score:
    """How one score is named, shown and judged.

    title: of a column. It names the unit, if `factor` changes it. name: the title without the unit, or the long form.
    form: the format of value · factor.
    deviation: the key of the standard deviation that is shown after ±.
    in_curves: whether it is drawn over the steps of a training.
    compute: how it is computed, with the other scores that come of the same computation; None: it is one of those.
    influence: how much each image moves it, for the intervals of `eval compare`; None: it is not compared.
    later: whether files of the first release lack the score. A file leaves it out if it is missing.
    settings: fields of MetricsConfig that come with such a score. A file leaves them out with it.
    key: in results.json, results.jsonl and W&B; the name of the field.
    """

    title: str
    better: Literal["lower", "higher"]
    form: str
    name: str = ""
    factor: float = 1.0
    deviation: str | None = None
    in_curves: bool = True
    compute: Prepare | None = None
    influence: InfluenceOf | None = None
    later: bool = False
    settings: tuple[str, ...] = ()
    key: str = ""

    @property
    def arrow(self) -> str:
        return "↓" if self.better == "lower" else "↑"

    def best(self, values: Iterable[float | None]) -> float | None:
        """The best of the values, without the missing ones."""
        present = [value for value in values if value is not None]
        if not present:
            return None
        return min(present) if self.better == "lower" else max(present)


_MIND = ("mind_samples", "mind_projections")
_DENSITY = ("density_neighbours",)


def _shown(score: Score) -> Any:
    return field(default=None, metadata={"score": score})


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of one set of samples, in the order of results.json. None: not computed, for want of its inputs.

    Raises:
        ValueError: for a score that is not finite. It would win or lose every comparison.
    """

    fid: float | None = _shown(
        Score(title="FID", better="lower", form=".2f", compute=compute.fid, influence=influence.fid)
    )
    sfid: float | None = _shown(
        Score(title="sFID", better="lower", form=".2f", compute=compute.sfid, influence=influence.sfid)
    )
    is_mean: float | None = _shown(
        Score(
            title="IS", name="Inception Score", better="higher", form=".2f", deviation="is_std",
            compute=compute.inception, influence=influence.inception,
        )
    )  # fmt: skip
    is_std: float | None = None
    is_whole_splits: float | None = None  # is_mean without a last split that is shorter than the others
    precision: float | None = _shown(
        Score(
            title="Precision", better="higher", form=".3f",
            compute=compute.precision_recall, influence=influence.precision,
        )
    )  # fmt: skip
    recall: float | None = _shown(Score(title="Recall", better="higher", form=".3f", influence=influence.recall))
    kid_mean: float | None = _shown(
        Score(
            title="KID·10³", name="KID", better="lower", form=".2f", factor=1000.0, compute=compute.kernel,
            in_curves=False,  # a training is scored with few samples, and KID of few samples is mostly noise
        )
    )  # fmt: skip
    kid_std: float | None = None
    mind: float | None = _shown(
        Score(
            title="MIND", better="lower", form=".2f", compute=compute.monge, influence=influence.monge, later=True,
            settings=_MIND,
        )
    )  # fmt: skip
    density: float | None = _shown(
        Score(
            title="Density", better="higher", form=".3f", compute=compute.density, influence=influence.density,
            later=True, settings=_DENSITY, in_curves=False,
        )
    )  # fmt: skip
    coverage: float | None = _shown(
        Score(
            title="Coverage", better="higher", form=".3f", influence=influence.coverage, later=True, settings=_DENSITY
        )
    )
    fdr: float | None = _shown(Score(title="FDr", better="lower", form=".3f", later=True))

    def __post_init__(self) -> None:
        for key, value in self.by_key().items():
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{key}: {value}; allowed: a finite number")

    def by_key(self) -> dict[str, float | None]:
        """Every value by its key, in order."""
        return {value.name: getattr(self, value.name) for value in dataclasses.fields(self)}

    def as_json(self) -> dict[str, float | None]:
        """The values as files hold them."""
        later = {score.key for score in SCORES if score.later}
        return {key: value for key, value in self.by_key().items() if value is not None or key not in later}

    def settings_left_out(self) -> set[str]:
        """The fields of MetricsConfig that belong to missing scores, and that files leave out with them."""
        return {name for score in SCORES if self.of(score) is None for name in score.settings}

    @staticmethod
    def settings_in_hash(settings: MetricsConfig) -> dict[str, Any]:
        """The settings that the id of results is a hash of. Those of later scores count if they are not the default."""
        later = {name for score in SCORES for name in score.settings}
        default = MetricsConfig()
        values = {value.name: getattr(settings, value.name) for value in dataclasses.fields(settings)}
        return {key: value for key, value in values.items() if key not in later or value != getattr(default, key)}

    def of(self, score: Score) -> float | None:
        """The value of a score, in its own unit: without the factor."""
        return self.by_key()[score.key]

    def text(self, score: Score, form: str | None = None) -> str:
        """A score as tables show it; – if there is none.

        Args:
            form: in place of the score's own format; then without the deviation.
        """
        values = self.by_key()
        value = values[score.key]
        if value is None:
            return "–"
        if form is not None:
            return format(value * score.factor, form)
        deviation = None if score.deviation is None else values[score.deviation]
        after = f" ± {format(deviation * score.factor, score.form)}" if deviation else ""
        return f"{format(value * score.factor, score.form)}{after}"


def _table() -> tuple[Score, ...]:
    shown = [(value.name, value.metadata["score"]) for value in dataclasses.fields(Scores) if "score" in value.metadata]
    return tuple(dataclasses.replace(score, key=key, name=score.name or score.title) for key, score in shown)


# The scores that tables have a column for, in order.
SCORES: tuple[Score, ...] = _table()
