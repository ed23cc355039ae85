"""Agreement of engines: one small SFD run with every engine, world size and gradient accumulation, and every engine's
checkpoint resumed by every other engine; with AdamW and with Muon.

It uses the real LightningDiT and objective. Random numbers are keyed by sample, so that they are the same for every
split of the global batch. `reference` is the same run in plain torch; tests and docs/engines.md compare with it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfd_scale.checkpoint import CheckpointConfig, CheckpointManager
from sfd_scale.data.batches import LatentBatch
from sfd_scale.diffusion.latents import LatentLayout
from sfd_scale.diffusion.schedule import SemanticFirstSchedule
from sfd_scale.engines.ema import EMA, EMAConfig
from sfd_scale.engines.engine import Engine
from sfd_scale.engines.muon import MuonConfig
from sfd_scale.engines.optim import AdamWConfig, ScheduleConfig, learning_rate, param_groups
from sfd_scale.models.alignment import AlignmentConfig
from sfd_scale.models.lightningdit import LightningDiT, LightningDiTConfig
from sfd_scale.runtime import distributed, seeding
from sfd_scale.runtime.matmul import bf16_matmul_on_cpu
from sfd_scale.training.semantic_first import SemanticFirstConfig, SemanticFirstObjective
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import Spec, distance, make_engine, relative, whole

STEPS, SAVED, AFTER = 50, 25, 5  # steps of a loss curve; step of the checkpoint; steps after resuming
BATCH = 16
CLIP = 1.0
WORLDS, ACCUMULATIONS = (1, 2, 4), (1, 2, 4)
BOUNDS = {"fp32": 1e-6, "bf16": 2e-3}
LAYOUT = LatentLayout(texture_channels=6, semantic_channels=4, size=4)
SCHEDULE = SemanticFirstSchedule(delta_t=0.3)
MODEL = LightningDiTConfig(
    depth=2, width=48, heads=3, num_classes=5, alignment=AlignmentConfig(depth=1, hidden=24, dim=10)
)
OPTIMIZER = AdamWConfig(lr=1e-3, weight_decay=0.01)
MUON = MuonConfig(lr=1e-3, weight_decay=0.01, adamw=AdamWConfig(lr=2e-3))
OPTIMIZERS: dict[str, AdamWConfig | MuonConfig] = {"adamw": OPTIMIZER, "muon": MUON}
# Into how many matrices Muon cuts a weight, by the end of its name.
MATRICES = {"qkv": 3, "attn.proj": 1, "w12": 2, "w3": 1, "adaLN_modulation.1": 6, "repa_projector.2": 1}
RATE = ScheduleConfig(kind="cosine", warmup_steps=5, final=0.1)
AVERAGES = EMAConfig(decay=0.95, lengths=(0.05, 0.1), snapshot_every=25)

# Engines whose checkpoints are resumed; the others only train.
RESUMED = ("ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2", "HSDP")
ENGINES = (*RESUMED, "ZeRO-0", "replicate")


def spec(engine: str, precision: str, world: int, grad_accum_steps: int = 1) -> Spec:
    shared = {"precision": precision, "grad_clip": CLIP}
    if engine.startswith("ZeRO"):
        stage = {"zero_stage": int(engine[-1])}
        # Most parameters are larger and are sharded between uses; smaller ones stay whole.
        small = {"persistent_elements": 100} if engine == "ZeRO-3" else {}
        return Spec("deepspeed", {**shared, **stage, **small}, grad_accum_steps)
    sharding: dict[str, dict[str, Any]] = {
        "FSDP2": {}, "HSDP": {"sharding": "hybrid", "shard_size": max(world // 2, 1)},
        "replicate": {"sharding": "replicate"},
    }  # fmt: skip
    return Spec("fsdp", {**shared, **sharding[engine]}, grad_accum_steps)


def make_model(seed: int = 0) -> LightningDiT:
    model = LightningDiT(MODEL, in_channels=LAYOUT.channels, input_size=LAYOUT.size, two_clocks=True)
    model.init_weights(seed)
    return model


def objective() -> SemanticFirstObjective:
    return SemanticFirstObjective(SemanticFirstConfig(), LAYOUT, SCHEDULE, MODEL.conditioning, seed=0)


@functools.cache
def batch(step: int) -> LatentBatch:
    """The global batch of a step: samples step · BATCH to (step + 1) · BATCH − 1."""
    ids = [(0, step * BATCH + i) for i in range(BATCH)]
    labels = torch.tensor([i % MODEL.num_classes for _, i in ids])
    latents = seeding.normal(1, "latents", ids, LAYOUT.shape).mul_(0.7)
    features = seeding.normal(1, "features", ids, (10, LAYOUT.size, LAYOUT.size))
    return LatentBatch(latents, labels, torch.tensor(ids), features)


def rate(step: int) -> float:
    return learning_rate(OPTIMIZER.lr, RATE, step, STEPS)


def reference(steps: int = STEPS, optimizer: str = "adamw") -> list[float]:
    """Losses of the run in plain torch: one process, fp32, without engine."""
    model, loss_of = make_model(), objective()
    matrices = _matrices(model) if optimizer == "muon" else {}
    settings = MUON.adamw if optimizer == "muon" else OPTIMIZER
    groups = param_groups(model, settings, lambda name: name not in matrices)
    adamw = torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps)
    momenta = {name: torch.zeros_like(param) for name, (param, _) in matrices.items()}
    losses = []
    for step in range(steps):
        loss = loss_of(model, batch(step)).total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in adamw.param_groups:
            group["lr"] = rate(step) * settings.lr / OPTIMIZER.lr
        adamw.step()
        for name, (param, parts) in matrices.items():
            momenta[name] = _muon(param, momenta[name], parts, rate(step))
        model.zero_grad()
        losses.append(loss.item())
    return losses


def _matrices(model: LightningDiT) -> dict[str, tuple[torch.nn.Parameter, int]]:
    found = {}
    for name, param in model.named_parameters():
        parts = [n for end, n in MATRICES.items() if name.endswith(f"{end}.weight") and "final_layer" not in name]
        if parts:
            found[name] = param, parts[0]
    return found


@torch.no_grad()
def _muon(param: Tensor, momentum: Tensor, parts: int, lr: float) -> Tensor:
    """The published update of one weight, written out; returns the new momentum."""
    assert param.grad is not None
    momentum = 0.95 * momentum + 0.05 * param.grad
    nesterov = 0.05 * param.grad + 0.95 * momentum
    param.mul_(1 - lr * MUON.weight_decay)
    for own, update in zip(param.chunk(parts), nesterov.chunk(parts), strict=True):
        x = update.T if len(update) > len(update.T) else update
        x = x / (x.norm() + 1e-7)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        x = x.T if len(update) > len(update.T) else x
        own.sub_(lr * 0.2 * math.sqrt(max(x.shape)) * x)
    return momentum


def train(engine: Engine, ema: EMA, steps: Sequence[int], grad_accum_steps: int) -> list[float]:
    """Train on this rank's part of the global batch; returns the losses over the global batch."""
    ranks, rank, loss_of = distributed.world_size(), distributed.rank(), objective()
    size = BATCH // ranks // grad_accum_steps
    losses = []
    for step in steps:
        whole_batch, total = batch(step), torch.zeros(())
        for micro in range(grad_accum_steps):
            start = (micro * ranks + rank) * size
            loss = loss_of(engine.model, whole_batch.slice(start, start + size)).total / grad_accum_steps
            engine.backward(loss, last=micro == grad_accum_steps - 1)
            total += loss.detach()
        if engine.step(rate(step)).applied:
            ema.update(step)
        losses.append(distributed.all_reduce_mean(total).item())
    return losses


