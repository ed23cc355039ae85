"""Losses and gradients that are not finite, and losses that leap: seen, counted, written down, and acted upon.

The loss of a step over the global batch is judged on the device, before the backward pass of its last micro-batch:
where it is not finite or too high, that micro-batch's loss is multiplied by NaN, and the engine, which looks at the
norm of the gradient anyway, drops the step on all ranks. So a step is vetoed without the host waiting for the device.
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
_MOST_BYTES = 64 << 20  # of the record; the log goes on
_NAMED = 8  # sample ids in a log line; the record has them all
_NORMAL = 1.4826  # median absolute deviation → standard deviation of a normal distribution


class DivergenceError(FloatingPointError):
    """The policy, or the end of its patience, stops the run; the message names step and samples."""


@dataclass(frozen=True, kw_only=True)
class DivergenceConfig:
    """What to do about a bad step.

    stop: end the run; its checkpoints are from before. skip: leave weights and averages as they are and go on.
    rollback: go back to the last checkpoint and pass over the data of the last `rollback_data` steps up to the bad one.
    A second rollback before the run has got past the first by `window` steps goes to the checkpoint before.

    A spike is a loss more than `spike_z` robust standard deviations (from the median absolute deviation, of at least a
    thousandth of the median) above the median of the last `window` losses. `log` leaves it at that.
    """

    not_finite: Policy = "skip"
    spike: Literal["log", "stop", "skip", "rollback"] = "log"
    spike_z: float = 20.0
    window: int = 128
    max_in_row: int = 20  # dropped steps in a row, before the run stops
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
    """The loss above which a step is a spike, from the losses before it."""
    centre = statistics.median(losses)
    spread = _NORMAL * statistics.median(abs(loss - centre) for loss in losses)
    return centre + z * max(spread, 1e-3 * abs(centre))


def joined(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Ranges that may touch or overlap, as disjoint rising ones."""
    out: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(stop, out[-1][1]))
        else:
            out.append((start, stop))
    return tuple(out)


class DivergenceWatch:
    """Watches the losses of a run. `guarded` and `judge` are called by all ranks at the same step.

    Attributes:
        passed: data left out since a rollback; part of every checkpoint, so that a resumed run leaves it out too.
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

    # -------------------------------------------------------------------------------------------- see

    def guarded(self, losses: LossTerms, keys: Tensor, last: bool) -> Tensor:
        """The loss to take the gradient of; NaN in the last micro-batch of a step that is to be dropped.

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
        self._loss = HostCopy(mean)  # it has arrived by the time the engine's step has read its norm
        return losses.total * torch.where(mean.isfinite() & (mean <= allowed), 1.0, math.nan)

    @property
    def _full(self) -> bool:
        return len(self._losses) == self.config.window

    # ------------------------------------------------------------------------------------------ judge

    def judge(self, step: int, result: StepResult) -> Literal["go on", "rollback"]:
        """What to do after step `step` (0, 1, …).

        Raises:
            DivergenceError: where the policy is to stop, or too many steps in a row were dropped.
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
                f"{text}; the checkpoints are from before it. Lower optimizer.lr or set engine.grad_clip; or let the "
                f"run go on past it: divergence.{key}=skip, or =rollback"
            )
        if policy == "rollback":
            return "rollback"
        if self._in_row >= self.config.max_in_row:
            raise DivergenceError(
                f"{self._in_row} steps in a row were dropped (divergence.max_in_row), the last: {text}. Lower "
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
        """Log the event, and append it to the record with every sample of the global batch, worst first."""
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
        """The steps that a checkpoint must be older than, for a rollback from step `step`: the first choice first."""
        if self._suspect is not None and step <= self._suspect[1] + self.config.window:
            return [self._suspect[0], step + 1]
        return [step + 1]

    def rolled_back(self, step: int, to: int, state: Mapping[str, Any]) -> None:
        """The run is back at step `to`, from a checkpoint with `state`; the data up to that of `step` is passed over.

        Raises:
            DivergenceError: after `max_rollbacks`.
        """
        self.rollbacks += 1
        if self.rollbacks > self.config.max_rollbacks:
            raise DivergenceError(
                f"step {step + 1}: after {self.config.max_rollbacks} rollbacks (divergence.max_rollbacks) the run "
                "still diverges; lower optimizer.lr, or set engine.grad_clip"
            )
        stop = data_step(step, self.passed) + 1
        start = max(data_step(to, self.passed), stop - self.config.rollback_data)
        self.passed = joined([*self.passed, (start, stop)])
        self._suspect, self._in_row = (to, step), 0
        self._losses = deque(state.get("losses", ()), maxlen=self.config.window)
        logger.warning("back at step %d; the data of steps %d to %d is passed over", to, start + 1, stop)

    # ------------------------------------------------------------------------------------------- state

    def counts(self) -> dict[str, int]:
        """For the metrics, since the start of the run."""
        return {"skipped_steps": self.skipped, "loss_spikes": self.spikes, "rollbacks": self.rollbacks}

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            **self.counts(), "in_row": self._in_row, "losses": list(self._losses), "passed": self.passed,
            "suspect": self._suspect,
        }  # fmt: skip

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on as the run that wrote `state`; what an older release did not write there stays as at the start."""
        state = {**self.state(), **state}
        self.skipped, self.spikes, self.rollbacks = (int(state[name]) for name in self.counts())
        self._in_row = int(state["in_row"])
        self._losses = deque(state["losses"], maxlen=self.config.window)
        self.passed = joined((start, stop) for start, stop in state["passed"])
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
