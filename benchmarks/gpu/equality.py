"""Part 3: loss and gradients of real training steps: eager, compiled, with checkpointing, and in float8. Before them,
the gradients of our Triton kernels alone.

The yardstick is eager float32. Compiled bf16 may be as far from it as eager bf16 is, and half as much again.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.report import Part
from benchmarks.gpu.workload import Workload, compare, fresh, on
from benchmarks.peer import DELTA_T, NULL_LABEL
from benchmarks.train_step import LAYOUT, batch_of, our_model
from sfd_scale.data.batches import LatentBatch
from sfd_scale.diffusion.conditioning import ClassLabels
from sfd_scale.diffusion.schedule import SemanticFirstSchedule
from sfd_scale.engines.block_transforms import float8_missing
from sfd_scale.engines.fsdp import FSDPConfig, FSDPEngine, make_fsdp
from sfd_scale.engines.optim import AdamWConfig
from sfd_scale.models import attention, fused_backward
from sfd_scale.models.lightningdit import SIZES
from sfd_scale.runtime.matmul import bf16_matmul_on_cpu, no_tf32
from sfd_scale.training.semantic_first import SemanticFirstConfig, SemanticFirstObjective

SLACK = 1.5
# Float32 alone differs by this much. bf16 weights follow other paths after some updates.
GRADIENT_FLOOR, LOSS_FLOOR = 1e-4, 2e-3
FLOAT8_GRADIENT, FLOAT8_LOSS = 0.2, 2e-2
OWN_KERNELS, OWN_KERNELS_ERROR = "gradients of our backward kernels, bf16, beside float64", 1e-2


@dataclass(frozen=True)
class Trained:
    """Losses of the steps, and gradients of the first one."""

    losses: list[float]
    gradients: dict[str, Tensor]

    def differs(self, reference: Trained) -> tuple[float, float]:
        """Relative error of the gradients, and the largest one of the losses."""
        losses = [abs(a - b) / abs(b) for a, b in zip(self.losses, reference.losses, strict=True)]
        return compare(self.gradients, reference.gradients), max(losses)


def run(part: Part, chosen: Workload) -> None:
    attention.activate("auto", chosen.device)
    part.run(OWN_KERNELS, functools.partial(own_kernels, part, chosen))
    base = chosen.engine()
    exact = dataclasses.replace(base, precision="fp32")
    reference = part.run("eager float32", functools.partial(train, chosen, exact))
    eager = part.run("eager", functools.partial(train, chosen, base)) if exact != base else reference
    if reference is None or eager is None:
        return
    gradient, loss = eager.differs(reference)
    steps = f"{chosen.name} with {chosen.check_depth} blocks, {chosen.steps} steps, {base.precision}"
    part.fact(f"{steps}, eager: error of gradients and losses", [gradient, loss], f"{gradient:.1e}, {loss:.1e}")
    variants = {
        "compiled": dataclasses.replace(base, compile=True),
        "compiled, selective": dataclasses.replace(base, compile=True, activation_checkpointing="selective"),
        "compiled, block": dataclasses.replace(base, compile=True, activation_checkpointing="block"),
        "compiled, flat parameters": dataclasses.replace(base, compile=True, flat_parameters=True),
    }
    limits = SLACK * gradient + GRADIENT_FLOOR, SLACK * loss + LOSS_FLOOR
    for name, settings in variants.items():
        _compare(part, f"{steps}, {name}", chosen, settings, reference, limits)
    reason = float8_missing(chosen.device)
    if reason is not None:
        part.leave_out("float8 beside bf16", reason)
        return
    float8 = dataclasses.replace(base, compile=True, float8=True)
    _compare(part, f"{steps}, float8 beside bf16", chosen, float8, eager, (FLOAT8_GRADIENT, FLOAT8_LOSS))


def own_kernels(part: Part, chosen: Workload) -> None:
    """Beside float64, with the tokens of a real batch. Their outputs are rounded to bf16."""
    if chosen.device.type != "cuda":
        part.leave_out(OWN_KERNELS, "they need a CUDA device")
        return
    fused_backward.load()
    _, width, heads = SIZES[chosen.size]
    found = fused_backward.errors(chosen.device, width, heads, torch.bfloat16, samples=8, tokens=256)
    for name, error in found.items():
        part.check(f"{OWN_KERNELS}: {name}", error, OWN_KERNELS_ERROR)


def _compare(
    part: Part, what: str, chosen: Workload, settings: FSDPConfig, reference: Trained, limits: tuple[float, float]
) -> None:
    made = part.run(what, functools.partial(train, chosen, settings))
    if made is not None:
        for name, error, limit in zip(("gradients", "losses"), made.differs(reference), limits, strict=True):
            part.check(f"{what}: {name}", error, limit)


def train(chosen: Workload, settings: FSDPConfig) -> Trained:
    """The same steps for all settings: weights, batches and draws are equal."""
    fresh(chosen.device)
    model = on(chosen.device, functools.partial(our_model, chosen.size, chosen.check_depth))
    engine = make_fsdp(model, AdamWConfig(), settings)
    schedule = SemanticFirstSchedule(delta_t=DELTA_T)
    objective = SemanticFirstObjective(SemanticFirstConfig(), LAYOUT, schedule, ClassLabels(NULL_LABEL), seed=0)
    batch, losses, gradients = batch_of(chosen.check_batch).to(engine.device), [], dict[str, Tensor]()
    with no_tf32(), bf16_matmul_on_cpu(engine.device):
        for step in range(chosen.steps):
            terms = objective(engine.model, _of_step(batch, step))
            engine.backward(terms.total, last=True)
            gradients = gradients or _gradients(engine)
            engine.step(1e-4)
            losses.append(terms.total.detach())
    engine.close()
    return Trained([float(loss) for loss in losses], gradients)


def _of_step(batch: LatentBatch, step: int) -> LatentBatch:
    """The batch with other noise, times and labels to drop: they follow from the keys."""
    return dataclasses.replace(batch, keys=batch.keys + torch.tensor([step, 0]))


def _gradients(engine: FSDPEngine) -> dict[str, Tensor]:
    found = {}
    for name, parameter in engine.model.named_parameters():
        assert parameter.grad is not None
        local = parameter.grad.to_local() if hasattr(parameter.grad, "to_local") else parameter.grad
        found[name] = local.detach().clone()
    return engine.flat.tensors(found)
