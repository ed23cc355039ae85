"""Bounds of settings, for the `__post_init__` of the dataclass that declares them."""

from __future__ import annotations

import math


def at_least(settings: object, **least: float) -> None:
    """Raises ValueError that begins with the field's name, for one below its bound or not finite.

    What is not a number (null, auto) passes.
    """
    for name, bound in least.items():
        value = getattr(settings, name)
        if isinstance(value, int | float) and not bound <= value < math.inf:
            raise ValueError(f"{name}: {value}; allowed: {bound} and up")


def above(settings: object, **bounds: float) -> None:
    """As `at_least`, for a field that may not be the bound itself."""
    for name, bound in bounds.items():
        value = getattr(settings, name)
        if isinstance(value, int | float) and not bound < value < math.inf:
            raise ValueError(f"{name}: {value}; allowed: above {bound}")
