"""The texture codec that shows pixels and predicts features, in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sfd_scale import config
from sfd_scale.recipe import FitRecipe
from sfd_scale.tokenizers.pca import CovarianceAccumulator


def test_aligned_codes_are_the_best_that_descent_finds() -> None:
    """Against minimising ‖x − D·E·x‖² + w·‖f − A·E·x‖² over all three matrices, from several starts."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=generator, dtype=torch.float64) * torch.tensor([3.0, 2, 1.5, 1, 0.6, 0.4])
    f = x @ torch.randn(6, 3, generator=generator, dtype=torch.float64) * torch.tensor([0.1, 0.1, 2.0])
    f[:, 2] += 4 * x[:, 5]  # what pixels hardly show
    f += 0.3 * torch.randn(400, 3, generator=generator, dtype=torch.float64)
    x, f = x - x.mean(0), f - f.mean(0)
    total = CovarianceAccumulator.of(torch.cat([x, f], 1))
    weight = 0.7 * x.square().mean(0).sum() / f.square().mean(0).sum()

    def loss(e: Tensor, d: Tensor, a: Tensor) -> Tensor:
        z = x @ e.T
        return (x - z @ d).square().sum(1).mean() + weight * (f - z @ a).square().sum(1).mean()

    def of(encoder: Tensor) -> float:
        z = x @ encoder.T
        return float(loss(encoder, torch.linalg.lstsq(z, x).solution, torch.linalg.lstsq(z, f).solution))

    found = total.aligned(2, 6, 0.7)
    assert found.restoring is not None
    best = float("inf")
    for start in range(4):
        begin = torch.Generator().manual_seed(start)
        parts = [
            torch.randn(*s, generator=begin, dtype=torch.float64, requires_grad=True) for s in ((2, 6), (2, 6), (2, 3))
        ]
        optimizer = torch.optim.LBFGS(
            parts, lr=0.5, max_iter=400, tolerance_change=1e-14, line_search_fn="strong_wolfe"
        )

        def closure(parts: list[Tensor] = parts, optimizer: torch.optim.LBFGS = optimizer) -> Tensor:
            optimizer.zero_grad()
            value = loss(*parts)
            value.backward()
            return value

        optimizer.step(closure)
        best = min(best, float(loss(*parts).detach()))
    ours = of(found.directions.double())
    assert ours == pytest.approx(best, rel=1e-6)
    # Its own decoder is the best for its codes, and components of pixels alone are worse codes.
    z = x @ found.directions.double().T
    assert (torch.linalg.lstsq(z, x).solution - found.restoring.double()).abs().max() < 1e-5
    assert of(CovarianceAccumulator.of(x).components(2).directions.double()) > 1.02 * ours


def test_alignment_needs_features() -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.vision: null; codec\.alignment above 0 needs a vision encoder"):
        config.load("study/texture", FitRecipe, ["codec.alignment=1.0"])


# --------------------------------------------------------------------------------------------- baselines
