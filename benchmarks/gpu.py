"""Correctness and throughput of the real model sizes on one GPU: `python -m benchmarks.gpu check` and `... bench`.

Needs torch, numpy and this checkout; torch-fidelity for Inception features and torchao for float8, which are left out
with a message if these packages are missing. `--device cpu` runs the same code on the CPU, with size S and small
batches.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import importlib.util
import io
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from benchmarks import gpu_attention, harness
from benchmarks import peer as baseline
from benchmarks.gpu_attention import TOLERANCE, relative_error
from benchmarks.harness import Figure
from benchmarks.peer import NULL_LABEL, Peer, PeerTraining
from benchmarks.train_step import LAYOUT, batch_of, model_flops, our_model, our_step, randomize
from sfd_scale.diffusion.fixed_step import FixedStepConfig
from sfd_scale.diffusion.guidance import AutoGuidance, GuidanceConfig, NoGuidance, guided
from sfd_scale.diffusion.samplers import sample
from sfd_scale.diffusion.schedule import SemanticFirstSchedule
from sfd_scale.engines.block_transforms import Checkpointing, float8_missing, prepare_blocks
from sfd_scale.engines.fsdp import FSDPConfig
from sfd_scale.models import attention
from sfd_scale.runtime.device import peak_flops
from sfd_scale.runtime.matmul import allow_tf32, bf16_matmul_on_cpu

logger = logging.getLogger(__name__)
Part = Literal["training", "sampling", "features"]
M = TypeVar("M", bound=nn.Module)
# 50,000 guided images take 100 Euler steps, with a B as guidance model.
EULER_STEPS, GUIDANCE_SIZE = 100, "B"


@dataclass(frozen=True)
class Workload:
    """Sizes and batches to run. On the CPU: size S with `depth` blocks, to test the benchmark."""

    device: torch.device
    sizes: tuple[str, ...]
    depth: int | None
    micro_batches: tuple[int, ...]  # of the first size; the second size takes every other one
    sampling_batches: tuple[int, ...]
    inception_batch: int
    repeats: int


def workload(device: torch.device, quick: bool) -> Workload:
    if device.type == "cuda":
        return Workload(device, ("XXL", "XL"), None, (16, 32, 64, 128), (64, 128, 256, 512), 256, 3)
    return Workload(device, ("S",), 1 if quick else None, (1,) if quick else (2, 8), (1,) if quick else (2, 8), 2, 1)


# ------------------------------------------------------------------------------------------------------- check


def check(device: torch.device) -> list[str]:
    """Compare attention and compiled blocks on this device with exact results; returns names of failed checks."""
    timed = gpu_attention.measure(device, *((32, 20) if device.type == "cuda" else (1, 1)))
    failed = [f"attention {t.backend}, head dim {t.head_dim}" for t in timed if t.error > TOLERANCE]
    worst = compiled_error(device)
    verdict = "ok" if worst <= TOLERANCE else "FAILED"
    print(f"block in bf16, compiled vs. eager, with gradients: worst error {worst:.1e}: {verdict}")
    return failed + (["compiled block"] if worst > TOLERANCE else [])


def compiled_error(device: torch.device) -> float:
    """Largest difference between a compiled and an eager S block in bf16, relative to the largest value."""
    model = our_model("S", 1, alignment=False)
    randomize(model)
    model = model.to(device, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *LAYOUT.shape, generator=generator).to(device)
    t, y = torch.tensor([0.2, 0.8], device=device), torch.tensor([1, NULL_LABEL], device=device)

    def run() -> list[Tensor]:
        model.zero_grad()
        with bf16_matmul_on_cpu(device):
            out = model(x, t, t, y)[0]
            out.square().mean().backward()
        return [out.detach(), *(p.grad for p in model.blocks.parameters() if p.grad is not None)]

    eager = run()
    prepare_blocks(model, "none", compiled=True)
    return max(relative_error(a, b) for a, b in zip(run(), eager, strict=True))


# ------------------------------------------------------------------------------------------------------- bench


def bench(chosen: Workload, parts: Sequence[Part] = get_args(Part)) -> Iterator[Figure]:
    """Run training, sampling and features; yields each figure as soon as it is measured."""
    attention.activate("auto", chosen.device)
    first, *others = chosen.sizes
    if "training" in parts:
        yield from _training(chosen, first, chosen.micro_batches)
    if "sampling" in parts:
        yield from _sampling(chosen, first)
    if "features" in parts:
        yield from _inception(chosen)
    for size in others if "training" in parts else ():
        yield from _training(chosen, size, chosen.micro_batches[1::2])


def _training(chosen: Workload, size: str, micro_batches: Sequence[int]) -> Iterator[Figure]:
    for count in micro_batches:
        peer = _rate(chosen, count, functools.partial(_peer_training, chosen, size, count))
        name = f"{size}/1 bf16 training, micro-batch {count}"
        for label, settings in _training_settings(chosen.device, eager=count == micro_batches[-1]):
            make = functools.partial(our_step, size, count, settings, chosen.depth)
            rate = _rate(chosen, count, make)
            yield _figure(f"{name}, {label}", rate, peer, "samples/s", utilisation(chosen, size, rate))


def _training_settings(device: torch.device, eager: bool) -> Iterator[tuple[str, FSDPConfig]]:
    base = FSDPConfig(sharding="replicate", compile=True)
    for mode in get_args(Checkpointing):
        yield f"activation checkpointing {mode}", dataclasses.replace(base, activation_checkpointing=mode)
    if eager:
        yield "eager", dataclasses.replace(base, compile=False)
    reason = float8_missing(device)
    if reason is None:
        yield "float8", dataclasses.replace(base, float8=True)
    else:
        print(f"float8: {reason}")


@dataclass(frozen=True)
class Rate:
    """Units/s and peak memory; None if it failed, for the reason `failure`."""

    value: float | None
    memory_gib: float | None
    failure: str = ""


def _rate(chosen: Workload, work: float, make: Callable[[], Callable[[], object]]) -> Rate:
    """Median rate of the function that `make` returns, with `work` units per call. An exception becomes a `failure`."""
    # Without it, earlier figures, which compile the same code for other shapes, would switch to dynamic shapes.
    torch.compiler.reset()
    gc.collect()
    on_gpu = chosen.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        seconds = harness.race(
            {"it": make()}, chosen.repeats, warmup=2, synchronize=torch.cuda.synchronize if on_gpu else None
        )["it"]
    except torch.OutOfMemoryError:
        return Rate(None, None, "out of memory")
    except Exception as error:
        logger.warning("a contender failed", exc_info=error)
        return Rate(None, None, f"failed: {type(error).__name__}")
    memory = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    return Rate(work / sorted(seconds)[len(seconds) // 2], memory)


def utilisation(chosen: Workload, size: str, rate: Rate) -> str:
    """Model FLOP utilisation (MFU) of training at this rate; empty if the device's peak is unknown."""
    peak = peak_flops(chosen.device)
    if rate.value is None or not math.isfinite(peak):
        return ""
    return f", MFU {rate.value * model_flops(size) / peak:.1%} of dense bf16"


