"""Sampling with LightningDiT-S/1, batch 4: ours and the official arithmetic, with equal Euler steps.

Official sampling always runs in float32. Ours runs in bf16 if the machine is fast at it. The weights are random, so
that samples are no images. `sfd eval solvers` compares solvers on a trained model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import harness, official
from benchmarks import peer as baseline
from benchmarks.harness import Figure, Options
from benchmarks.peer import DELTA_T, NULL_LABEL, Peer
from benchmarks.train_step import CPU, LAYOUT, our_model, randomize
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


def run(options: Options) -> list[Figure]:
    """Sampling throughput with equal Euler steps, without guidance and with AutoGuidance."""
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
    return figures


if __name__ == "__main__":
    harness.main("sampling", run)
