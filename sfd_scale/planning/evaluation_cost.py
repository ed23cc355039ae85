"""GPU time of drawing and scoring 50,000 images, by solver and guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sfd_scale.planning.efficiency import Efficiency, Quantity
from sfd_scale.planning.hardware import Hardware
from sfd_scale.planning.step_time import forward_seconds
from sfd_scale.planning.work import Work

IMAGES = 50_000
BATCH = 256
# Evaluations of the velocity by each solver.
SOLVERS = {
    "Adams-Bashforth 3, 20 steps (the _fast recipes)": Quantity(20, "evaluations", "given", "1 per step"),
    "dopri5, official tolerances": Quantity(77, "evaluations", "measured here", "the quickstart's trained model"),
    "Euler, 100 steps": Quantity(100, "evaluations", "given", "1 per step"),
    "Euler, 250 steps": Quantity(250, "evaluations", "given", "1 per step"),
}
# Inception of one 299² image.
_FEATURES = Quantity(11.5e9, "FLOPs", "measured elsewhere", "Inception v3, 5.7 GMAC")


@dataclass(frozen=True)
class EvaluationCost:
    """GPU-minutes of 50,000 images, for a solver and the kinds of guidance."""

    solver: str
    unguided: float
    cfg: float
    autoguidance: float | None


def evaluation_costs(
    model: Work, guide: Work | None, decoder: Work | None, hardware: Hardware, efficiency: Efficiency
) -> list[EvaluationCost]:
    """The compiled model in bf16, the decoder with TF32 convolutions, and Inception's features in fp32.

    Args:
        guide: the guidance model of AutoGuidance. decoder: of the texture VAE; None leaves both out.
    """

    def forward(work: Work | None, compiled: bool) -> float:
        return 0.0 if work is None else forward_seconds(work, BATCH, compiled, hardware, efficiency) / BATCH

    each, extra = forward(model, True), forward(guide, True)
    after = forward(decoder, False) + _FEATURES.value / (hardware.peak_fp32 * efficiency.matmul.value)

    def minutes(evaluations: float, seconds: float) -> float:
        return IMAGES * (evaluations * seconds + after) / 60

    return [
        EvaluationCost(
            name, minutes(count.value, each), minutes(count.value, 2 * each),
            None if guide is None else minutes(count.value, each + extra),
        )
        for name, count in SOLVERS.items()
    ]  # fmt: skip


def rows(costs: Sequence[EvaluationCost]) -> list[list[str]]:
    return [
        [
            cost.solver, f"{cost.unguided:,.0f}", f"{cost.cfg:,.0f}",
            "" if cost.autoguidance is None else f"{cost.autoguidance:,.0f}",
        ]
        for cost in costs
    ]  # fmt: skip


HEAD = ("GPU-minutes of 50,000 images", "unguided", "CFG", "AutoGuidance (B)")
