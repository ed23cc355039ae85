"""Divergence: detect and record a loss spike, or a loss or gradient that is not finite, and stop, skip or roll back.

The device checks the loss of the global batch before the backward pass of the last micro-batch. If the loss is not
finite or too high, it multiplies that micro-batch's loss by NaN. Then the gradient norm is not finite, and the engine
skips the step on all ranks. So the host does not wait for the device.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sfd_scale.data.dataloader import Ranges, data_step
from sfd_scale.engines.engine import StepResult
from sfd_scale.runtime import distributed
from sfd_scale.runtime.device import HostCopy
from sfd_scale.runtime.run_paths import RunPaths
from sfd_scale.runtime.settings import at_least
from sfd_scale.training.objective import LossTerms

logger = logging.getLogger(__name__)

Policy = Literal["stop", "skip", "rollback"]
Reason = Literal["loss not finite", "gradient not finite", "loss spike"]
_MOST_BYTES = 64 << 20  # of the record; after that, only the log continues
_NAMED = 8  # sample ids per log line; the record has all
_NORMAL = 1.4826  # median absolute deviation → standard deviation of a normal distribution


class DivergenceError(FloatingPointError):
    """Stops the run, by the policy or after too many bad steps or rollbacks; the message names step and samples."""


@dataclass(frozen=True, kw_only=True)
class DivergenceConfig:
    """The policy for bad steps.

    not_finite: policy for a loss or gradient norm that is not finite. `stop` ends the run; its last checkpoint is from
        before the bad step. `skip` leaves weights and EMA unchanged and continues. `rollback` loads the last checkpoint
        and leaves out the data of the last `rollback_data` steps, up to the bad one. If the run is bad again at most
        `window` steps after that one, the next rollback loads the checkpoint before.
    spike: policy for a loss spike; `log` only logs it. A spike is more than `spike_z` robust standard deviations above
        the median of the last `window` losses. The robust standard deviation is the scaled median absolute deviation,
        and at least a thousandth of the median.
    max_in_row: skipped steps in a row after which the run stops.
    max_rollbacks: rollbacks after which the run stops.
    """

    not_finite: Policy = "skip"
    spike: Literal["log", "stop", "skip", "rollback"] = "log"
    spike_z: float = 20.0
    window: int = 128
    max_in_row: int = 20
    rollback_data: int = 100
    max_rollbacks: int = 10

    def __post_init__(self) -> None:
        at_least(self, window=1, max_in_row=1, rollback_data=1, max_rollbacks=1)
        if not self.spike_z > 0:
            raise ValueError(f"spike_z: {self.spike_z}; allowed: above 0")

    @property
    def rolls_back(self) -> bool:
        return "rollback" in (self.not_finite, self.spike)


def spike_limit(losses: Sequence[float], z: float) -> float:
    """The loss above which a step is a loss spike, from the losses before it."""
    centre = statistics.median(losses)
    deviation = _NORMAL * statistics.median(abs(loss - centre) for loss in losses)
    return centre + z * max(deviation, 1e-3 * abs(centre))


def merge_ranges(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Sort ranges and merge those that touch or overlap."""
    out: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(stop, out[-1][1]))
        else:
            out.append((start, stop))
    return tuple(out)


