"""One optimizer step of LightningDiT-S/1 with EMA, batch 8: ours and the official arithmetic.

Ours is a step of the trainer: the objective with its keyed random numbers, the FSDP2 engine on one rank, AdamW, EMA.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import harness, official
from benchmarks.harness import Figure, Options
from benchmarks.peer import DELTA_T, NULL_LABEL, SEMANTIC, SIDE, TEXTURE, Peer, PeerTraining, Precision
from sfd_scale.data.batches import LatentBatch
from sfd_scale.data.waiting import READ_LIMIT_S, PatientBatches
from sfd_scale.diffusion.conditioning import ClassLabels
from sfd_scale.diffusion.latents import LatentLayout
from sfd_scale.diffusion.schedule import SemanticFirstSchedule
from sfd_scale.engines.ema import EMA, EMAConfig
from sfd_scale.engines.fsdp import FSDPConfig, make_fsdp
from sfd_scale.engines.optim import AdamWConfig
from sfd_scale.models.alignment import AlignmentConfig
from sfd_scale.models.lightningdit import SIZES, LightningDiT, LightningDiTConfig
from sfd_scale.planning.flops import training_flops
from sfd_scale.runtime import distributed
from sfd_scale.runtime.device import has_bf16
from sfd_scale.runtime.matmul import bf16_matmul_on_cpu, measured_flops
from sfd_scale.training.semantic_first import SemanticFirstConfig, SemanticFirstObjective

CPU = torch.device("cpu")
READ_AHEAD = 4  # micro-batches, as in the trainer, which a machine with torch alone cannot import
LAYOUT = LatentLayout(texture_channels=TEXTURE, semantic_channels=SEMANTIC, size=SIDE)


def batch_of(count: int) -> LatentBatch:
    """Random latents, features and labels with the shapes of ImageNet 256x256."""
    generator = torch.Generator().manual_seed(0)
    return LatentBatch(
        latents=torch.randn(count, *LAYOUT.shape, generator=generator),
        labels=torch.randint(NULL_LABEL, (count,), generator=generator),
        keys=torch.stack([torch.zeros(count, dtype=torch.int64), torch.arange(count)], dim=1),
        features=torch.randn(count, 768, SIDE, SIDE, generator=generator),
    )


def our_model(size: str, depth: int | None = None, alignment: bool = True) -> LightningDiT:
    layers, width, heads = SIZES[size]
    head = AlignmentConfig(depth=min(2, depth or layers)) if alignment else None
    config = LightningDiTConfig(depth=depth or layers, width=width, heads=heads, alignment=head)
    return LightningDiT(config, in_channels=TEXTURE + SEMANTIC, input_size=SIDE, two_clocks=True)


def model_flops(size: str, depth: int | None = None) -> float:
    """FLOPs of forward and backward of `our_model` for one sample."""
    return training_flops(
        lambda: our_model(size, depth),
        lambda: (torch.zeros(1, *LAYOUT.shape), torch.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.long)),
    )


def randomize(*models: nn.Module) -> None:
    """Fill all parameters with small random numbers, the same in each model: freshly initialised models output zero."""
    for model in models:
        generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
        for name, parameter in sorted(model.named_parameters()):
            std = 0.02 if parameter.ndim == 1 else 1 / math.sqrt(parameter[0].numel())
            std = min(std, 0.05) if "adaLN" in name or name.startswith("final_layer.linear") else std
            offset = 1.0 if "norm" in name and parameter.ndim == 1 else 0.0
            parameter.data.normal_(offset, std, generator=generator)


def our_step(
    size: str, count: int, settings: FSDPConfig, depth: int | None, *, read_ahead: bool = False
) -> Callable[[], object]:
    """A function that does one step of the trainer (draws, loss, backward, optimizer, EMA) and returns the loss.

    Args:
        read_ahead: a thread makes the draws before the step, as in the trainer. Without it they are a part of the step.
    """
    with distributed.device():
        model = our_model(size, depth)
    randomize(model)
    engine = make_fsdp(model, AdamWConfig(), settings)
    schedule = SemanticFirstSchedule(delta_t=DELTA_T)
    objective = SemanticFirstObjective(SemanticFirstConfig(), LAYOUT, schedule, ClassLabels(NULL_LABEL), seed=0)
    # On the device before the first step, as the peer's is: the trainer copies batches beside the step.
    batches: Iterator[LatentBatch] = itertools.repeat(batch_of(count).to(engine.device))
    if read_ahead:
        drawn = map(objective.prepare, batches)
        batches = PatientBatches(drawn, ahead=READ_AHEAD, limit_s=READ_LIMIT_S, advice="a draw takes too long")
    ema, steps = EMA(engine.fragments(), EMAConfig()), itertools.count()

    def step() -> Tensor:
        with bf16_matmul_on_cpu(engine.device):
            losses = objective(engine.model, next(batches).to(engine.device))
            engine.backward(losses.total, last=True)
            engine.step(1e-4)
            ema.update(next(steps))
        return losses.total.detach()

    return step


def peer_step(size: str, count: int, precision: Precision, compiled: bool, depth: int | None) -> Callable[[], object]:
    model = Peer(size, depth=depth, compiled=compiled)
    randomize(model)
    training, batch = PeerTraining(model, precision), batch_of(count)
    features = batch.features
    assert features is not None
    return lambda: training.step(batch.latents, features, batch.labels)


def _ours(size: str, count: int, precision: Precision, depth: int | None) -> Callable[[], object]:
    return our_step(size, count, FSDPConfig(sharding="replicate", precision=precision, compile=True), depth)


def _one_of(side: str, size: str, count: int, precision: Precision, depth: int | None, threads: int) -> None:
    """Two compiled steps of one side, to measure its peak memory."""
    torch.set_num_threads(threads)
    step = peer_step(size, count, precision, True, depth) if side == "peer" else _ours(size, count, precision, depth)
    for _ in range(2):
        step()


def run(options: Options) -> list[Figure]:
    """Training throughput and peak memory, fp32 and bf16, vs. the official arithmetic."""
    depth, count = (1, 2) if options.quick else (None, 8)
    repeats = options.repeats or (1 if options.quick else 5)
    figures, seconds = _raced("S/1", "fp32", depth, count, repeats, targets=(1.0, 1.0), checkout=options.official)
    figures += _roofline(seconds, depth, count)
    if has_bf16(CPU):
        figures += _raced("S/1", "bf16", depth, count, repeats, targets=(1.15, 1.4), checkout=options.official)[0]
    else:
        # A ratio beside it would say nothing of machines that have bf16.
        print("S/1 bf16: left out, because this CPU has no bf16 and runs the official arithmetic by scalar emulation")
    sides = ("ours", "peer")
    ours, peer = (harness.peak_memory(_one_of, side, "S", count, "fp32", depth, options.threads) for side in sides)
    figures.append(
        harness.measured(
            f"S/1 fp32 step, batch {count}, peak memory",
            ours=ours / 2**30,
            peer=peer / 2**30,
            against="official arithmetic, compiled",
            unit="GiB",
            target=1.0,
        )  # fmt: skip
    )
    return figures


def _raced(
    name: str, precision: Precision, depth: int | None, count: int, repeats: int, targets: tuple[float, float],
    warmup: int = 1, checkout: Path | None = None,
) -> tuple[list[Figure], dict[str, list[float]]]:  # fmt: skip
    contenders = {
        "ours": _ours("S", count, precision, depth),
        "compiled": peer_step("S", count, precision, True, depth),
        "eager": peer_step("S", count, precision, False, depth),
    }
    against: dict[str, tuple[str, float | None]] = {
        side: (f"official arithmetic, {side}", target)
        for side, target in zip(("compiled", "eager"), targets, strict=True)
    }
    if checkout is not None:
        batch = batch_of(count)
        assert batch.features is not None
        contenders["official"] = official.training_step(
            checkout, "S", precision, batch.latents, batch.features, batch.labels, depth
        )
        against["official"] = ("the official code", targets[0])
    seconds = harness.race(contenders, repeats, warmup=warmup)
    figures = [
        harness.compare(
            f"{name} {precision} step, batch {count}",
            seconds,
            peer=side,
            against=label,
            work=count,
            unit="samples/s",
            target=target,
        )  # fmt: skip
        for side, (label, target) in against.items()
    ]
    return figures, seconds


# Per weight, AdamW reads 4 numbers (weight, gradient, moments) and writes 3; EMA reads 2 and writes 1.
UPDATE_BYTES = 4 * (4 + 3 + 2 + 1)


def _roofline(seconds: dict[str, list[float]], depth: int | None, count: int) -> list[Figure]:
    """Each side's step vs. its lower bound: the model FLOPs at the measured peak of matmuls, plus the memory traffic of
    the update at the measured bandwidth. The ratio is the fraction of the bound that is reached."""
    model = our_model("S", depth)
    flops = count * model_flops("S", depth)
    moved = UPDATE_BYTES * sum(parameter.numel() for parameter in model.parameters())
    peak, bandwidth = measured_flops(CPU, torch.float32), _bandwidth()
    bound = flops / peak + moved / bandwidth
    label = (
        f"bound: {flops / 1e9:.0f} GFLOP at {peak / 1e9:.0f} GFLOP/s and {moved / 1e9:.2f} GB at "
        f"{bandwidth / 1e9:.1f} GB/s"
    )
    return [
        harness.measured(
            f"S/1 fp32 step, batch {count}, {side}", ours=statistics.median(seconds[key]), peer=bound, against=label,
            unit="s",
        )
        for key, side in (("ours", "ours"), ("compiled", "official arithmetic, compiled"))
    ]  # fmt: skip


def _bandwidth() -> float:
    """Memory bandwidth in bytes/s: the best of several sums of two arrays of 64 MiB into a third."""
    left, right, out = (torch.ones(1 << 24) for _ in range(3))
    best = math.inf
    for _ in range(8):
        started = time.perf_counter()
        torch.add(left, right, out=out)
        best = min(best, time.perf_counter() - started)
    return 3 * 4 * left.numel() / best


if __name__ == "__main__":
    harness.main("train_step", run)