def opened(spec: Spec, optimizer: str, seed: int = 0) -> tuple[Engine, EMA]:
    engine = make_engine(spec, make_model(seed), OPTIMIZERS[optimizer])
    return engine, EMA(engine.fragments(), AVERAGES)


def state(engine: Engine, ema: EMA) -> dict[str, torch.Tensor]:
    parts = {"model": [f.param for f in engine.fragments()], **ema.averages}
    return {f"{part}.{n}": t for part, ts in parts.items() for n, t in whole(engine.fragments(), ts).items()}


@dataclass(frozen=True)
class Cell:
    """A run from the start. With `by`: AFTER steps from the checkpoint that engine `by` saved on `at` ranks."""

    engine: str
    world: int
    precision: str = "fp32"
    grad_accum_steps: int = 1
    by: str = ""
    at: int = 0
    optimizer: str = "adamw"

    @property
    def saves(self) -> bool:
        return self.engine in RESUMED and self.precision == "fp32" and self.grad_accum_steps == 1 and not self.by

    @property
    def start(self) -> Cell:
        """The run whose checkpoint this one resumes."""
        return Cell(self.by, self.at, optimizer=self.optimizer)


def run_cells(root: str, cells: list[Cell], steps: int = STEPS) -> None:
    """Train each cell, on every rank. Rank 0 appends one line per cell to cells.jsonl: the cell and its losses.

    The line of a resumed run has its largest difference from the saved run too, over weights and averages.
    """
    logging.disable(logging.INFO)
    for cell in cells:
        row = dataclasses.asdict(cell) | (resume(root, cell) if cell.by else curve(root, cell, steps))
        if distributed.is_main():
            with Path(root, "cells.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")


