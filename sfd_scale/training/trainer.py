"""The training loop: run and step. Knows no engine, no file format, no metric, no model."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from sfd_scale.checkpoint import CheckpointManager
from sfd_scale.data.dataloader import Ranges
from sfd_scale.data.waiting import STOP_WAIT_S, DataWaitStopped, PatientBatches
from sfd_scale.data.workers import explained_deaths
from sfd_scale.engines.ema import EMA
from sfd_scale.engines.engine import Engine, StepResult
from sfd_scale.engines.replica_check import check_replicas_agree
from sfd_scale.runtime import distributed
from sfd_scale.runtime.garbage import ScheduledCollection
from sfd_scale.runtime.heartbeat import CollectiveError, Heartbeat, Operation
from sfd_scale.runtime.progress import progress
from sfd_scale.runtime.settings import NoEffectOnResults, at_least, wait_s
from sfd_scale.runtime.signals import REQUEUE_EXIT_CODE, StopRequest
from sfd_scale.training.divergence import DivergenceError, DivergenceWatch
from sfd_scale.training.metrics import TrainingMetrics
from sfd_scale.training.metrics_writer import MetricsWriter
from sfd_scale.training.objective import Objective

logger = logging.getLogger(__name__)
READ_AHEAD = 4  # micro-batches
MAX_BATCH = 1_000_000_000  # the planner tries all divisors


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How long and in what portions a run trains. `global_batch` is fixed; the rest follows from the world size."""

    steps: int
    global_batch: int
    micro_batch: int | None = None  # samples a rank takes at once; None: its whole share of the global batch
    log_every: NoEffectOnResults[int] = 10
    max_duration_s: NoEffectOnResults[float | None] = None  # a clean end before a queue's limit
    timeout_s: NoEffectOnResults[float] = 600.0  # of a collective
    replica_check_every: NoEffectOnResults[int | None] = None  # steps between comparisons of what ranks hold copies of

    def __post_init__(self) -> None:
        if self.global_batch > MAX_BATCH:
            raise ValueError(f"global_batch: {self.global_batch}; allowed: 1 to {MAX_BATCH:,}")
        at_least(self, steps=1, global_batch=1, log_every=1, micro_batch=1, replica_check_every=1, max_duration_s=0)
        wait_s(self, timeout_s=1)


class Batch(Protocol):
    @property
    def keys(self) -> Tensor: ...
    def to(self, device: torch.device) -> Any: ...
    def __len__(self) -> int: ...


