"""A small model with awkward shapes, its data, and a training loop for any engine, for tests on several ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sfd_scale.engines.deepspeed import DeepSpeedConfig, make_deepspeed
from sfd_scale.engines.ema import EMA, EMAConfig
from sfd_scale.engines.engine import Engine, Fragment
from sfd_scale.engines.fsdp import FSDPConfig, make_fsdp
from sfd_scale.engines.muon import MuonConfig
from sfd_scale.engines.optim import AdamWConfig, param_groups
from sfd_scale.models.layers import FusedMatrix
from sfd_scale.runtime import distributed

OPTIMIZER = AdamWConfig(lr=2e-3, betas=(0.9, 0.99), weight_decay=0.02)
CLIP = 0.4
BATCH = 16
DECAY = 0.9


class TinyBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.gate = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * self.down(nn.functional.silu(self.up(x)))


class TinyModel(nn.Module):
    """Width 37: 2 or 4 ranks divide no parameter evenly. bf16 cannot represent the buffer."""

    def __init__(self, width: int = 37, seed: int = 0) -> None:
        super().__init__()
        self.head = nn.Conv2d(2, width, (2, 2))
        self.blocks = nn.ModuleList(TinyBlock(width) for _ in range(3))
        self.tail = nn.Linear(width, 8)
        self.register_buffer("position", torch.linspace(0, 1, width) / 3)
        self.position: Tensor
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(torch.randn(param.shape, generator=generator) / math.sqrt(max(param[0].numel(), 16)))

    def hidden_matrices(self) -> dict[str, FusedMatrix]:
        """`up` as three matrices, of which Muon can make more by its heads of one row."""
        up = {f"blocks.{index}.up.weight": FusedMatrix(3, self.tail.in_features) for index in range(3)}
        return up | {f"blocks.{index}.down.weight": FusedMatrix() for index in range(3)}

    def forward(self, x: Tensor) -> Tensor:
        """(N, 8) → (N, 8)."""
        hidden = self.head(x.view(-1, 2, 2, 2).to(self.head.weight.dtype)).flatten(1)
        hidden = hidden + self.position.to(hidden.dtype)
        for block in self.blocks:
            hidden = block(hidden)
        return self.tail(hidden).float()


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The global batch of a step: inputs and targets (BATCH, 8)."""
    x = torch.randn(BATCH, 8, generator=torch.Generator().manual_seed(step))
    return x, torch.sin(3 * x)


@dataclass(frozen=True)
class Spec:
    """One engine: `kind` and its settings."""

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    grad_accum_steps: int = 1


def make_engine(spec: Spec, model: nn.Module | None = None, optimizer: AdamWConfig | MuonConfig = OPTIMIZER) -> Engine:
    options = {"precision": "fp32", "grad_clip": CLIP, **spec.options}
    model = TinyModel() if model is None else model
    if spec.kind == "fsdp":
        return make_fsdp(model, optimizer, FSDPConfig(**options))
    return make_deepspeed(model, optimizer, DeepSpeedConfig(**options))


def train(
    engine: Engine, ema: EMA, steps: Sequence[int], grad_accum_steps: int = 1, nan_step: int | None = None
) -> dict[str, list[float]]:
    """A training loop: returns losses over the global batch, gradient norms, and whether steps were applied."""
    ranks, rank = distributed.world_size(), distributed.rank()
    out: dict[str, list[float]] = {"loss": [], "norm": [], "applied": []}
    for step in steps:
        x, y = (t.view(ranks, grad_accum_steps, -1, 8)[rank] for t in batch(step))
        total = torch.zeros(())
        for micro in range(grad_accum_steps):
            loss = (engine.model(x[micro]) - y[micro]).square().mean() / grad_accum_steps
            # NaN on the last rank only: all ranks must skip the step.
            bad = step == nan_step and rank == ranks - 1
            engine.backward(loss * math.nan if bad else loss, last=micro == grad_accum_steps - 1)
            total += loss.detach()
        result = engine.step(OPTIMIZER.lr)
        if result.applied:
            ema.update(step)
        out["loss"].append(distributed.all_reduce_mean(total).item())
        out["norm"].append(result.grad_norm)
        out["applied"].append(float(result.applied))
    return out


def plain(steps: int, nan_step: int | None = None, model: nn.Module | None = None) -> dict[str, Any]:
    """The same training in plain torch, in one process without engine. Every engine must reproduce it."""
    model = TinyModel() if model is None else model
    optimizer = torch.optim.AdamW(
        param_groups(model, OPTIMIZER), lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps
    )
    average = {name: param.detach().clone() for name, param in model.named_parameters()}
    losses, norms = [], []
    for step in range(steps):
        x, y = batch(step)
        loss = (model(x) - y).square().mean()
        loss.backward()
        losses.append(loss.item())
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        if step != nan_step:
            optimizer.step()
            for name, param in model.named_parameters():
                average[name] = DECAY * average[name] + (1 - DECAY) * param.detach()
        optimizer.zero_grad()
    params = {name: param.detach().clone() for name, param in model.named_parameters()}
    return {"loss": losses, "norm": norms, "params": params, "ema": average}


def whole(fragments: Sequence[Fragment], tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Gather full tensors by name from the fragments of all ranks."""
    local = [
        (f.name, f.shape, f.start, tensor.detach().cpu().clone())
        for f, tensor in zip(fragments, tensors, strict=True)
        if f.primary
    ]
    out: dict[str, Tensor] = {}
    for name, shape, start, tensor in (part for parts in distributed.all_gather_object(local) for part in parts):
        full = out.setdefault(name, torch.full((math.prod(shape),), math.nan).view(shape))
        full.view(-1)[start : start + tensor.numel()] = tensor
    return out


def make_ema(engine: Engine) -> EMA:
    return EMA(engine.fragments(), EMAConfig(decay=DECAY))


def params(engine: Engine) -> dict[str, Tensor]:
    return whole(engine.fragments(), [f.param for f in engine.fragments()])


def relative(a: Sequence[float], b: Sequence[float]) -> float:
    """Largest relative difference."""
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest absolute difference of tensors with the same names."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)
