"""The average of any length, made after training from power-function averages (EDM2, arXiv 2312.02696, section 3.2).

The saved averages and the wanted one are weightings of the same trajectory. Least squares over their profiles, whose
inner products are known in closed form (EDM2, appendix C), gives the combination of saved averages that is nearest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfd_scale.checkpoint.folder import committed, parts_of, read_state
from sfd_scale.checkpoint.weights import load_part
from sfd_scale.engines.ema import check_length, length_of, power_exponent

Floats = NDArray[np.float64]


def profile_product(t_a: Floats, gamma_a: Floats, t_b: Floats, gamma_b: Floats) -> Floats:
    """Integral of p_a · p_b, where p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t], elementwise.

    With t the smaller and T the larger of both times, and gamma_T the exponent of the latter:
    (gamma_a + 1) (gamma_b + 1) / (gamma_a + gamma_b + 1) · (t / T)^gamma_T / T (EDM2, appendix C).
    """
    later = np.where(t_a < t_b, gamma_b, gamma_a)
    ratio = np.minimum(t_a, t_b) / np.maximum(t_a, t_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * ratio**later / np.maximum(t_a, t_b)


def coefficients(
    times: Sequence[float], lengths: Sequence[float], time: float, length: float
) -> tuple[NDArray[np.float64], float]:
    """Factors of the averages saved at `times` with `lengths` for that of `length` at `time`, and the error left.

    The factors sum to 1, so that weights that stand still are reproduced. The error is the distance of the combined
    profile from the wanted one, relative to the latter's norm.
    """
    t = np.array([*times, time], dtype=np.float64) / time  # of order 1: the profiles scale with the time
    gamma = np.array([power_exponent(value) for value in (*lengths, length)], dtype=np.float64)
    products = profile_product(t[:, None], gamma[:, None], t[None], gamma[None])
    among, wanted, own = products[:-1, :-1], products[:-1, -1], products[-1, -1]
    count = len(times)
    system = np.ones((count + 1, count + 1))
    system[:count, :count], system[count, count] = among, 0.0
    # Least squares here too: neighbouring profiles are nearly alike, so that the system is close to singular.
    x = np.linalg.lstsq(system, np.append(wanted, 1.0), rcond=1e-13)[0][:count]
    square = x @ among @ x - 2 * x @ wanted + own
    return x, math.sqrt(max(square, 0.0) / own)


@dataclass(frozen=True)
class Saved:
    """One power-function average in a committed folder."""

    step: int
    length: float
    folder: Path
    part: str


def saved_averages(run: Path) -> list[Saved]:
    """Every power-function average in the snapshots and checkpoints of a run folder, each step and length once."""
    found: dict[tuple[int, float], Saved] = {}
    for folder in [*committed(run / "snapshots"), *committed(run / "checkpoints")]:
        step = int(read_state(folder)["step"])
        for part in parts_of(folder):
            length = length_of(part)
            if length is not None:
                found.setdefault((step, length), Saved(step, length, folder, part))
    return sorted(found.values(), key=lambda saved: (saved.step, saved.length))


def reconstruct(run: Path, length: float, step: int | None = None) -> tuple[dict[str, Tensor], int, float]:
    """The weights of a run averaged with sigma_rel `length` at a saved step: (fp32 tensors, the step, the error left).

    Args:
        step: the newest if None. Later averages are not used.

    Raises:
        ValueError: where the run kept no such averages, or not at that step.
    """
    check_length("--ema-length", length)
    saved = saved_averages(run)
    if not saved:
        raise ValueError(f"{run}: no power-function averages; train with ema.lengths=[0.05,0.10] ema.snapshot_every=N")
    steps = sorted({one.step for one in saved})
    if step is not None and step not in steps:
        raise ValueError(f"--step: {step}; averages in {run} are of the steps {steps}")
    at = steps[-1] if step is None else step
    used = [one for one in saved if one.step <= at]
    factors, error = coefficients([one.step for one in used], [one.length for one in used], at, length)
    total: dict[str, Tensor] = {}
    for one, factor in zip(used, factors.tolist(), strict=True):
        for name, tensor in load_part(one.folder, one.part).items():
            # Factors of both signs, larger than 1: summed in float64.
            total[name] = total.get(name, torch.zeros((), dtype=torch.float64)) + factor * tensor.double()
    return {name: tensor.float() for name, tensor in total.items()}, at, error
