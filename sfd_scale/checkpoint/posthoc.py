"""Post-hoc EMA: the average of any length, reconstructed after training (EDM2, arXiv 2312.02696, section 3.2).

The saved averages and the wanted one are weighted means of the same trajectory. A least-squares fit of their profiles
gives the nearest combination of saved averages. The inner products of the profiles have a closed form (appendix C).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfd_scale.checkpoint.folder import Checkpoint, whole_checkpoints
from sfd_scale.engines.ema import check_length, length_of, power_exponent
from sfd_scale.runtime.run_paths import RunPaths

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
    """Factors that combine the averages saved at `times` with `lengths` to that of `length` at `time`; and the error.

    The factors sum to 1, so that constant weights are reproduced. The error is the distance of the combined profile
    from the wanted one, relative to the norm of the wanted one.
    """
    t = np.array([*times, time], dtype=np.float64) / time  # of order 1: the profiles scale with the time
    gamma = np.array([power_exponent(value) for value in (*lengths, length)], dtype=np.float64)
    products = profile_product(t[:, None], gamma[:, None], t[None], gamma[None])
    among, wanted, own = products[:-1, :-1], products[:-1, -1], products[-1, -1]
    count = len(times)
    system = np.ones((count + 1, count + 1))
    system[:count, :count], system[count, count] = among, 0.0
    # Neighbouring profiles are nearly alike, so the system is close to singular: least squares in place of a solve.
    x = np.linalg.lstsq(system, np.append(wanted, 1.0), rcond=1e-13)[0][:count]
    square = x @ among @ x - 2 * x @ wanted + own
    return x, math.sqrt(max(square, 0.0) / own)


@dataclass(frozen=True)
class SavedAverage:
    """One power-function average in a snapshot or checkpoint."""

    step: int
    length: float
    checkpoint: Checkpoint
    part: str


def saved_averages(run: RunPaths) -> list[SavedAverage]:
    """Every power-function average in the snapshots and checkpoints of a run, each step and length once."""
    found: dict[tuple[int, float], SavedAverage] = {}
    for checkpoint in [*whole_checkpoints(run.snapshots_folder), *whole_checkpoints(run.checkpoints_folder)]:
        for part in checkpoint.parts:
            length = length_of(part)
            if length is not None:
                found.setdefault((checkpoint.step, length), SavedAverage(checkpoint.step, length, checkpoint, part))
    return sorted(found.values(), key=lambda saved: (saved.step, saved.length))


def reconstruct(run: RunPaths, length: float, step: int | None = None) -> tuple[dict[str, Tensor], int, float]:
    """The weights of a run, averaged with sigma_rel `length` at a saved step: (fp32 tensors, step, error of the fit).

    Args:
        step: the newest if None. Later averages are not used.

    Raises:
        ValueError: if the run kept no such averages, or none at that step.
    """
    check_length("--ema-length", length)
    saved = saved_averages(run)
    if not saved:
        raise ValueError(
            f"{run.path}: no power-function averages; train with ema.lengths=[0.05,0.10] ema.snapshot_every=N"
        )
    steps = sorted({one.step for one in saved})
    if step is not None and step not in steps:
        raise ValueError(f"--step: {step}; averages in {run.path} are of the steps {steps}")
    at = steps[-1] if step is None else step
    used = [one for one in saved if one.step <= at]
    factors, error = coefficients([one.step for one in used], [one.length for one in used], at, length)
    total: dict[str, Tensor] = {}
    for one, factor in zip(used, factors.tolist(), strict=True):
        for name, tensor in one.checkpoint.tensors(one.part).items():
            # In float64: the factors have both signs and magnitudes above 1.
            total[name] = total.get(name, torch.zeros((), dtype=torch.float64)) + factor * tensor.double()
    return {name: tensor.float() for name, tensor in total.items()}, at, error