def _figure(
    what: str, rate: Rate, peer: Rate, unit: str, note: str = "", against: str = "official arithmetic"
) -> Figure:
    memory = "" if rate.memory_gib is None else f", {rate.memory_gib:.1f} GiB"
    if rate.value is None:
        memory = f", {rate.failure}"
    if peer.value is None:
        against = f"{against}, {peer.failure}"
    ours, theirs = rate.value or math.nan, peer.value or math.nan
    figure = harness.measured(
        f"{what}{note}{memory}", ours=ours, peer=theirs, against=against, unit=unit, better="higher"
    )
    print("  ".join(harness.row(figure)), flush=True)
    return figure


def _peer_training(chosen: Workload, size: str, count: int) -> Callable[[], object]:
    model = _on(chosen.device, lambda: Peer(size, depth=chosen.depth, compiled=True))
    batch = batch_of(count).to(chosen.device)
    precision: baseline.Precision = "bf16" if chosen.device.type == "cuda" else "fp32"
    training = PeerTraining(model, precision)
    features = batch.features
    assert features is not None
    return lambda: training.step(batch.latents, features, batch.labels)


def _on(device: torch.device, make: Callable[[], M]) -> M:
    """Make a model with small random weights on the device; on one CPU core this would take longer than the run."""
    with device:
        model = make()
    randomize(model)
    return model


def _sampling(chosen: Workload, size: str) -> Iterator[Figure]:
    for count in chosen.sampling_batches:
        for name, guidance in (("no guidance", NoGuidance()), ("AutoGuidance", AutoGuidance())):
            peer = _images(chosen, count, _peer_sampling(chosen, size, count, guidance))
            for compiled in (True, False) if count == chosen.sampling_batches[0] else (True,):
                rate = _images(chosen, count, _our_sampling(chosen, size, count, guidance, compiled))
                label = f"{size}/1 bf16 sampling, {name}, Euler {EULER_STEPS}, batch {count}"
                note = "" if rate.value is None else f", 50,000 in {50_000 / rate.value / 60:.0f} min"
                yield _figure(f"{label}, {'compiled' if compiled else 'eager'}", rate, peer, "images/s", note)


def _images(chosen: Workload, count: int, make: Callable[[], Callable[[], object]]) -> Rate:
    """Images/s, from calls of two steps: all steps take the same time."""
    return _rate(chosen, count * 2 / EULER_STEPS, make)


