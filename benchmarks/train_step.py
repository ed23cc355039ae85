"""One optimizer step of LightningDiT-S/1, batch 8, with its EMA: ours beside the official arithmetic.

Ours is what the trainer does in a step: the objective with its keyed draws, the FSDP2 engine on one rank, AdamW, EMA.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks import official as theirs
from benchmarks.harness import Figure, Options
from benchmarks.peer import DELTA_T, NULL_LABEL, SEMANTIC, SIDE, TEXTURE, Peer, PeerTraining, Precision
from sfd_scale.data.batches import LatentBatch
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
LAYOUT = LatentLayout(texture_channels=TEXTURE, semantic_channels=SEMANTIC, size=SIDE)


def batch_of(count: int) -> LatentBatch:
    """Random latents, features and labels of the sizes of ImageNet 256x256."""
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
    """Fill every parameter with small random numbers, the same in each model: a fresh one gives zero everywhere."""
    for model in models:
        generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
        for name, parameter in sorted(model.named_parameters()):
            spread = 0.02 if parameter.ndim == 1 else 1 / math.sqrt(parameter[0].numel())
            spread = min(spread, 0.05) if "adaLN" in name or name.startswith("final_layer.linear") else spread
            offset = 1.0 if "norm" in name and parameter.ndim == 1 else 0.0
            parameter.data.normal_(offset, spread, generator=generator)


def our_step(size: str, count: int, settings: FSDPConfig, depth: int | None) -> Callable[[], object]:
    """Draws, loss, backward, optimizer step and EMA, as the trainer does them, ready to be called for a loss each."""
    with distributed.device():
        model = our_model(size, depth)
    randomize(model)
    engine = make_fsdp(model, AdamWConfig(), settings)
    schedule = SemanticFirstSchedule(delta_t=DELTA_T)
    objective = SemanticFirstObjective(SemanticFirstConfig(), LAYOUT, schedule, NULL_LABEL, seed=0)
    ema, steps, batch = EMA(engine.fragments(), EMAConfig()), itertools.count(), batch_of(count)

    def step() -> Tensor:
        with bf16_matmul_on_cpu(engine.device):
            losses = objective(engine.model, batch.to(engine.device))
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
    """Two compiled steps of one side, for its memory."""
    torch.set_num_threads(threads)
    step = peer_step(size, count, precision, True, depth) if side == "peer" else _ours(size, count, precision, depth)
    for _ in range(2):
        step()


def run(options: Options) -> list[Figure]:
    """Training step: samples/s and peak memory, fp32 and bf16, against the official arithmetic."""
    depth, count = (1, 2) if options.quick else (None, 8)
    repeats = options.repeats or (1 if options.quick else 5)
    official = options.official
    figures, seconds = _raced("S/1", "fp32", depth, count, repeats, targets=(1.0, 1.0), official=official)
    figures += _roofline(seconds, depth, count)
    if has_bf16(CPU):
        figures += _raced("S/1", "bf16", depth, count, repeats, targets=(1.15, 1.4), official=official)[0]
    else:
        # Without bf16 instructions the official step takes scalar products, 1.3 GFLOP/s: minutes for the whole model.
        figures += _raced("S/1 of one block", "bf16", 1, 1, min(repeats, 3), targets=(1.15, 1.4))[0]
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
    warmup: int = 1, official: Path | None = None,
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
    if official is not None:
        batch = batch_of(count)
        assert batch.features is not None
        contenders["official"] = theirs.training_step(
            official, "S", precision, batch.latents, batch.features, batch.labels, depth
        )
        against["official"] = ("the official code", targets[0])
    seconds = harness.race(contenders, repeats, warmup=warmup)
    figures = [
        harness.compare(
            f"{name} {precision} step, batch {count}",
            seconds,
            peer=side,
            against=told,
            work=count,
            unit="samples/s",
            target=target,
        )  # fmt: skip
        for side, (told, target) in against.items()
    ]
    return figures, seconds


# AdamW reads weight, gradient and both moments and writes three of them; EMA reads two numbers and writes one.
UPDATE_BYTES = 4 * (4 + 3 + 2 + 1)


def _roofline(seconds: dict[str, list[float]], depth: int | None, count: int) -> list[Figure]:
    """Each side's step beside the least that it can take: its products at the measured peak, and the update of the
    weights at the measured bandwidth. The ratio is the share of that bound."""
    model = our_model("S", depth)
    flops = count * model_flops("S", depth)
    moved = UPDATE_BYTES * sum(parameter.numel() for parameter in model.parameters())
    peak, bandwidth = measured_flops(CPU, torch.float32), _bandwidth()
    bound = flops / peak + moved / bandwidth
    told = (
        f"bound: {flops / 1e9:.0f} GFLOP at {peak / 1e9:.0f} GFLOP/s and {moved / 1e9:.2f} GB at "
        f"{bandwidth / 1e9:.1f} GB/s"
    )
    return [
        harness.measured(
            f"S/1 fp32 step, batch {count}, {side}", ours=statistics.median(seconds[key]), peer=bound, against=told,
            unit="s",
        )
        for key, side in (("ours", "ours"), ("compiled", "official arithmetic, compiled"))
    ]  # fmt: skip


def _bandwidth() -> float:
    """Bytes/s of a sum of two arrays into a third, 64 MiB each; the best of several."""
    left, right, out = (torch.ones(1 << 24) for _ in range(3))
    best = math.inf
    for _ in range(8):
        started = time.perf_counter()
        torch.add(left, right, out=out)
        best = min(best, time.perf_counter() - started)
    return 3 * 4 * left.numel() / best


if __name__ == "__main__":
    harness.main("train_step", run)
