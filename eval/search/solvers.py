"""`eval solvers`: error and FID of each solver over its evaluations, and the cheapest one that is good enough.

All solvers draw the same images: the same noise, labels, weights and guidance.

N images · C channels · H, W latent grid.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from eval.comparison.compare import Difference, difference
from eval.features.extractor import LazyExtractor
from eval.generate import PreparedGeneration
from eval.metrics.scores import SCORES
from eval.pages.figures import Curve, cost_curves
from eval.recipe import EvalRecipe
from eval.search.paired import ROUNDS, influence_of
from eval.search.sweep import Cell, Row, Shared, markdown, scored
from sfd_scale import config
from sfd_scale.diffusion.adaptive import Dopri5Config
from sfd_scale.diffusion.fixed_step import TABLEAUX, FixedStepConfig, FixedStepMethod
from sfd_scale.diffusion.multistep import MultistepConfig, MultistepMethod
from sfd_scale.diffusion.sampler import noise_of
from sfd_scale.diffusion.samplers import SamplerConfig, sample
from sfd_scale.runtime import distributed
from sfd_scale.runtime.files import write_atomically, write_json
from sfd_scale.runtime.matmul import bf16_matmul_on_cpu
from sfd_scale.runtime.output import plain_console

logger = logging.getLogger(__name__)
# The stand-in for the exact solution. Halving its steps shows its own error.
FINE = FixedStepConfig(kind="rk4", num_steps=25, jump=True)
JUMPING: tuple[FixedStepMethod, ...] = ("euler", "heun2", "rk4")
MULTISTEP: tuple[MultistepMethod, ...] = ("ab2", "ab3", "exp_ab2")
ERROR_IMAGES = 32


@dataclass(frozen=True)
class Candidate:
    """A solver with its settings. `method` names a curve, `steps` a point of it; – where the solver chooses them."""

    method: str
    steps: str
    sampler: SamplerConfig


@dataclass(frozen=True, kw_only=True)
class SolverRow:
    """One solver: mean evaluations per image, error, FID, and FID less that of the fine solution, with its interval.

    error: distance of the normalised latents from the fine solution, relative to its norm.
    sampler: the settings, as a recipe has them.
    """

    method: str
    steps: str
    nfe: float
    error: float
    fid: float
    difference: float
    low: float
    high: float
    sampler: dict[str, Any]


def candidates(budgets: Sequence[int], fewest: int) -> list[Candidate]:
    """Solvers that spend each budget of evaluations, and dopri5 with the official settings and with `jump`.

    Args:
        fewest: steps that a solver needs to end one at each discontinuity; a method whose budget has fewer is left out.
    """
    found = [
        Candidate("dopri5, official", "–", Dopri5Config(error_control="batch")),
        Candidate("dopri5 (jump)", "–", Dopri5Config(jump=True)),
        Candidate("dopri5 (jump), rtol 1e-2", "–", Dopri5Config(jump=True, rtol=1e-2, atol=1e-5)),
    ]
    for budget in budgets:
        found.append(Candidate("euler", str(budget), FixedStepConfig(num_steps=budget)))
        for kind in JUMPING:
            if (steps := budget // len(TABLEAUX[kind].times)) >= fewest:
                found.append(
                    Candidate(f"{kind} (jump)", str(steps), FixedStepConfig(kind=kind, num_steps=steps, jump=True))
                )
        if budget >= fewest:
            found += [Candidate(kind, str(budget), MultistepConfig(kind=kind, num_steps=budget)) for kind in MULTISTEP]
    return found


def solvers(
    recipe: EvalRecipe,
    out: Path,
    *,
    budgets: Sequence[int] = (8, 12, 20, 40),
    tolerance: float = 0.01,
    extractor: LazyExtractor | None = None,
) -> list[SolverRow]:
    """Draw the recipe's images with each solver. Writes solvers.json, solvers.md and solvers.png; prints the table.

    Args:
        budgets: numbers of evaluations for the solvers with fixed steps.
        tolerance: how much worse FID may be, as a share of the fine solution's.

    Raises:
        ValueError: for a budget or a tolerance below what makes sense, or a recipe that cannot be drawn or scored.
    """
    if not budgets or min(budgets) < 1 or tolerance <= 0:
        raise ValueError(f"--budgets {list(budgets)}, --tolerance {tolerance}; allowed: 1 and up, and above 0")
    shared = Shared.of(recipe, extractor)
    prepared = shared.prepare(recipe)
    fewest = len({*prepared.sampler.schedule.discontinuities(), *prepared.sampler.discontinuities}) + 1
    todo = candidates(budgets, fewest)
    cells = [Cell(_settings(found), dataclasses.replace(recipe, sampler=found.sampler)) for found in todo]
    fine = Cell({"solver": "fine"}, dataclasses.replace(recipe, sampler=FINE))
    errors = solution_errors(prepared, recipe, [found.sampler for found in todo])
    best, *rest = scored([fine, *cells], out, shared)
    rows = []
    for found, error, row in zip(todo, errors, rest, strict=True):
        gap = fid_difference(best, row, recipe, shared)
        rows.append(_row(found, error, row, gap))
    if distributed.is_main():
        own = solution_errors(prepared, recipe, [dataclasses.replace(FINE, num_steps=FINE.num_steps // 2)])[0]
        _write(rows, best, own, tolerance, recipe, out)
    return rows


@torch.no_grad()
def solution_errors(prepared: PreparedGeneration, recipe: EvalRecipe, samplers: Sequence[SamplerConfig]) -> list[float]:
    """The error of each solver on the first images of the recipe; see SolverRow.error."""
    sampler = prepared.sampler
    count = min(ERROR_IMAGES, sampler.batch, len(prepared.labels))
    noise = noise_of(sampler.seed, range(count), sampler.layout).to(sampler.device)
    labels = prepared.conditioning.given(prepared.labels[:count]).to(sampler.device)

    def solution(settings: SamplerConfig) -> Tensor:
        with bf16_matmul_on_cpu(sampler.device):
            return sample(
                sampler.velocity, noise, labels, sampler.schedule, sampler.layout, settings, sampler.discontinuities
            ).x

    exact = solution(FINE)
    return [((solution(settings) - exact).norm() / exact.norm()).item() for settings in samplers]


def fid_difference(fine: Row, row: Row, recipe: EvalRecipe, shared: Shared) -> Difference:
    """FID of a cell less that of the fine solution. Image i of both has the same noise and label."""
    found = [influence_of(SCORES[0], Path(cell.folder), shared.reference, recipe.metrics) for cell in (fine, row)]
    assert found[0] is not None and found[1] is not None
    return difference("fid", found[0], found[1], paired=True, rounds=ROUNDS)


def cheapest(rows: Sequence[SolverRow], allowed: float) -> SolverRow | None:
    """The row with the fewest evaluations whose FID is surely no more than `allowed` above the fine solution's.

    Surely: the whole interval of the difference is below. Of equal numbers of evaluations the smallest error decides.
    """
    good = [row for row in rows if row.high <= allowed]
    return min(good, key=lambda row: (round(row.nfe), row.error), default=None)


def _settings(found: Candidate) -> dict[str, str]:
    return {"solver": found.method, "steps": found.steps}


def _row(found: Candidate, error: float, row: Row, gap: Difference) -> SolverRow:
    assert row.nfe is not None and row.scores.fid is not None
    return SolverRow(
        method=found.method, steps=found.steps, nfe=row.nfe, error=error, fid=row.scores.fid,
        difference=gap.difference, low=gap.low, high=gap.high, sampler=config.to_dict(found.sampler),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- output

HEADS = ("solver", "steps", "evaluations", "error", "FID", "FID − fine", "95% interval")


def table_cells(row: SolverRow) -> list[str]:
    """The cells of a row, below HEADS."""
    return [
        row.method, row.steps, f"{row.nfe:.0f}", f"{row.error:.1e}", f"{row.fid:.3f}", f"{row.difference:+.3f}",
        f"{row.low:+.3f} to {row.high:+.3f}",
    ]  # fmt: skip


def _write(rows: list[SolverRow], fine: Row, own_error: float, tolerance: float, recipe: EvalRecipe, out: Path) -> None:
    fid = fine.scores.fid
    assert fid is not None and fine.nfe is not None
    rows = sorted(rows, key=lambda row: (row.nfe, row.error))
    chosen = cheapest(rows, tolerance * fid)
    verdict = (
        f"no solver here is surely within {tolerance:.1%} of the fine solution's FID; give more --budgets or samples"
        if chosen is None
        else f"the cheapest within {tolerance:.1%} of the fine solution's FID {fid:.3f}: {chosen.method}, steps "
        f"{chosen.steps}, {chosen.nfe:.0f} evaluations, FID {chosen.fid:.3f}"
    )
    note = (
        f"Fine solution: rk4 (jump), {FINE.num_steps} steps, {fine.nfe:.0f} evaluations, FID {fid:.3f}; with half of "
        f"the steps its error is {own_error:.1e}. {recipe.num_samples} images. Intervals are of sampling, paired."
    )
    data = {
        "fine": {"fid": fid, "nfe": fine.nfe, "error_of_half_the_steps": own_error}, "tolerance": tolerance,
        "num_samples": recipe.num_samples, "recipe": recipe.name, "checkpoint": str(recipe.checkpoint),
        "cheapest": None if chosen is None else config.to_dict(chosen), "verdict": verdict, "note": note,
        "rows": config.to_dict(rows),
    }  # fmt: skip
    write_json(out / "solvers.json", data)
    body = markdown(HEADS, [table_cells(row) for row in rows])
    write_atomically(out / "solvers.md", f"{body}\n{note}\n\n{verdict[0].upper()}{verdict[1:]}.\n")
    write_atomically(out / "solvers.png", picture(rows, fid, tolerance))
    table = Table(*HEADS, caption=note)
    for row in rows:
        table.add_row(*table_cells(row), style="bold" if row is chosen else None)
    plain_console().print(table)
    plain_console().print(verdict)


def picture(rows: Sequence[SolverRow], fid: float, tolerance: float) -> bytes:
    """Error and FID over evaluations, a curve per method: a PNG."""
    methods = dict.fromkeys(row.method for row in rows)
    errors = {m: Curve([(row.nfe, row.error) for row in rows if row.method == m]) for m in methods}
    fids = {
        m: Curve(
            [(row.nfe, row.fid) for row in rows if row.method == m],
            [(row.low - row.difference, row.high - row.difference) for row in rows if row.method == m],
        )
        for m in methods
    }
    titles = ("error of the solution", "FID, with 95% intervals of its difference")
    return cost_curves(dict(zip(titles, (errors, fids), strict=True)), "evaluations per image", (fid, fid * tolerance))


if __name__ == "__main__":
    from eval.__main__ import main

    main("solvers")
