"""The Monge Inception Distance (MIND): a sliced Wasserstein distance of features.

N samples · M reference images · D feature channels · P projections.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eval.metrics.one_thread import one_thread
from sfd_scale.runtime import seeding

SCALE = 3.0  # MIND's factor α is SCALE · D; the mean over directions of (u·x)² is |x|² / D
DIRECTIONS = 100  # projected and sorted at once, to bound the memory


def monge_inception_distance(
    samples: Tensor, reference: Tensor, count: int = 5000, projections: int = 1000, seed: int = 0
) -> float:
    """3 · D · the mean over random directions u of W₂²(u·x, u·y), by sorting (arXiv 2605.06797).

    The definition was read from torch-fidelity's implementation (commit a51aa64) and from reports of the paper.
    MIND falls as the number of rows grows; compare values of the same number.

    Args:
        samples, reference: (N, D) and (M, D). Both are reduced to min(count, N, M) rows, which are drawn by the seed.

    Raises:
        ValueError: for sets of different features.
    """
    with one_thread():
        x, y = (part[rows].double() for part, rows in drawn_rows(samples, reference, count, seed))
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        for part in directions(projections, x.shape[1], seed).to(x.device).split(DIRECTIONS):
            total += sliced_wasserstein(x, y, part).sum()
    return float((SCALE * x.shape[1] * total / projections).item())


def drawn_rows(samples: Tensor, reference: Tensor, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Both sets, (N, D) and (M, D), each with the numbers of its rows that count: min(count, N, M) of them.

    Raises:
        ValueError: for sets of different features.
    """
    if samples.shape[1] != reference.shape[1]:
        raise ValueError(f"{samples.shape[1]} and {reference.shape[1]} features; they are of two extractors")
    rows = min(count, len(samples), len(reference))
    return [
        (part, seeding.permutation(seed, f"mind_{name}", len(part))[:rows].to(part.device))
        for name, part in (("samples", samples), ("reference", reference))
    ]


def directions(count: int, dim: int, seed: int = 0) -> Tensor:
    """Directions that are uniform on the unit sphere (arXiv 2605.06797): (count, dim) float64."""
    drawn = torch.randn(count, dim, dtype=torch.float64, generator=seeding.generator(seed, "mind_directions"))
    return drawn / drawn.norm(dim=1, keepdim=True)


def sliced_wasserstein(x: Tensor, y: Tensor, directions: Tensor) -> Tensor:
    """W₂² of the projections of x (N, D) and y (N, D) on each direction (P, D) (arXiv 2605.06797): (P,)."""
    a, b = ((part @ directions.T).sort(dim=0).values for part in (x, y))
    return (a - b).square().mean(0)


def transport_potentials(x: Tensor, y: Tensor, directions: Tensor) -> Tensor:
    """How much W₂² moves by one row more of x, times the number of rows, on each direction: (N, P), mean 0.

    It is the Kantorovich potential φ with φ′(a) = 2 (a − T(a)) (Santambrogio 2015, Prop. 7.17). T maps the sorted
    projections of x (N, D) to those of y (N, D); the integral is by the trapezoidal rule.
    """
    a, order = (x @ directions.T).sort(dim=0)
    apart = a - (y @ directions.T).sort(dim=0).values
    steps = a.diff(dim=0) * (apart[1:] + apart[:-1])
    potential = torch.cat([torch.zeros_like(a[:1]), steps.cumsum(0)])
    return torch.zeros_like(a).scatter(0, order, potential - potential.mean(0))
