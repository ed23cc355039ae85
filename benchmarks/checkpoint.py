"""Checkpoints of LightningDiT-S/1: time that a save blocks training, time of a save, time of a load; vs. torch.save."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import Figure, Options
from benchmarks.peer import Peer, PeerTraining
from benchmarks.train_step import our_model, randomize
from sfd_scale.checkpoint import CheckpointManager
from sfd_scale.checkpoint.manager import CheckpointConfig
from sfd_scale.engines.ema import EMA, EMAConfig
from sfd_scale.engines.fsdp import FSDPConfig, make_fsdp
from sfd_scale.engines.optim import AdamWConfig


def run(options: Options) -> list[Figure]:
    """Checkpoints/s: training blocked, saved and verified, loaded. The official code uses torch.save on rank 0."""
    depth = 1 if options.quick else None
    model, theirs = our_model("S", depth), Peer("S", depth=depth)
    randomize(model, theirs)
    engine = make_fsdp(model, AdamWConfig(), FSDPConfig(sharding="replicate", precision="fp32"))
    ema, training = EMA(engine.fragments(), EMAConfig()), PeerTraining(theirs, "fp32")
    for parameter in theirs.parameters():
        parameter.grad = torch.zeros_like(parameter)
    training.optimizer.step()
    repeats, steps = options.repeats or (1 if options.quick else 4), itertools.count(1)
    with tempfile.TemporaryDirectory() as folder:
        manager = CheckpointManager(Path(folder), CheckpointConfig(keep_last=1))
        file = Path(folder) / "peer.pt"

        def peer() -> None:
            state: dict[str, Any] = {"model": theirs.state_dict(), "ema": training.ema.state_dict()}
            torch.save({**state, "opt": training.optimizer.state_dict()}, file)

        def whole() -> None:
            manager.save(next(steps), engine, ema, {})
            manager.wait()

        saved = harness.race({"ours": whole, "peer": peer}, repeats)
        blocked = {"ours": [_blocked(manager, next(steps), engine, ema) for _ in range(repeats)], "peer": saved["peer"]}
        latest = manager.latest()
        assert latest is not None
        loaded = harness.race(
            {
                "ours": lambda: manager.load(latest, engine, ema),
                "peer": lambda: torch.load(file, weights_only=True),
            },
            repeats,
        )
    engine.close()
    return [
        harness.compare(f"S/1 checkpoint, {what}", seconds, against=against, work=1, unit="1/s")
        for what, seconds, against in (
            ("training blocked", blocked, "torch.save of model, ema, opt"),
            ("written and verified", saved, "torch.save of model, ema, opt"),
            ("loaded into the engine", loaded, "torch.load alone"),
        )
    ]


def _blocked(manager: CheckpointManager, step: int, engine: Any, ema: EMA) -> float:
    """Seconds for which a background save blocks training."""
    seconds = harness.race({"it": lambda: manager.save(step, engine, ema, {})}, 1, warmup=0)["it"][0]
    manager.wait()
    return seconds


if __name__ == "__main__":
    harness.main("checkpoint", run)
