"""Part 4: training throughput of the large size, beside the official arithmetic, by micro-batch; and with our backward
kernels beside inductor's, and flat parameters beside whole ones.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from benchmarks import harness
from benchmarks.gpu.report import Part
from benchmarks.gpu.workload import Rate, Workload, figure, measure, on
from benchmarks.peer import Peer, PeerTraining
from benchmarks.train_step import batch_of, model_flops, our_step
from sfd_scale.engines.block_transforms import float8_missing
from sfd_scale.engines.fsdp import FSDPConfig
from sfd_scale.models import attention, fused_backward
from sfd_scale.runtime.device import peak_flops

TARGET_MICRO_BATCH, TARGET_MFU = 64, 0.50


def run(part: Part, chosen: Workload) -> None:
    """Ours at every micro-batch first. The same figures come again when their peers are measured."""
    attention.activate("auto", chosen.device)
    label, settings = "activation checkpointing none", chosen.engine(compile=True)
    rates = {count: _ours(part, chosen, count, label, settings) for count in chosen.micro_batches}
    peers: dict[int, Rate | None] = {}
    for count in chosen.micro_batches:
        other, what = functools.partial(_peer, chosen, count), _name(chosen, count, "official arithmetic")
        peers[count] = part.run(what, functools.partial(measure, chosen, count, other))
        _figure(part, chosen, _name(chosen, count, label), rates[count], peers[count])
    first = chosen.micro_batches[0]
    _own_kernels(part, chosen, first, rates[first])
    _flat_parameters(part, chosen, max(1, first // 4))
    for label, settings in _others(part, chosen):
        _ours(part, chosen, first, label, settings, peers[first])


def _own_kernels(part: Part, chosen: Workload, count: int, ours: Rate | None) -> None:
    """The step with our Triton kernels of backward, beside the same step with inductor's alone."""
    what = f"{_name(chosen, count, 'our backward kernels')} beside inductor's"
    if chosen.device.type != "cuda":
        part.leave_out(what, "they need a CUDA device")
        return
    make = functools.partial(our_step, chosen.size, count, chosen.engine(compile=True), chosen.depth, read_ahead=True)
    with mock.patch.object(fused_backward, "applies", lambda x, condition, heads: False):
        plain = part.run(what, lambda: measure(chosen, count, make))
    if ours is not None and plain is not None:
        part.figure(figure(what, ours, plain, "samples/s", against="inductor's kernels"))


def _flat_parameters(part: Part, chosen: Workload, count: int) -> None:
    """Few images, so that the host sets the pace: the step with flat parameters beside the same step without."""
    rates = {}
    for wanted in (True, False):
        settings = chosen.engine(compile=True, flat_parameters=wanted)
        make = functools.partial(our_step, chosen.size, count, settings, chosen.depth, read_ahead=True)
        what = f"{_name(chosen, count, 'flat parameters')}: {str(wanted).lower()}"
        rates[wanted] = part.run(what, functools.partial(measure, chosen, count, make))
    flat, whole = rates[True], rates[False]
    if flat is not None and whole is not None:
        what = f"{_name(chosen, count, 'flat parameters')} beside whole ones"
        part.figure(figure(what, flat, whole, "samples/s", against="whole parameters"))


def _others(part: Part, chosen: Workload) -> Iterator[tuple[str, FSDPConfig]]:
    base = chosen.engine(compile=True)
    reason = float8_missing(chosen.device)
    if reason is None:
        yield "float8", dataclasses.replace(base, float8=True)
    else:
        part.leave_out("float8", reason)
    for mode in ("selective", "block"):
        yield f"activation checkpointing {mode}", dataclasses.replace(base, activation_checkpointing=mode)  # type: ignore[arg-type]
    yield "eager", dataclasses.replace(base, compile=False)


def _name(chosen: Workload, count: int, label: str) -> str:
    """As `sfd plan --measured` reads it."""
    return f"{chosen.name} {chosen.precision} training, micro-batch {count}, {label}"


def _ours(
    part: Part, chosen: Workload, count: int, label: str, settings: FSDPConfig, peer: Rate | None = None
) -> Rate | None:
    make = functools.partial(our_step, chosen.size, count, settings, chosen.depth, read_ahead=True)
    rate = part.run(_name(chosen, count, label), lambda: measure(chosen, count, make))
    _figure(part, chosen, _name(chosen, count, label), rate, peer)
    if rate is not None and count == TARGET_MICRO_BATCH and settings == chosen.engine(compile=True):
        mfu = utilisation(chosen, rate)
        if math.isfinite(mfu):
            part.figure(target(chosen, mfu))
    return rate


def _figure(part: Part, chosen: Workload, what: str, rate: Rate | None, peer: Rate | None) -> None:
    if rate is not None:
        mfu = utilisation(chosen, rate)
        note = f", MFU {mfu:.1%}" if math.isfinite(mfu) else ""
        part.figure(figure(what, rate, peer, "samples/s", note))


def target(chosen: Workload, mfu: float) -> harness.Figure:
    what = f"{chosen.name} MFU of training at micro-batch {TARGET_MICRO_BATCH}"
    return harness.measured(
        what, ours=mfu, peer=TARGET_MFU, against="target", unit="of dense bf16", better="higher", target=1.0
    )


def utilisation(chosen: Workload, rate: Rate) -> float:
    """Model FLOP utilisation (MFU), of dense bf16; NaN if the device's peak is unknown."""
    peak = peak_flops(chosen.device)
    return rate.value * model_flops(chosen.size, chosen.depth) / peak if math.isfinite(peak) else math.nan


def _peer(chosen: Workload, count: int) -> Callable[[], object]:
    """The official arithmetic, with its batch on the device and its draws made there."""
    model = on(chosen.device, lambda: Peer(chosen.size, depth=chosen.depth, compiled=True))
    batch = batch_of(count).to(chosen.device)
    training = PeerTraining(model, chosen.precision)
    features = batch.features
    assert isinstance(features, torch.Tensor)
    return lambda: training.step(batch.latents, features, batch.labels)
