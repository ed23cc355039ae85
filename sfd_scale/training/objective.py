"""What the trainer minimises: a model and a batch in, loss terms out. One objective per kind of run, in its own file.

Every random draw is keyed by the sample's (epoch, id), so it does not depend on the batch or the rank.

N batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class LossTerms:
    """`total` is the scalar to minimise, with its gradient. `terms` are detached means over the batch.

    `measures` are means over the batch that are no losses, such as an accuracy.
    Losses that depend on time also have `clock` (N,), the progress of the global clock from 0 to 1, and `per_sample`
    (N,), the detached loss of each sample.
    """

    total: Tensor
    terms: dict[str, Tensor]
    clock: Tensor | None = None
    per_sample: Tensor | None = None
    measures: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """The model is the module that the engine wraps; each objective calls it with its own arguments."""

    def __call__(self, model: Callable[..., Any], batch: Any, /) -> LossTerms: ...

    def prepare(self, batch: Any, /) -> Any:
        """The batch with its random draws, made on the CPU ahead of the step; or the batch as it is."""
        ...


def sample_keys(keys: Tensor) -> list[tuple[int, ...]]:
    """(N, 2) int64 as keys for `runtime.seeding`."""
    return [tuple(key) for key in keys.tolist()]
