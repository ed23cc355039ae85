"""Samples to a quality, as they rise with the batch."""

from __future__ import annotations

import statistics
from dataclasses import dataclass


@dataclass(frozen=True)
class CriticalBatch:
    """samples(B) ∝ 1 + B / critical: at the critical batch a run needs twice the samples of small batches, and half of
    the steps of large ones would not suffice (arXiv 1812.06162).

    model: whose measurements the curve comes from.
    """

    critical: float
    model: str

    def samples_factor(self, batch: float, reference: float) -> float:
        """Samples to the same quality at a batch, relative to those at the reference batch."""
        return (1 + batch / self.critical) / (1 + reference / self.critical)


# Batch → millions of samples to the target loss.
FLUX_SAMPLES = {512: 7.24, 1024: 8.49, 2048: 10.35, 4096: 15.35}


def fit_critical_batch(samples: dict[int, float], model: str) -> CriticalBatch:
    """The line of least squares through (batch, samples to the quality)."""
    slope, start = statistics.linear_regression(list(samples), list(samples.values()))
    return CriticalBatch(start / slope, model)


# No curve of this model is known.
FLUX = fit_critical_batch(FLUX_SAMPLES, "FLUX.1 of MLPerf, another model")
