"""Metrics of a run on disk: metrics.jsonl, W&B, TensorBoard; and scores of checkpoints for W&B."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sfd_scale.runtime import distributed
from sfd_scale.runtime.files import write_atomically, write_json
from sfd_scale.runtime.run_paths import RunPaths

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases; the key comes from the environment alone and is never written."""

    mode: Literal["online", "offline", "disabled"] = "offline"
    project: str = "sfd-scale"
    entity: str | None = None


class MetricsWriter:
    """metrics.jsonl (one object a logged step), a W&B run that a resumed run continues, and TensorBoard's event files
    in `tensorboard/` where asked for. Rank 0 writes.

    Raises:
        ValueError: if TensorBoard is asked for and not installed.
    """

    def __init__(
        self, run: RunPaths, wandb: WandbConfig, config: Mapping[str, Any], *, tensorboard: bool = False
    ) -> None:
        self.path = run.metrics_file
        self._file = self.path.open("a", encoding="utf-8") if distributed.is_main() else None
        self.wandb_id: str | None = None
        self._wandb: Any = None
        self._board: Any = None
        if self._file is not None and wandb.mode != "disabled":
            self._wandb = open_wandb(run, wandb, config)
            self.wandb_id, self._scores, self._row = self._wandb.id, ScoreTable(run), self._wandb.step - 1
        if self._file is not None and tensorboard:
            self._board = _event_writer(run.tensorboard_folder)

    def truncate(self, step: int) -> None:
        """Drop lines after `step`: a run resumed from its checkpoint writes them anew. A torn last line goes too."""
        if self._file is None:
            return
        kept = [
            line
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines()
            if _step_of(line, default=step + 1) <= step
        ]
        self._file.close()
        write_atomically(self.path, "".join(f"{line}\n" for line in kept))
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """One row; what is not finite, which JSON has no word for, is null."""
        if self._file is None:
            return
        values = {key: value if value is None or math.isfinite(value) else None for key, value in values.items()}
        self._file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        self._file.flush()
        if self._wandb is not None:
            # One row of scores with each row of metrics: the trainer alone writes to W&B while it runs.
            identity, scores = next(iter(self._scores.pending()), (None, {}))
            row = {"step": step, **values, **scores}
            # W&B drops a row whose number is not above the last one's, as a step's is that a rollback trains again.
            self._row = max(step, self._row + 1)
            self._wandb.log({key: value for key, value in row.items() if value is not None}, step=self._row)
            self._scores.done(identity)
        if self._board is not None:
            for key, value in values.items():
                if value is not None:
                    self._board.add_scalar(key, value, step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._board is not None:
            self._board.close()


def open_wandb(folder: RunPaths, settings: WandbConfig, config: Mapping[str, Any] | None = None) -> Any:
    """The W&B run of a run folder, begun or continued: its id is kept there."""
    import wandb  # one file imports it, and only when it is used: it takes a second to import

    def start(mode: Literal["online", "offline", "disabled"]) -> Any:
        return wandb.init(
            project=settings.project, entity=settings.entity, mode=mode, dir=str(folder.path), name=folder.path.name,
            id=folder.wandb_id_file.read_text().strip() if folder.wandb_id_file.exists() else None,
            resume="allow" if mode == "online" else None, config=None if config is None else dict(config),
            settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip

    try:
        run = start(settings.mode)
    except wandb.errors.Error as error:
        if settings.mode != "online":
            raise
        # A run of days must not depend on a server: `wandb sync` brings it there later.
        logger.warning("W&B does not answer (%s); this run is recorded offline, below %s/wandb", error, folder.path)
        run = start("offline")
    run.define_metric("*", step_metric="step")
    run.define_metric("eval/*", step_metric="eval/step")
    write_atomically(folder.wandb_id_file, f"{run.id}\n")
    return run


class ScoreTable:
    """Scores of checkpoints, which `python -m eval watch` writes, and those that W&B has already."""

    def __init__(self, run: RunPaths) -> None:
        self.table, self.seen = run.evaluations.table, run.wandb_scores_file

    def pending(self) -> list[tuple[str, dict[str, Any]]]:
        """What W&B lacks: identity, and the row for it, `eval/step`, `eval/fid`, …"""
        if not self.table.is_file():
            return []
        logged = set(json.loads(self.seen.read_text(encoding="utf-8"))) if self.seen.is_file() else set()
        rows = [json.loads(line) for line in self.table.read_text(encoding="utf-8").splitlines()]
        return [
            (row["id"], {f"eval/{key}": value for key, value in row.items() if isinstance(value, int | float)})
            for row in rows
            if row["id"] not in logged
        ]

    def done(self, identity: str | None) -> None:
        if identity is not None:
            logged = json.loads(self.seen.read_text(encoding="utf-8")) if self.seen.is_file() else []
            write_json(self.seen, [*logged, identity])


def log_scores(folder: RunPaths, settings: WandbConfig) -> None:
    """Add what is pending to the W&B run of a training that is not running: two writers would overwrite each other."""
    scores, metrics = ScoreTable(folder), folder.metrics_file
    if settings.mode == "disabled" or not scores.pending():
        return
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []  # an imported run has none
    step = max((_step_of(line, default=0) for line in lines), default=0)
    run = open_wandb(folder, settings)
    for number, (identity, row) in enumerate(scores.pending(), start=max(step + 1, run.step)):
        run.log(row, step=number)
        scores.done(identity)
    run.finish()


def _event_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("tensorboard: true, but it is not installed; install sfd-scale[tensorboard]") from error
    return SummaryWriter(str(folder))


def _step_of(line: str, default: int) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return default
