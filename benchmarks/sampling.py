"""Sampling with LightningDiT-S/1, batch 4: ours and the official arithmetic, and solvers vs. the official default.

Official sampling always runs in float32. Ours runs in bf16 if the machine is fast at it. The weights are random: that
is enough to compare the errors of solvers, but samples are no images.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import harness, official
from benchmarks import peer as baseline
from benchmarks.harness import Figure, Options
from benchmarks.peer import DELTA_T, NULL_LABEL, Peer
from benchmarks.train_step import CPU, LAYOUT, our_model, randomize
from sfd_scale.diffusion.adaptive import Dopri5Config, Tolerance, integrate
from sfd_scale.diffusion.fixed_step import FixedStepConfig
from sfd_scale.diffusion.guidance import AutoGuidance, NoGuidance, Velocity, guided
from sfd_scale.diffusion.samplers import SamplerConfig, sample
from sfd_scale.diffusion.schedule import SemanticFirstSchedule
from sfd_scale.engines.block_transforms import prepare_blocks
from sfd_scale.models.lightningdit import LightningDiT
from sfd_scale.runtime.device import fast_bf16
from sfd_scale.runtime.matmul import bf16_matmul_on_cpu

SCHEDULE = SemanticFirstSchedule(delta_t=DELTA_T)
GUIDANCE = AutoGuidance(scale_texture=1.5, scale_semantic=1.5)
GUIDE_DEPTH = 6
SOLVERS: dict[str, SamplerConfig] = {
    "Euler, 50 steps": FixedStepConfig(num_steps=50),
    "Euler (jump), 20 steps": FixedStepConfig(num_steps=20, jump=True),
    "Euler (jump), 50 steps": FixedStepConfig(num_steps=50, jump=True),
    "Heun (jump), 6 steps": FixedStepConfig(kind="heun2", num_steps=6, jump=True),
    "Heun (jump), 10 steps": FixedStepConfig(kind="heun2", num_steps=10, jump=True),
    "Heun (jump), 20 steps": FixedStepConfig(kind="heun2", num_steps=20, jump=True),
    "RK4 (jump), 5 steps": FixedStepConfig(kind="rk4", num_steps=5, jump=True),
    "dopri5 (jump)": Dopri5Config(jump=True),
    "dopri5 (jump), rtol 1e-2": Dopri5Config(jump=True, rtol=1e-2, atol=1e-5),
}


@dataclass(frozen=True)
class Models:
    """The models of both sides, with the same weights. The guidance models have fewer blocks."""

    ours: LightningDiT
    guide: LightningDiT
    theirs: Peer
    their_guide: Peer
    precision: str


def make_models(depth: int | None, compiled: bool) -> Models:
    """Ours without the alignment head, in bf16 if the CPU is fast at it; the baseline in float32."""
    ours, guide = our_model("S", depth, alignment=False), our_model("S", depth or GUIDE_DEPTH, alignment=False)
    theirs = Peer("S", depth=depth, compiled=compiled)
    their_guide = Peer("S", depth=depth or GUIDE_DEPTH, compiled=compiled)
    for own, other in ((ours, theirs), (guide, their_guide)):
        randomize(own)
        other.load_state_dict(own.state_dict(), strict=False)  # ours has no alignment head
        other.eval()
        own.eval().to(torch.bfloat16 if fast_bf16(CPU) else torch.float32)
        if compiled:
            prepare_blocks(own, "none", compiled=True)
    return Models(ours, guide, theirs, their_guide, "bf16" if fast_bf16(CPU) else "fp32")


def our_sampling(velocity: Velocity, noise: Tensor, labels: Tensor, config: SamplerConfig) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with bf16_matmul_on_cpu(CPU):
            return sample(velocity, noise, labels, SCHEDULE, LAYOUT, config).x

    return run


def their_default(models: Models, noise: Tensor, labels: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """The official default: dopri5 with one error norm over the batch and without `jump`; returns (x, evaluations)."""

    @torch.no_grad()
    def run() -> tuple[Tensor, Tensor]:
        field = baseline.field(models.theirs, labels)
        tolerance = Tolerance(1e-3, 1e-6, per_sample=False)
        return integrate(
            lambda x, g, y: field(g[0], x), noise, labels, SCHEDULE.end, [], tolerance, stop_at_end=False
        )  # fmt: skip

    return run


def run(options: Options) -> list[Figure]:
    """Sampling throughput with equal Euler steps, without guidance and with AutoGuidance; then solvers vs. dopri5."""
    depth, batch, steps = (1, 2, 2) if options.quick else (None, 4, 4)
    repeats = options.repeats or (1 if options.quick else 5)
    models = make_models(depth, compiled=not options.quick)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(batch, *LAYOUT.shape, generator=generator)
    labels = torch.randint(NULL_LABEL, (batch,), generator=generator)
    config = FixedStepConfig(num_steps=steps)
    figures: list[Figure] = []
    for kind, guidance in (("no guidance", NoGuidance()), ("AutoGuidance", GUIDANCE)):
        guide, their_guide = (None, None) if kind == "no guidance" else (models.guide, models.their_guide)
        ours = our_sampling(guided(models.ours, guidance, LAYOUT, guide=guide), noise, labels, config)
        field = baseline.field(models.theirs, labels, their_guide)
        contenders: dict[str, Callable[[], object]] = {
            "ours": ours, "peer": lambda field=field: baseline.euler(field, noise, steps)  # type: ignore[misc]
        }  # fmt: skip
        against = {"peer": "official arithmetic, fp32, compiled"}
        if options.official is not None and their_guide is None:
            model = official.model(options.official, "S", depth)
            contenders["official"] = official.euler(options.official, model, noise, labels, steps)
            against["official"] = "the official code"
        seconds = harness.race(contenders, repeats)
        figures += [
            harness.compare(
                f"S/1 Euler, {kind}, {models.precision}, batch {batch}",
                seconds,
                peer=side,
                against=label,
                work=batch * steps,
                unit="evaluations/s",
                target=1.8,
            )  # fmt: skip
            for side, label in against.items()
        ]
    return figures + _solvers(models, noise[:2], labels[:2], min(repeats, 2))


def _solvers(models: Models, noise: Tensor, labels: Tensor, repeats: int) -> list[Figure]:
    """The speed of each solver vs. the official default. The names give evaluations and error of both.

    The target is for the fastest solver whose error is no larger than the default's.
    """
    velocity = guided(models.ours, NoGuidance(), LAYOUT)
    with torch.no_grad():
        exact = guided(models.theirs, NoGuidance(), LAYOUT)
        fine = sample(exact, noise, labels, SCHEDULE, LAYOUT, FixedStepConfig(kind="rk4", num_steps=24, jump=True)).x
    default = their_default(models, noise, labels)
    last: dict[str, tuple[Tensor, Tensor]] = {}

    def solver(name: str) -> Callable[[], object]:
        def run() -> None:
            with bf16_matmul_on_cpu(CPU):
                result = sample(velocity, noise, labels, SCHEDULE, LAYOUT, SOLVERS[name])
            last[name] = (result.x, result.nfe.double().mean())

        return run

    def peer() -> None:
        x, evaluations = default()
        last["peer"] = (x, evaluations.double().max())

    # Compile for this batch size. The reference solution has compiled the baseline.
    our_sampling(velocity, noise, labels, FixedStepConfig(num_steps=2))()
    seconds = harness.race({"peer": peer} | {name: solver(name) for name in SOLVERS}, repeats, warmup=0)
    errors = {name: _error(x, fine) for name, (x, _) in last.items()}
    notes = {
        name: f"{evaluations:.0f} evaluations, error {errors[name]:.1e}" for name, (_, evaluations) in last.items()
    }
    as_good = [name for name in SOLVERS if errors[name] <= errors["peer"]]
    fastest = min(as_good, key=lambda name: statistics.median(seconds[name]), default=None)
    return [
        harness.compare(
            f"{name}: {notes[name]}",
            seconds,
            ours=name,
            against=f"official dopri5: {notes['peer']}",
            work=len(noise),
            unit="images/s",
            target=4.0 if name == fastest else None,
        )  # fmt: skip
        for name in SOLVERS
    ]


def _error(x: Tensor, fine: Tensor) -> float:
    """Distance from the reference solution, relative to its norm."""
    return float((x - fine).norm() / fine.norm())


if __name__ == "__main__":
    harness.main("sampling", run)
