"""Helpers for dataclasses of settings: bounds of a field, and the mark of a field that has no effect on results."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, TypeVar, get_type_hints

T = TypeVar("T")
_MARK = "no effect on results"
# The type of a setting such as a name, a path or the number of workers: two runs that differ in it alone are equal.
NoEffectOnResults = Annotated[T, _MARK]


def names_affecting_results(cls: type[Any]) -> list[str]:
    """The fields of a dataclass that are not marked `NoEffectOnResults`, in their order."""
    hints = get_type_hints(cls, include_extras=True)
    marks = {field.name: getattr(hints[field.name], "__metadata__", ()) for field in dataclasses.fields(cls)}
    return [name for name, mark in marks.items() if _MARK not in mark]


def at_least(settings: object, **least: float) -> None:
    """Check lower bounds that are allowed themselves. Values that are not numbers (null, auto) pass.

    Raises:
        ValueError: starting with the field's name, if its value is below the bound or not finite.
    """
    for name, bound in least.items():
        value = getattr(settings, name)
        if isinstance(value, int | float) and not bound <= value < math.inf:
            raise ValueError(f"{name}: {value}; allowed: {bound} and up")


def above(settings: object, **bounds: float) -> None:
    """Check lower bounds that are not allowed themselves; else as `at_least`."""
    for name, bound in bounds.items():
        value = getattr(settings, name)
        if isinstance(value, int | float) and not bound < value < math.inf:
            raise ValueError(f"{name}: {value}; allowed: above {bound}")


YEAR_S = 31_536_000  # more seconds than any wait; libraries fail for larger numbers, each with its own error


def wait_s(settings: object, **least: float) -> None:
    """Check waits in seconds, with their lower bounds; else as `at_least`. A year is the most."""
    at_least(settings, **least)
    for name, bound in least.items():
        value = getattr(settings, name)
        if isinstance(value, int | float) and value > YEAR_S:
            raise ValueError(f"{name}: {value}; allowed: {bound} to {YEAR_S} seconds, a year")
