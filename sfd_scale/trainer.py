"""The training loop: run and step. Knows no engine, no file format, no metric, no model."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from sfd_scale import distributed
from sfd_scale.checkpoint import CheckpointManager
from sfd_scale.ema import EMA
from sfd_scale.engines.engine import Engine, StepResult
from sfd_scale.logs import MetricsWriter, progress
from sfd_scale.meter import Meter
from sfd_scale.objective import Objective
from sfd_scale.signals import StopRequest
from sfd_scale.watchdog import Watchdog

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How long and in what portions a run trains. `global_batch` is fixed; the rest follows from the world size."""

    steps: int
    global_batch: int
    micro_batch: int | None = None  # samples a rank takes at once; None: its whole share of the global batch
    log_every: int = 10
    max_skipped_steps: int = 20  # steps in a row whose gradient was not finite, before the run stops
    max_duration_s: float | None = None  # a clean end before a queue's limit
    timeout_s: float = 600.0  # of a collective

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch", "log_every", "max_skipped_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; allowed: 1 and up")


class Batch(Protocol):
    def to(self, device: torch.device) -> Any: ...
    def __len__(self) -> int: ...


class Trainer:
    """Trains until `config.steps`, resuming from the newest checkpoint; saves when due, at a signal and at the end.

    Args:
        snapshots: where the power-function averages are saved, if there are any.
        batches: from a first step, endless micro-batches of this rank, `accumulation` a step.
        learning_rate: a pure function of the step.
        state: what every checkpoint records beside the step; `check_state` refuses one of another run.
        before_step: told that a step begins.
    """

    def __init__(
        self, *, config: TrainerConfig, engine: Engine, objective: Objective, batches: Callable[[int], Iterator[Batch]],
        accumulation: int, learning_rate: Callable[[int], float], ema: EMA, checkpoints: CheckpointManager,
        meter: Meter, metrics: MetricsWriter, state: Mapping[str, Any],
        check_state: Callable[[Mapping[str, Any]], None], before_step: Callable[[int], None],
        snapshots: CheckpointManager | None = None,
    ) -> None:  # fmt: skip
        self.config, self.engine, self.objective, self.batches = config, engine, objective, batches
        self.accumulation, self.learning_rate, self.ema = accumulation, learning_rate, ema
        self.checkpoints, self.snapshots, self.meter, self.metrics = checkpoints, snapshots, meter, metrics
        self.state, self.check_state, self.before_step = state, check_state, before_step
        self.watchdog = Watchdog(config.timeout_s)
        self.skipped, self.skipped_in_row = 0, 0

    def run(self) -> bool:
        """Train to the end (True) or to an agreed stop (False); either way the last step is saved."""
        step, stop = self.resume(), StopRequest(self.config.max_duration_s)
        saved, stopped, batches = step, False, self.batches(step)
        with progress(self.config.steps, "train", "steps") as bar, self.watchdog:
            bar.skip(step)
            self.meter.reset()
            while step < self.config.steps and not stopped:
                self.before_step(step)
                result = self.train_step(step, batches)
                step += 1
                self.count_skips(step, result)
                self.watchdog.enter(step, "agreement")
                stopped, overdue = distributed.any_rank(stop.requested(), self.checkpoints.overdue())
                if step % self.config.log_every == 0 or step == self.config.steps:
                    bar.advance(0, **self.log(step))
                bar.advance(1)
                if self.checkpoints.due(step) or overdue or stopped:
                    self.save(step)
                    saved = step
                self.save_snapshot(step)
            if saved != step:
                self.save(step)
            self.finish_saves()
        stop.close(stopped)
        return step >= self.config.steps

    def train_step(self, step: int, batches: Iterator[Batch]) -> StepResult:
        """One optimizer step: accumulate the gradient of the loss over the global batch, step, average."""
        for micro in range(self.accumulation):
            self.watchdog.enter(step, "waiting for data")
            waited = time.monotonic()
            batch = next(batches).to(self.engine.device)
            waited = time.monotonic() - waited
            self.watchdog.enter(step, "forward and backward")
            losses = self.objective(self.engine.model, batch)
            self.engine.backward(losses.total / self.accumulation, last=micro == self.accumulation - 1)
            self.meter.add(losses, len(batch), waited)
        self.watchdog.enter(step, "optimizer step")
        result = self.engine.step(self.learning_rate(step))
        self.meter.step(result.grad_norm)
        if result.applied:
            self.ema.update(step)
        return result

    def count_skips(self, step: int, result: StepResult) -> None:
        self.skipped_in_row = 0 if result.applied else self.skipped_in_row + 1
        self.skipped += not result.applied
        if not result.applied:
            logger.warning("step %d skipped: its gradient is not finite (%d skipped so far)", step, self.skipped)
        if self.skipped_in_row >= self.config.max_skipped_steps:
            raise FloatingPointError(
                f"{self.skipped_in_row} steps in a row had a gradient that is not finite, up to step {step}; lower the "
                "learning rate, set engine.grad_clip, or resume from an earlier checkpoint"
            )

    def log(self, step: int) -> dict[str, float]:
        """Write one line of metrics; returns what the progress bar shows."""
        self.watchdog.enter(step, "metrics")
        values = self.meter.read(self.ema.squares())
        values |= {
            "samples": step * self.config.global_batch, "lr": self.learning_rate(step - 1),
            "skipped_steps": self.skipped, **self.checkpoints.timings(),
        }  # fmt: skip
        self.metrics.write(step, values)
        return {"loss": values["loss"] or 0.0, "samples/s": values["samples_per_s"] or 0.0}

    def save(self, step: int) -> None:
        self.watchdog.enter(step, "checkpoint")
        state = {**self.state, "step": step, "skipped": self.skipped, "wandb_id": self.metrics.wandb_id}
        self.checkpoints.save(step, self.engine, self.ema, state)

    def save_snapshot(self, step: int) -> None:
        if self.snapshots is not None and self.snapshots.due(step):
            self.watchdog.enter(step, "checkpoint")
            self.snapshots.save(step, self.engine, self.ema, self.state)

    def finish_saves(self) -> None:
        self.checkpoints.wait()
        if self.snapshots is not None:
            self.snapshots.wait()

    def resume(self) -> int:
        """Load the newest whole checkpoint, if there is one; returns the step to go on from."""
        latest = self.checkpoints.latest()
        self.checkpoints.check_space(self.engine, self.ema)
        if latest is None:
            return 0
        self.check_state(self.checkpoints.read_state(latest))
        state = self.checkpoints.load(latest, self.engine, self.ema)
        self.skipped = int(state["skipped"])
        self.metrics.truncate(int(state["step"]))
        logger.info("resumed from %s", latest)
        return int(state["step"])
