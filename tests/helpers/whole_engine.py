"""A plain-torch engine without process group, and its checkpoints, for tests in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfd_scale.checkpoint import CheckpointConfig, CheckpointManager
from sfd_scale.engines.ema import EMA, EMAConfig
from sfd_scale.engines.engine import Fragment, StepResult
from sfd_scale.engines.optim import create_state, param_groups, set_lr, set_step
from sfd_scale.engines.replica_check import Replicas
from tests.helpers.tiny import OPTIMIZER, TinyModel, batch


class WholeEngine:
    """The engine protocol in plain torch, without sharding and process group."""

    def __init__(self, model: nn.Module | None = None) -> None:
        self.model = TinyModel() if model is None else model
        self.device, self.optimizer_steps = torch.device("cpu"), 0
        self.optimizer = torch.optim.AdamW(param_groups(self.model, OPTIMIZER), lr=OPTIMIZER.lr)
        create_state(self.optimizer, [(p, self.optimizer.param_groups[0]) for p in self.model.parameters()])

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def step(self, lr: float) -> StepResult:
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.optimizer_steps += 1
        return StepResult(0.0, True)

    def fragments(self) -> list[Fragment]:
        return [
            Fragment(
                name, tuple(p.shape), 0, p.detach().view(-1), s["exp_avg"].view(-1), s["exp_avg_sq"].view(-1), True
            )
            for name, p in self.model.named_parameters()
            for s in [self.optimizer.state[p]]
        ]

    def replicas(self) -> Replicas:
        return Replicas({})

    def set_optimizer_steps(self, steps: int) -> None:
        self.optimizer_steps = steps
        set_step(self.optimizer, steps)

    def after_load(self) -> None:
        pass

    def describe(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


def started(model: nn.Module | None = None) -> tuple[WholeEngine, EMA]:
    engine = WholeEngine(model)
    return engine, EMA(engine.fragments(), EMAConfig(decay=0.5))


def advance(engine: WholeEngine, ema: EMA, step: int) -> None:
    x, y = batch(step)
    engine.backward((engine.model(x) - y).square().mean(), True)
    engine.step(1e-2)
    ema.update(step)


def state_of(engine: WholeEngine, ema: EMA) -> list[Tensor]:
    parts = [t for f in engine.fragments() for t in (f.param, f.exp_avg, f.exp_avg_sq)]
    return [t.clone() for t in (*parts, *ema.tensors)]


def manager(root: Path, **options: Any) -> CheckpointManager:
    return CheckpointManager(root, CheckpointConfig(**{"every": 1, "background": False, **options}))


def saved(root: Path, steps: int = 1, **options: Any) -> tuple[CheckpointManager, WholeEngine, EMA]:
    checkpoints = manager(root, **options)
    engine, ema = started()
    for step in range(steps):
        advance(engine, ema, step)
        checkpoints.save(step + 1, engine, ema, {"recipe_digest": "abc", "position": {"epoch": 1}})
    checkpoints.wait()
    return checkpoints, engine, ema


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