@dataclass(kw_only=True, eq=False)
class Trainer:
    """Trains until `config.steps`, resuming from the newest checkpoint; saves when due, at a signal and at the end.

    Args:
        snapshots: saves the power-function averages, if there are any.
        batches: endless micro-batches of this rank from a first step on, `grad_accum_steps` per step. It leaves out
            the data of the steps in its second argument.
        learning_rate: a pure function of the step.
        state: recorded in every checkpoint beside the step; `check_state` refuses the state of another run.
        before_step: called before every step.
    """

    config: TrainerConfig
    engine: Engine
    objective: Objective
    batches: Callable[[int, Ranges], Iterator[Batch]]
    grad_accum_steps: int
    learning_rate: Callable[[int], float]
    ema: EMA
    checkpoints: CheckpointManager
    watch: DivergenceWatch
    metrics: TrainingMetrics
    writer: MetricsWriter
    state: Mapping[str, Any]
    check_state: Callable[[Mapping[str, Any]], None]
    before_step: Callable[[int], None]
    snapshots: CheckpointManager | None = None
    heartbeat: Heartbeat = field(init=False)

    def __post_init__(self) -> None:
        self.heartbeat = Heartbeat(self.config.timeout_s)

    def run(self) -> bool:
        """Train to the end (True) or to an agreed stop (False), which may come with the last step; either way that is
        saved."""
        step = self.resume()
        asked = StopRequest(self.config.max_duration_s)
        saved, stopped, batches = step, False, self.batches_from(step, asked)
        with (
            asked as stop, progress(self.config.steps, "train", "steps") as bar, excused(asked), self.heartbeat,
            explained_deaths(), ScheduledCollection() as garbage,
        ):  # fmt: skip
            bar.skip(step)
            self.metrics.reset()
            while step < self.config.steps and not stopped:
                self.before_step(step)
                try:
                    result = self.train_step(step, batches)
                except DataWaitStopped:
                    self.meet_without_data(step)
                    stopped = True
                    break
                garbage.after_step()
                if self.watch.judge(step, result) == "rollback":
                    bar.advance(-step)
                    step = self.roll_back(step)
                    saved, batches = step, self.batches_from(step, asked)
                    bar.advance(step)
                    continue
                step += 1
                if self.config.replica_check_every and step % self.config.replica_check_every == 0:
                    check_replicas_agree(self.engine.replicas(), step)
                self.heartbeat.enter(step, Operation.AGREEMENT)
                stopped, overdue = distributed.any_rank(stop.requested(), self.checkpoints.overdue())
                if step % self.config.log_every == 0 or step == self.config.steps:
                    bar.advance(0, self.log(step))
                bar.advance(1)
                if self.checkpoints.due(step) or overdue or stopped:
                    self.save(step)
                    saved = step
                self.save_snapshot(step)
            if saved != step:
                self.save(step)
            self.finish_saves()
            if stopped and step < self.config.steps:
                logger.info("stopped on request after step %d, which is saved; the same command resumes", step)
            stop.saved = stopped
        return not stopped

    def batches_from(self, step: int, stop: StopRequest) -> PatientBatches[Batch]:
        """The micro-batches from a step on. A thread reads them ahead and makes the random draws of the objective.

        A wait ends after `train.timeout_s`, and soon after a stop request."""
        advice = "check the storage of data.path, or raise train.timeout_s"
        batches = map(self.objective.prepare, self.batches(step, self.watch.passed))
        return PatientBatches(
            batches, ahead=READ_AHEAD, limit_s=self.config.timeout_s, advice=advice, stop=stop.requested
        )

    def meet_without_data(self, step: int) -> None:
        """After a stop request during a wait for data: return if all ranks wait too, so that they can save together.

        Raises:
            SystemExit: with the requeue code, if other ranks are in the middle of the step.
        """
        self.finish_saves()
        if not self.heartbeat.all_arrive(f"no data/{step}", STOP_WAIT_S):
            logger.warning(
                "a stop was requested in the wait for data of step %d, which other ranks have; nothing more is saved, "
                "and the same command resumes from the last checkpoint", step,
            )  # fmt: skip
            raise SystemExit(REQUEUE_EXIT_CODE)
        logger.warning("a stop was requested in the wait for data; step %d is saved without more data", step)

    def train_step(self, step: int, batches: PatientBatches[Batch]) -> StepResult:
        """One optimizer step: accumulate the gradient of the loss over the global batch, step, average."""
        for micro in range(self.grad_accum_steps):
            self.heartbeat.enter(step, Operation.DATA)
            before = batches.waited_s
            batch = next(batches).to(self.engine.device)
            self.heartbeat.enter(step, Operation.FORWARD_BACKWARD)
            losses, last = self.objective(self.engine.model, batch), micro == self.grad_accum_steps - 1
            loss = self.watch.guarded(losses, batch.keys, last)
            self.engine.backward(loss / self.grad_accum_steps, last)
            self.metrics.add(losses, len(batch), batches.waited_s - before)
        self.heartbeat.enter(step, Operation.OPTIMIZER)
        result = self.engine.step(self.learning_rate(step))
        self.metrics.step(result.grad_norm)
        if result.applied:
            self.ema.update(step)
        return result

    def roll_back(self, step: int) -> int:
        """Go back to the last checkpoint before the trouble; those after it are set aside."""
        self.heartbeat.enter(step, Operation.ROLLBACK)
        found = (self.checkpoints.latest(before) for before in self.watch.targets(step))
        to = next((checkpoint for checkpoint in found if checkpoint is not None), None)
        if to is None:
            raise DivergenceError(
                f"step {step + 1}: divergence.rollback found no whole checkpoint from before; lower optimizer.lr, or "
                "set engine.grad_clip"
            )
        state = self.checkpoints.load(to, self.engine, self.ema)
        self.watch.rolled_back(step, int(state["step"]), state.get("divergence", {}))
        self.checkpoints.set_aside(after=int(state["step"]))
        if self.snapshots is not None:
            self.snapshots.set_aside(after=int(state["step"]))
        self.writer.truncate(int(state["step"]))
        self.metrics.reset()
        self.metrics.clock_losses = state.get("loss_by_clock")
        return int(state["step"])

    def log(self, step: int) -> dict[str, float]:
        """Write one line of metrics; returns what the progress bar shows."""
        self.heartbeat.enter(step, Operation.METRICS)
        values = self.metrics.reduce(self.ema.squares())
        values |= {
            "samples": step * self.config.global_batch, "lr": self.learning_rate(step - 1),
            **self.watch.counts(), **self.checkpoints.timings(),
        }  # fmt: skip
        self.writer.write(step, values)
        shown = {"loss": values["loss"], "samples/s": values["samples_per_s"]}
        return {name: math.nan if value is None else value for name, value in shown.items()}

    def save(self, step: int) -> None:
        self.heartbeat.enter(step, Operation.CHECKPOINT)
        state = {
            **self.state,
            "step": step,
            "divergence": self.watch.state(),
            "wandb_id": self.writer.wandb_id,
            "loss_by_clock": self.metrics.clock_losses,
        }
        self.checkpoints.save(step, self.engine, self.ema, state)

    def save_snapshot(self, step: int) -> None:
        if self.snapshots is not None and self.snapshots.due(step):
            self.heartbeat.enter(step, Operation.CHECKPOINT)
            self.snapshots.save(step, self.engine, self.ema, self.state)

    def finish_saves(self) -> None:
        self.checkpoints.wait()
        if self.snapshots is not None:
            self.snapshots.wait()

    def resume(self) -> int:
        """Load the newest whole checkpoint, if there is one; returns the step to go on from."""
        latest = self.checkpoints.latest()
        for manager in filter(None, (self.checkpoints, self.snapshots)):
            manager.remove_leftovers()
        self.checkpoints.check_space(self.engine, self.ema)
        if latest is None:
            self.writer.truncate(0)  # what a start that ended before its first checkpoint has written
            if self.watch.config.rolls_back:
                self.save(0)  # something to go back to
            return 0
        self.check_state(latest.state)
        state = self.checkpoints.load(latest, self.engine, self.ema)
        self.watch.load(state.get("divergence", {}))
        self.metrics.clock_losses = state.get("loss_by_clock")
        self.writer.truncate(int(state["step"]))
        logger.info("resumed from %s", latest.path)
        return int(state["step"])


@contextmanager
def excused(stop: StopRequest) -> Iterator[None]:
    """After a stop request, a collective that another rank has left is no failure.

    Raises:
        SystemExit: with the requeue code.
    """
    try:
        yield
    except CollectiveError as error:
        if not stop.requested():
            raise
        logger.warning("%s; a stop was requested: the same command resumes from the last checkpoint", error)
        raise SystemExit(REQUEUE_EXIT_CODE) from error
