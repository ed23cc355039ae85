"""Part 7: sampling of the large size with a guidance model; CUDA graphs, TF32, and decoding beside sampling."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks import peer as baseline
from benchmarks.gpu.attention import TOLERANCE, relative_error
from benchmarks.gpu.report import Part
from benchmarks.gpu.workload import Rate, Workload, figure, fresh, measure, on, start
from benchmarks.peer import Peer
from benchmarks.train_step import LAYOUT, our_model
from eval.work.cuda_graphs import GraphedModel
from eval.work.side_stream import SideStream
from sfd_scale.diffusion.fixed_step import FixedStepConfig
from sfd_scale.diffusion.guidance import AutoGuidance, FlowModel, GuidanceConfig, NoGuidance, Velocity, guided
from sfd_scale.diffusion.latents import LatentStats
from sfd_scale.diffusion.sampler import DrawnLatents, Sampler
from sfd_scale.diffusion.samplers import sample
from sfd_scale.diffusion.schedule import SemanticFirstSchedule
from sfd_scale.engines.block_transforms import prepare_blocks
from sfd_scale.models import attention
from sfd_scale.runtime.matmul import allow_tf32, bf16_matmul_on_cpu, deterministic_cudnn, no_tf32

# 50,000 guided images take 100 Euler steps, with a small guidance model.
EULER_STEPS, TIMED_STEPS = 100, 2
TARGET_IMAGES_PER_S = 13.0
GUIDED = AutoGuidance(scale_texture=1.5, scale_semantic=1.5)
TF32_TOLERANCE = 5e-3  # TF32 keeps 10 bits of a mantissa


@dataclasses.dataclass(frozen=True)
class Kind:
    """How our side samples. precision: of the weights; tf32: of their matmuls in float32."""

    guidance: GuidanceConfig
    dtype: torch.dtype
    compiled: bool = True
    tf32: bool = False
    graphs: bool = False


def run(part: Part, chosen: Workload) -> None:
    attention.activate("auto", chosen.device)
    _throughput(part, chosen)
    check(part, chosen)
    _tf32_throughput(part, chosen)


def check(part: Part, chosen: Workload) -> None:
    attention.activate("auto", chosen.device)
    _graphs_equal(part, chosen)
    part.run("TF32 beside float32", functools.partial(_tf32_error, part, chosen))
    part.run("decoding beside sampling", functools.partial(_beside, part, chosen))


def _throughput(part: Part, chosen: Workload) -> None:
    """Ours first. The same figures come again when their peers are measured."""
    fast = Kind(GUIDED, torch.bfloat16 if chosen.precision == "bf16" else torch.float32)
    kinds = {"compiled": fast}
    if chosen.device.type == "cuda":
        kinds["compiled, CUDA graphs"] = dataclasses.replace(fast, graphs=True)
    rates: dict[tuple[str, int], Rate | None] = {}
    for name, kind in kinds.items():
        for count in chosen.sampling_batches:
            label = f"{_label(chosen, count)}, {name}"
            rates[name, count] = part.run(label, functools.partial(images, chosen, count, ours, kind))
            _figure(part, label, rates[name, count], None)
    reached = [rate for rate in rates.values() if rate is not None]
    if reached and chosen.device.type == "cuda":
        part.figure(target(max(reached, key=lambda rate: rate.value)))
    for count in chosen.sampling_batches:
        label = f"{_label(chosen, count)}, official arithmetic"
        peer = part.run(label, functools.partial(images, chosen, count, theirs, fast))
        for name in kinds:
            _figure(part, f"{_label(chosen, count)}, {name}", rates[name, count], peer)


def _label(chosen: Workload, count: int) -> str:
    return f"{chosen.name} and {chosen.guide} {chosen.precision} sampling, AutoGuidance, batch {count}"


def _figure(part: Part, label: str, mine: Rate | None, peer: Rate | None) -> None:
    if mine is not None:
        note = f", Euler {EULER_STEPS}, 50,000 in {50_000 / mine.value / 60:.0f} min"
        part.figure(figure(label, mine, peer, "images/s", note))


def target(rate: Rate) -> harness.Figure:
    what = f"guided images by Euler {EULER_STEPS}, XXL with B"
    return harness.measured(
        what, ours=rate.value, peer=TARGET_IMAGES_PER_S, against="target", unit="images/s", better="higher", target=1.0
    )  # fmt: skip


Side = Callable[[Workload, int, Kind], Callable[[], object]]


def images(chosen: Workload, count: int, side: Side, kind: Kind) -> Rate:
    """Images/s, from calls of two steps: all steps take the same time."""
    return measure(chosen, count * TIMED_STEPS / EULER_STEPS, lambda: side(chosen, count, kind))


def velocity_of(chosen: Workload, count: int, kind: Kind) -> Velocity:
    models: list[FlowModel] = []
    for size in [chosen.size, chosen.guide] if isinstance(kind.guidance, AutoGuidance) else [chosen.size]:
        build = functools.partial(our_model, size, chosen.depth, alignment=False)
        model = on(chosen.device, build).to(kind.dtype).eval()
        if kind.compiled:
            prepare_blocks(model, "none", compiled=True)
        models.append(GraphedModel(model, (count,)) if kind.graphs else model)
    return guided(models[0], kind.guidance, LAYOUT, guide=models[1] if len(models) > 1 else None)


def ours(chosen: Workload, count: int, kind: Kind, steps: int = TIMED_STEPS) -> Callable[[], Tensor]:
    velocity, (noise, labels) = velocity_of(chosen, count, kind), start(chosen.device, count)
    config = FixedStepConfig(num_steps=steps)

    def run() -> Tensor:
        with allow_tf32() if kind.tf32 else no_tf32(), bf16_matmul_on_cpu(chosen.device):
            return sample(velocity, noise, labels, SemanticFirstSchedule(), LAYOUT, config).x

    return run


def theirs(chosen: Workload, count: int, kind: Kind) -> Callable[[], object]:
    """The official sampler: float32 weights, TF32 on a GPU, compiled."""
    sizes = [chosen.size, chosen.guide] if isinstance(kind.guidance, AutoGuidance) else [chosen.size]
    builds = [functools.partial(Peer, size, depth=chosen.depth, compiled=True) for size in sizes]
    models = [on(chosen.device, build).eval() for build in builds]
    noise, labels = start(chosen.device, count)
    field = baseline.field(models[0], labels, models[1] if len(models) > 1 else None)

    def run() -> Tensor:
        with allow_tf32():
            return baseline.euler(field, noise, TIMED_STEPS)

    return run


def _graphs_equal(part: Part, chosen: Workload) -> None:
    """CUDA graphs beside the same compiled models without them, and both beside eager ones."""
    if chosen.device.type != "cuda":
        part.leave_out("CUDA graphs beside eager", "needs a CUDA device")
        return
    plain = Kind(GUIDED, torch.bfloat16)
    kinds = {
        "eager": dataclasses.replace(plain, compiled=False), "compiled": plain,
        "CUDA graphs": dataclasses.replace(plain, graphs=True),
    }  # fmt: skip
    small = dataclasses.replace(chosen, depth=chosen.check_depth)
    results: dict[str, Tensor] = {}
    for name, kind in kinds.items():
        fresh(chosen.device)
        found = part.run(f"sampling, {name}", lambda kind=kind: ours(small, chosen.check_batch, kind, 10)())  # type: ignore[misc]
        if found is not None:
            results[name] = found
    for mine, other in (("compiled", "eager"), ("CUDA graphs", "compiled")):
        if mine in results and other in results:
            same = " (equal bits)" if torch.equal(results[mine], results[other]) else ""
            error = relative_error(results[mine], results[other])
            part.check(f"10 Euler steps, {mine} beside {other}{same}", error, TOLERANCE)


def _tf32_error(part: Part, chosen: Workload) -> None:
    """TF32 as in the official evaluations."""
    fresh(chosen.device)
    exact = Kind(NoGuidance(), torch.float32)
    small = dataclasses.replace(chosen, depth=chosen.check_depth)
    kinds = (dataclasses.replace(exact, tf32=True), exact)
    mine, other = (ours(small, chosen.check_batch, kind)() for kind in kinds)
    part.check("2 Euler steps, TF32 beside float32", relative_error(mine, other), TF32_TOLERANCE)


def _tf32_throughput(part: Part, chosen: Workload) -> None:
    if chosen.device.type != "cuda":
        part.leave_out("sampling in TF32", "needs a CUDA device")
        return
    count = chosen.sampling_batches[0]
    label = f"{chosen.name} tf32 sampling, no guidance, batch {count}, compiled"
    kind = Kind(NoGuidance(), torch.float32, tf32=True)
    _figure(part, label, part.run(label, functools.partial(images, chosen, count, ours, kind)), None)


# ------------------------------------------------------------------------------------- decoding beside sampling


def decoder(width: int) -> nn.Module:
    """Convolutions that double the side four times, (N, C, 16, 16) → (N, 3, 256, 256): a stand-in for a decoder."""
    layers: list[nn.Module] = [nn.Conv2d(LAYOUT.channels, width, 3, padding=1)]
    for _ in range(4):
        layers += [nn.SiLU(), nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1)]
    return nn.Sequential(*layers, nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))


def _beside(part: Part, chosen: Workload) -> None:
    """Decode on a side stream while the next batch is drawn, as `eval generate` does. The images must not change."""
    cuda = chosen.device.type == "cuda"
    fresh(chosen.device)
    small, count = dataclasses.replace(chosen, depth=chosen.check_depth), chosen.check_batch
    decode = on(chosen.device, functools.partial(decoder, 128 if cuda else 8)).eval()
    stats = LatentStats(
        torch.zeros(LAYOUT.channels, device=chosen.device), torch.ones(LAYOUT.channels, device=chosen.device)
    )
    sampler = Sampler(
        velocity=velocity_of(small, count, Kind(NoGuidance(), torch.bfloat16 if cuda else torch.float32)),
        layout=LAYOUT, schedule=SemanticFirstSchedule(), config=FixedStepConfig(num_steps=10 if cuda else 2),
        stats=stats, decode=lambda latents: (decode(latents) * 64 + 128).clamp(0, 255).to(torch.uint8), seed=0,
        batch=count, device=chosen.device,
    )  # fmt: skip
    with deterministic_cudnn(), bf16_matmul_on_cpu(chosen.device):
        serial, beside = (_chunks(sampler, range(4), overlap) for overlap in (False, True))
    different = sum(int((a != b).sum()) for a, b in zip(serial, beside, strict=True))
    part.check("pixels that differ if decoding runs beside sampling", float(different), 0.0)


def _chunks(sampler: Sampler, chunks: Sequence[int], overlap: bool) -> list[Tensor]:
    """Batches of images: one after the other, or decoded in a thread while the next one is drawn."""
    side, labels = SideStream(sampler.device), torch.zeros(sampler.batch, dtype=torch.int64)
    made: list[Future[Tensor]] = []
    with ThreadPoolExecutor(1) as thread:
        for chunk in chunks:
            drawn = sampler.draw(range(chunk * sampler.batch, (chunk + 1) * sampler.batch), labels)
            made.append(thread.submit(_pixels, sampler, side, side.mark(), drawn))
            if not overlap:
                made[-1].result()
    return [future.result() for future in made]


def _pixels(sampler: Sampler, side: SideStream, mark: torch.cuda.Event | None, drawn: DrawnLatents) -> Tensor:
    with side.after(mark):
        return sampler.pixels(drawn).cpu()
