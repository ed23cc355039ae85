"""The seeds of a training, apart for initial weights, data and noise. Without torch, so that recipes load fast."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Final

SEED_PARTS: Final = ("init", "data", "noise")


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """The three seeds of a training, as the FID Lottery (arXiv 2606.20536) takes its variance apart.

    init: of the initial weights.
    data: of the order of samples, their flips, and the posterior samples of their latents.
    noise: of the draws of the objective: noise, time, label dropout; pretexts and shifts of images.
    """

    init: int = 0
    data: int = 0
    noise: int = 0

    @classmethod
    def of(cls, seed: int | Seeds) -> Seeds:
        """The three seeds of a recipe's `seed`; one number sets all of them."""
        return seed if isinstance(seed, Seeds) else cls(init=seed, data=seed, noise=seed)

    @property
    def shortest(self) -> int | Seeds:
        """One number, if all three are equal: a recipe has one form, and so one digest."""
        return self.init if self.init == self.data == self.noise else self

    @property
    def name(self) -> str:
        """As a part of a folder name: seed3, or init3-data0-noise0."""
        parts = dataclasses.asdict(self)
        same = len(set(parts.values())) == 1
        return f"seed{self.init}" if same else "-".join(f"{part}{value}" for part, value in parts.items())


def with_parts(seed: Any) -> Any:
    """The `seed` of a recipe file as a mapping of its parts, so that `seed.init` can replace one of them."""
    return dict.fromkeys(SEED_PARTS, seed) if type(seed) is int else seed