class DivergenceWatch:
    """Watches the losses of a run. `guarded` and `judge` are collectives: all ranks call them at the same step.

    Attributes:
        passed: data that rollbacks have left out. Every checkpoint stores it, so that a resumed run leaves it out too.
    """

    def __init__(self, config: DivergenceConfig, run: RunPaths) -> None:
        self.config, self.record = config, run.divergence_file
        self.passed: Ranges = ()
        self.skipped, self.spikes, self.rollbacks = 0, 0, 0
        self._in_row = 0
        self._losses: deque[float] = deque(maxlen=config.window)
        self._suspect: tuple[int, int] | None = None  # the last rollback: to which step, from which step
        self._limit = math.inf
        self._begin()

    def _begin(self) -> None:
        self._sum: Tensor | None = None
        self._parts: list[tuple[Tensor, Tensor | None]] = []
        self._loss: HostCopy | None = None

    # ------------------------------------------------------------------------------------------ detect

    def guarded(self, losses: LossTerms, keys: Tensor, last: bool) -> Tensor:
        """The loss for the backward pass: NaN in the last micro-batch of a step that the engine shall skip.

        Args:
            keys: (N, 2) epoch and sample id of each row of the micro-batch.
        """
        self._parts.append((keys, losses.per_sample))
        own = losses.total.detach().float()
        self._sum = own.clone() if self._sum is None else self._sum + own
        if not last:
            return losses.total
        mean = distributed.all_reduce_mean(self._sum / len(self._parts))
        self._limit = spike_limit(self._losses, self.config.spike_z) if self._full else math.inf
        allowed = math.inf if self.config.spike == "log" else self._limit
        self._loss = HostCopy(mean)  # has arrived once the engine has read the gradient norm
        return losses.total * torch.where(mean.isfinite() & (mean <= allowed), 1.0, math.nan)

    @property
    def _full(self) -> bool:
        return len(self._losses) == self.config.window

    # ------------------------------------------------------------------------------------------ decide

    def judge(self, step: int, result: StepResult) -> Literal["go on", "rollback"]:
        """Decide after step `step` (0, 1, …) whether to go on or to roll back.

        Raises:
            DivergenceError: if the policy is to stop, or too many steps in a row were skipped.
        """
        assert self._loss is not None
        loss, parts = self._loss.item(), self._parts
        reason, policy = self._reason(loss, result.applied)
        self._begin()
        self._in_row = 0 if result.applied else self._in_row + 1
        self.skipped += not result.applied
        if result.applied and math.isfinite(loss):
            self._losses.append(loss)
        if reason is None:
            return "go on"
        self.spikes += reason == "loss spike"
        text = self._write_down(step, reason, policy, loss, result, parts)
        if policy == "stop":
            key = "spike" if reason == "loss spike" else "not_finite"
            raise DivergenceError(
                f"{text}; the last checkpoint is from before it. Lower optimizer.lr or set engine.grad_clip; or set "
                f"divergence.{key} to skip or rollback, and start again"
            )
        if policy == "rollback":
            return "rollback"
        if self._in_row >= self.config.max_in_row:
            raise DivergenceError(
                f"{self._in_row} steps in a row were skipped (divergence.max_in_row); the last is {text}. Lower "
                "optimizer.lr, set engine.grad_clip, or resume from an earlier checkpoint"
            )
        return "go on"

    def _reason(self, loss: float, applied: bool) -> tuple[Reason | None, str]:
        if not math.isfinite(loss):
            return "loss not finite", self.config.not_finite
        if loss > self._limit:
            return "loss spike", self.config.spike
        return (None, "") if applied else ("gradient not finite", self.config.not_finite)

    def _write_down(
        self, step: int, reason: Reason, policy: str, loss: float, result: StepResult,
        parts: list[tuple[Tensor, Tensor | None]],
    ) -> str:  # fmt: skip
        """Log the event, and append it to the record with all samples of the global batch, worst first."""
        samples = _worst_first(parts)
        named = ", ".join(f"{sample} (epoch {epoch})" for epoch, sample, _ in samples[:_NAMED])
        more = f" and {len(samples) - _NAMED} more" if len(samples) > _NAMED else ""
        worst = " worst first" if samples and samples[0][2] is not None else ""
        text = f"step {step + 1}: {reason}, loss {loss:g} of samples{worst} {named}{more}"
        logger.warning("%s: %s", text, policy)
        if distributed.is_main() and (not self.record.exists() or self.record.stat().st_size < _MOST_BYTES):
            row = {
                "step": step + 1, "reason": reason, "policy": policy, "loss": _number(loss),
                "limit": _number(self._limit), "grad_norm": _number(result.grad_norm), "applied": result.applied,
                "data_step": data_step(step, self.passed),
                "samples": [{"epoch": e, "id": i, "loss": _number(v)} for e, i, v in samples],
            }  # fmt: skip
            with self.record.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        return text

    # --------------------------------------------------------------------------------------- roll back

    def targets(self, step: int) -> list[int]:
        """Bounds for the step of the checkpoint that a rollback from `step` loads, below the first if there is one."""
        if self._suspect is not None and step <= self._suspect[1] + self.config.window:
            return [self._suspect[0], step + 1]
        return [step + 1]

    def rolled_back(self, step: int, to: int, state: Mapping[str, Any]) -> None:
        """Note that the run is back at step `to`, by a checkpoint with `state`, and leave out data up to `step`.

        Raises:
            DivergenceError: after `max_rollbacks`.
        """
        self.rollbacks += 1
        if self.rollbacks > self.config.max_rollbacks:
            raise DivergenceError(
                f"step {step + 1}: the run still diverges after {self.config.max_rollbacks} rollbacks "
                "(divergence.max_rollbacks); lower optimizer.lr, or set engine.grad_clip"
            )
        stop = data_step(step, self.passed) + 1
        start = max(data_step(to, self.passed), stop - self.config.rollback_data)
        self.passed = merge_ranges([*self.passed, (start, stop)])
        self._suspect, self._in_row = (to, step), 0
        self._losses = deque(state.get("losses", ()), maxlen=self.config.window)
        logger.warning("rolled back to step %d; leaving out the data of steps %d to %d", to, start + 1, stop)

    # ------------------------------------------------------------------------------------------- state

    def counts(self) -> dict[str, int]:
        """Counts since the start of the run, for the metrics."""
        return {"skipped_steps": self.skipped, "loss_spikes": self.spikes, "rollbacks": self.rollbacks}

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            **self.counts(), "in_row": self._in_row, "losses": list(self._losses), "passed": self.passed,
            "suspect": self._suspect,
        }  # fmt: skip

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from the `state` of a checkpoint. A value that an older release did not store keeps its default."""
        state = {**self.state(), **state}
        self.skipped, self.spikes, self.rollbacks = (int(state[name]) for name in self.counts())
        self._in_row = int(state["in_row"])
        self._losses = deque(state["losses"], maxlen=self.config.window)
        self.passed = merge_ranges((start, stop) for start, stop in state["passed"])
        self._suspect = tuple(state["suspect"]) if state["suspect"] else None


def _worst_first(parts: list[tuple[Tensor, Tensor | None]]) -> list[tuple[int, int, float | None]]:
    """(epoch, sample id, loss) over all ranks: losses that are not finite, then the highest. A collective."""
    own: list[tuple[int, int, float | None]] = []
    for keys, per_sample in parts:
        values: list[Any] = [None] * len(keys) if per_sample is None else per_sample.float().tolist()
        own += [(epoch, sample, value) for (epoch, sample), value in zip(keys.tolist(), values, strict=True)]
    everywhere = [sample for rank in distributed.all_gather_object(own) for sample in rank]
    badness = {
        (epoch, sample): -math.inf if value is None else value if math.isfinite(value) else math.inf
        for epoch, sample, value in everywhere
    }
    return sorted(everywhere, key=lambda s: (-badness[s[0], s[1]], s[0], s[1]))


def _number(value: float | None) -> float | str | None:
    """JSON has no NaN."""
    return value if value is None or math.isfinite(value) else str(value)