def _our_sampling(
    chosen: Workload, size: str, count: int, guidance: GuidanceConfig, compiled: bool
) -> Callable[[], Callable[[], object]]:
    def make() -> Callable[[], object]:
        models = []
        for name in _names(chosen, size, guidance):
            build = functools.partial(our_model, name, chosen.depth, alignment=False)
            model = _on(chosen.device, build).to(torch.bfloat16).eval()
            if compiled:
                prepare_blocks(model, "none", compiled=True)
            models.append(model)
        velocity = guided(models[0], guidance, LAYOUT, guide=models[1] if len(models) > 1 else None)
        noise, labels = _start(chosen, count)

        def run() -> Tensor:
            with bf16_matmul_on_cpu(chosen.device):
                return sample(velocity, noise, labels, SemanticFirstSchedule(), LAYOUT, FixedStepConfig(num_steps=2)).x

        return run

    return make


def _peer_sampling(
    chosen: Workload, size: str, count: int, guidance: GuidanceConfig
) -> Callable[[], Callable[[], object]]:
    def make() -> Callable[[], object]:
        builds = [functools.partial(Peer, name, depth=chosen.depth, compiled=True) for name in
                  _names(chosen, size, guidance)]  # fmt: skip
        models = [_on(chosen.device, build).eval() for build in builds]
        noise, labels = _start(chosen, count)
        field = baseline.field(models[0], labels, models[1] if len(models) > 1 else None)

        def run() -> Tensor:
            with allow_tf32():  # as in the official script
                return baseline.euler(field, noise, 2)

        return run

    return make


def _names(chosen: Workload, size: str, guidance: GuidanceConfig) -> list[str]:
    """Size of the model, and of the guidance model with AutoGuidance."""
    guide = GUIDANCE_SIZE if chosen.device.type == "cuda" else "S"
    return [size, guide] if isinstance(guidance, AutoGuidance) else [size]


def _start(chosen: Workload, count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(count, *LAYOUT.shape, generator=generator)
    return noise.to(chosen.device), torch.randint(NULL_LABEL, (count,), generator=generator).to(chosen.device)


def _inception(chosen: Workload) -> Iterator[Figure]:
    if importlib.util.find_spec("torch_fidelity") is None:
        print("Inception features: needs the package torch-fidelity")
        return
    rate = _rate(chosen, chosen.inception_batch, functools.partial(_features, chosen))
    yield _figure(f"Inception features, batch {chosen.inception_batch}", rate, rate, "images/s", against="itself")


def _features(chosen: Workload) -> Callable[[], object]:
    """Inception with random weights, which have the same speed and need no file."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    from sfd_scale.runtime.matmul import strict_float32

    class Unloaded(FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, state: object, *args: object, **options: object) -> None:  # type: ignore[override]
            pass

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    layers = ["2048", "logits_unbiased"]
    network = Unloaded("inception-v3-compat", layers, feature_extractor_weights_path=nothing).to(chosen.device).eval()
    images = torch.zeros(chosen.inception_batch, 3, 256, 256, dtype=torch.uint8, device=chosen.device)

    @torch.no_grad()
    def features() -> object:
        with strict_float32(chosen.device):
            return network(images)

    return features


# ------------------------------------------------------------------------------------------------ command line


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("check", "bench"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="one block, batch 1: to test the benchmark")
    parser.add_argument("--part", action="append", choices=get_args(Part), help="part of bench (default: all)")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="start no further figure of bench after this time"
    )
    parser.add_argument("--out", type=Path, help="folder of gpu.json (default on a GPU: benchmarks/results)")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; give --device cpu to run it with size S on the CPU")
    print(f"{device}: {harness.machine()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d', time.gmtime())}")
    if options.what == "check":
        failed = check(device)
        print(f"failed: {', '.join(failed)}" if failed else "all within tolerance")
        return 1 if failed else 0
    started = time.monotonic()
    state = {"machine": harness.machine(), "versions": harness.versions(), "quick": options.quick}
    chosen = options.part or []
    words = [f"python -m benchmarks.gpu bench --device {device.type}", *(f"--part {part}" for part in chosen)]
    name = "_".join(["gpu", *chosen])  # a part must not overwrite the results of other parts
    out = options.out or (harness.RESULTS if device.type == "cuda" else None)
    figures: list[Figure] = []
    for figure in bench(workload(device, options.quick), chosen or get_args(Part)):
        figures.append(figure)
        if out is not None:
            # After every figure, so that an interrupted run keeps the earlier ones.
            harness.write(name, " ".join(words), figures, state, out)
        if time.monotonic() - started > options.seconds:
            print(f"stopped after {options.seconds:.0f} s; run the other figures with --part")
            break
    print(harness.markdown(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
