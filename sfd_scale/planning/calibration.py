"""Fit constants of the time model to measured steps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from sfd_scale.planning.efficiency import Efficiency
from sfd_scale.planning.hardware import Hardware
from sfd_scale.planning.step_time import Step, step_time

# Matmuls, GPU memory and the host bound most steps.
FITTED = ("matmul", "memory", "launch")
# A constant moves from its value only as far as the measurements say so: one measurement cannot tell three constants.
_PRIOR = 0.02
_FACTORS = [2 ** (n / 16) for n in range(-24, 25)]
_ROUNDS = 3


@dataclass(frozen=True)
class MeasuredStep:
    """A step that was timed. `name` says where."""

    name: str
    step: Step
    seconds: float


@dataclass(frozen=True)
class Calibration:
    """Constants that fit the measurements best.

    before, after: predicted over measured time of each measurement, with the old and the new constants.
    """

    hardware: Hardware
    efficiency: Efficiency
    before: list[float]
    after: list[float]

    def describe(self) -> str:
        """The errors, for people."""
        return (
            f"{len(self.after)} measured steps: error {_error(self.before):.0%} before, {_error(self.after):.0%} after "
            "the calibration (median)"
        )


def _error(ratios: Sequence[float]) -> float:
    return statistics.median(abs(ratio - 1) for ratio in ratios)


def calibrate(
    measured: Sequence[MeasuredStep], hardware: Hardware, efficiency: Efficiency, reference: str,
    names: Sequence[str] = FITTED,
) -> Calibration:  # fmt: skip
    """Constants by coordinate descent on the squared logarithms of predicted over measured time.

    Args:
        reference: of the new constants, for tables.
        names: of the constants to fit.
    """
    start = _without_own_share(hardware, efficiency)
    free = replace(hardware, tensor_share=None)
    before = list(_ratios(measured, free, start))
    current = start
    for _ in range(_ROUNDS):
        for name in names:
            candidates = list(_candidates(current, start, name, reference))
            current = min(candidates, key=_loss(measured, free, start, names))
    return Calibration(free, current, before, list(_ratios(measured, free, current)))


def _without_own_share(hardware: Hardware, efficiency: Efficiency) -> Efficiency:
    """The constants with the GPU's own share of its peak."""
    if hardware.tensor_share is None:
        return efficiency
    return replace(efficiency, matmul=replace(efficiency.matmul, value=hardware.tensor_share))


def _candidates(current: Efficiency, start: Efficiency, name: str, reference: str) -> Iterator[Efficiency]:
    for factor in _FACTORS:
        quantity = getattr(start, name)
        value = quantity.value * factor
        # A share of the maker's figure is at most 1.
        if quantity.unit or value <= 1:
            new = replace(quantity, value=value, source="measured here", reference=reference)
            yield replace(current, **{name: new if factor != 1 else quantity})


def _loss(
    measured: Sequence[MeasuredStep], hardware: Hardware, start: Efficiency, names: Sequence[str]
) -> Callable[[Efficiency], float]:
    def loss(efficiency: Efficiency) -> float:
        errors = sum(math.log(ratio) ** 2 for ratio in _ratios(measured, hardware, efficiency))
        moved = (getattr(efficiency, name).value / getattr(start, name).value for name in names)
        return errors + _PRIOR * sum(math.log(factor) ** 2 for factor in moved)

    return loss


def _ratios(measured: Sequence[MeasuredStep], hardware: Hardware, efficiency: Efficiency) -> Iterator[float]:
    for entry in measured:
        yield step_time(entry.step, hardware, efficiency).total / entry.seconds
