"""AdamW and EMA of LightningDiT-S/1 (39M parameters): the engine's step and fused EMA, vs. one tensor at a time."""

from __future__ import annotations

import itertools

import torch

from benchmarks import harness
from benchmarks.harness import Figure, Options
from benchmarks.peer import Peer, PeerTraining, update_average
from benchmarks.train_step import our_model, randomize
from sfd_scale.engines.ema import EMA, EMAConfig
from sfd_scale.engines.fsdp import FSDPConfig, make_fsdp
from sfd_scale.engines.optim import AdamWConfig


def run(options: Options) -> list[Figure]:
    """AdamW and EMA updates/s, vs. torch's AdamW and EMA tensor by tensor. Ours also computes the gradient norm."""
    depth = 1 if options.quick else None
    model, baseline = our_model("S", depth), Peer("S", depth=depth)
    randomize(model, baseline)
    engine = make_fsdp(model, AdamWConfig(), FSDPConfig(sharding="replicate", precision="fp32"))
    ema, steps = EMA(engine.fragments(), EMAConfig()), itertools.count()
    parameters = list(engine.model.parameters())
    gradients = [torch.full_like(parameter, 1e-3) for parameter in parameters]

    def ours() -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        engine.step(1e-4)
        ema.update(next(steps))

    training = PeerTraining(baseline, "fp32")
    for parameter in baseline.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)

    def peer() -> None:
        training.optimizer.step()
        update_average(training.ema, baseline, training.decay)

    seconds = harness.race({"ours": ours, "peer": peer}, options.repeats or (3 if options.quick else 15), warmup=2)
    engine.close()
    return [
        harness.compare(
            "S/1 AdamW and EMA",
            seconds,
            against="official arithmetic",
            work=1,
            unit="updates/s",
            target=2.0,
        )  # fmt: skip
    ]


if __name__ == "__main__":
    harness.main("ema_optimizer", run)