def curve(root: str, cell: Cell, steps: int) -> dict[str, Any]:
    """Train from the start. A cell that `saves` writes a checkpoint in the background at step SAVED."""
    engine, ema = opened(spec(cell.engine, cell.precision, cell.world, cell.grad_accum_steps), cell.optimizer)
    checkpoints = CheckpointManager(folder(root, cell), CheckpointConfig())
    losses: list[float] = []
    with bf16_matmul_on_cpu(engine.device):
        for stop in sorted({min(SAVED, steps), min(SAVED + AFTER, steps), steps}):
            losses += train(engine, ema, range(len(losses), stop), cell.grad_accum_steps)
            if cell.saves and stop == SAVED:
                checkpoints.save(SAVED, engine, ema, {"by": cell.engine})
            if cell.saves and stop == SAVED + AFTER:
                after = state(engine, ema)
                if distributed.is_main():
                    torch.save(after, folder(root, cell) / "after.pt")
    checkpoints.wait()
    engine.close()
    return {"loss": losses}


def resume(root: str, cell: Cell) -> dict[str, Any]:
    """Load a checkpoint into a new engine with other initial weights, and train on."""
    engine, ema = opened(spec(cell.engine, cell.precision, cell.world), cell.optimizer, seed=9)
    saved = folder(root, cell.start)
    checkpoints = CheckpointManager(saved, CheckpointConfig())
    latest = checkpoints.latest()
    assert latest is not None
    assert checkpoints.load(latest, engine, ema)["by"] == cell.by
    losses = train(engine, ema, range(SAVED, SAVED + AFTER), 1)
    difference = distance(state(engine, ema), torch.load(saved / "after.pt", weights_only=True))
    engine.close()
    return {"loss": losses, "distance": difference}


def folder(root: str, cell: Cell) -> Path:
    path = Path(root, f"{cell.optimizer}-{cell.engine}-at-{cell.world}")
    path.mkdir(parents=True, exist_ok=True)
    return path


def matrix(optimizer: str = "adamw") -> list[list[Cell]]:
    """All cells, in lists of one world size each. Cells that save come before cells that resume.

    Muon has curves in fp32 without accumulation: what precedes the optimizer is the same as with AdamW.
    """
    precisions, accumulations = (BOUNDS, ACCUMULATIONS) if optimizer == "adamw" else (("fp32",), (1,))
    of_world = {
        world: [
            Cell(engine, world, precision, grad_accum_steps, optimizer=optimizer)
            for precision in precisions
            for engine in ENGINES
            for grad_accum_steps in accumulations
            if (engine, precision) != ("ZeRO-0", "bf16")
        ]
        for world in WORLDS
    }
    first = [[cell for cell in of_world[world] if cell.saves] for world in WORLDS]
    pairs = [(by, at, to) for at in WORLDS for by in RESUMED for to in RESUMED]
    then = [[Cell(to, world, by=by, at=at, optimizer=optimizer) for by, at, to in pairs] for world in WORLDS]
    return first + then + [[cell for cell in of_world[world] if not cell.saves] for world in WORLDS]


def measure(root: str, groups: list[list[Cell]], report: Callable[[str], None] = lambda text: None) -> None:
    """Run the cells that cells.jsonl in `root` does not have yet."""
    for group in groups:
        done = read(root)
        left = [cell for cell in group if cell not in done]
        if left:
            run_ranks(run_cells, group[0].world, root, left, timeout=7200)
            report(f"{len(left)} cells at {group[0].world} ranks")


def read(root: str) -> dict[Cell, dict[str, Any]]:
    """The finished cells: {"loss"}, and for resumed runs "distance"."""
    path = Path(root, "cells.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    names = [field.name for field in dataclasses.fields(Cell)]
    return {Cell(**{name: row[name] for name in names if name in row}): row for row in rows}


def errors(found: dict[Cell, dict[str, Any]], plain: dict[str, list[float]]) -> dict[Cell, float]:
    """Largest relative difference of the losses. Resumed runs are compared with the saved run, others with plain
    torch in fp32.

    Args:
        plain: losses of `reference`, by optimizer.
    """
    out = {}
    for cell, row in found.items():
        expected = found[cell.start]["loss"][SAVED : SAVED + AFTER] if cell.by else plain[cell.optimizer]
        out[cell] = relative(row["loss"], expected[: len(row["loss"])])
    return out


def broken(found: dict[Cell, dict[str, Any]], plain: dict[str, list[float]]) -> list[str]:
    """Violations: losses beyond their bound, and runs that resume with the same engine but not bit for bit."""
    wrong = [f"{cell}: {e:.1e}" for cell, e in errors(found, plain).items() if not e <= BOUNDS[cell.precision]]
    same = [cell for cell in found if (cell.by, cell.at) == (cell.engine, cell.world)]
    return wrong + [f"{cell}: not bit for bit" for cell in same if found[cell]["distance"] > 0]
