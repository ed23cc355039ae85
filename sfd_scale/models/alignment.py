"""The head that maps tokens of an early block to features of a vision encoder (REPA, arXiv 2410.06940)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from sfd_scale.runtime.settings import at_least


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """`depth`: the head reads the tokens after this many blocks. `dim`: channels of the encoder's features."""

    depth: int = 2
    hidden: int = 2048
    dim: int = 768

    def __post_init__(self) -> None:
        at_least(self, depth=1, hidden=1, dim=1)


def alignment_head(width: int, config: AlignmentConfig) -> nn.Sequential:
    """An MLP of three layers: (N, T, width) → (N, T, dim)."""
    return nn.Sequential(
        nn.Linear(width, config.hidden),
        nn.SiLU(),
        nn.Linear(config.hidden, config.hidden),
        nn.SiLU(),
        nn.Linear(config.hidden, config.dim),
    )
