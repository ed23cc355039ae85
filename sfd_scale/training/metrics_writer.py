"""Metrics of a run: metrics.jsonl, Weights & Biases (W&B) and TensorBoard. W&B gets the scores of checkpoints too."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from sfd_scale.runtime import distributed, environment
from sfd_scale.runtime.errors import error_text
from sfd_scale.runtime.files import read_json, read_json_lines, write_atomically, write_json
from sfd_scale.runtime.limits import within
from sfd_scale.runtime.run_paths import RunPaths
from sfd_scale.runtime.settings import wait_s

logger = logging.getLogger(__name__)
SERVICE, SERVICE_WAIT_S = "wandb-core", 15.0  # W&B's process; how much longer than W&B's own limit it is waited for
LOG_WAIT_S = 60.0  # of a row that W&B's process does not take
_WANDB_ID = re.compile(r"[^\s:;,#?/'\x00-\x1f\ufffd]{1,128}")


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases. Its key comes from the environment alone and is never written.

    mode, project, entity: null takes WANDB_MODE (or WANDB_DISABLED), WANDB_PROJECT and WANDB_ENTITY of the environment.
        Without them the mode is offline and the project sfd-scale.
    finish_timeout_s: how long the end of a run waits for W&B. `wandb sync` sends later what it has not sent.
    """

    mode: Literal["online", "offline", "disabled"] | None = None
    project: str | None = None
    entity: str | None = None
    finish_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        wait_s(self, finish_timeout_s=1)
        # Here and not in the writer: recipe.yaml, exports and `sfd show` have the values that are used.
        for name, value in _wandb_environment().items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value or _WANDB_DEFAULTS[name])

    def describe(self) -> str:
        """The settings in words, with the variables of the environment that set them or lose to the recipe."""
        parts = []
        for name, value in _wandb_environment().items():
            own, variable = getattr(self, name), _WANDB_VARIABLES[name]
            variable = "WANDB_DISABLED" if name == "mode" and environment.flag("WANDB_DISABLED") else variable
            by = variable if own == value else f"the recipe's, not {variable}"
            note = "" if value is None else f" ({by})"
            parts += [f"{name} {own}{note}"] if own is not None else []
        if self.mode == "disabled":
            return parts[0].removeprefix("mode ")
        return ", ".join(
            [*parts, *(f"{name} is set" for name in ("WANDB_NAME", "WANDB_DIR") if environment.text(name))]
        )


_WANDB_VARIABLES = {"mode": "WANDB_MODE", "project": "WANDB_PROJECT", "entity": "WANDB_ENTITY"}
_WANDB_DEFAULTS = {"mode": "offline", "project": "sfd-scale", "entity": None}


def _wandb_environment() -> dict[str, str | None]:
    """The values of the environment by the name of their setting; None for a variable that is not set."""
    found = {name: environment.text(variable) for name, variable in _WANDB_VARIABLES.items()}
    found["mode"] = environment.wandb_mode()
    return found


class MetricsWriter:
    """Writes each logged step to metrics.jsonl, to W&B, and on request to TensorBoard's event files. Rank 0 writes.

    A resumed run continues its W&B run. A run does not depend on W&B: if W&B's process dies or stops, metrics.jsonl
    goes on alone.

    Raises:
        ValueError: if TensorBoard is requested and not installed.
    """

    def __init__(
        self, run: RunPaths, wandb: WandbConfig, config: Mapping[str, Any], *, tensorboard: bool = False
    ) -> None:
        self.path = run.metrics_file
        self._file = self.path.open("a", encoding="utf-8") if distributed.is_main() else None
        self.wandb_id: str | None = None
        self._wandb: Any = None
        self._finish_timeout_s = wandb.finish_timeout_s
        self._board: Any = None
        if self._file is not None and wandb.mode != "disabled":
            self._wandb = open_wandb(run, wandb, config)
            self.wandb_id, self._scores, self._row = self._wandb.id, WandbScores(run), self._wandb.step - 1
        self._board_folder: Path | None = None
        self._purge_step: int | None = None
        if self._file is not None and tensorboard:
            _event_writer_class()
            self._board_folder = run.tensorboard_folder

    def truncate(self, step: int) -> None:
        """Delete the lines after `step`, and a torn last line: a resumed run writes them again.

        TensorBoard leaves out the events after `step` that are written already.
        """
        if self._file is None:
            return
        if self._board is not None:
            self._board.close()
        self._board, self._purge_step = None, step + 1
        kept = [
            line
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines()
            if _step_of(line, default=step + 1) <= step
        ]
        self._file.close()
        write_atomically(self.path, "".join(f"{line}\n" for line in kept))
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Write the values of one step. A value that is not finite becomes null, because JSON has no word for it."""
        if self._file is None:
            return
        values = {key: value if value is None or math.isfinite(value) else None for key, value in values.items()}
        self._file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        self._file.flush()
        if self._wandb is not None:
            try:
                self._write_to_wandb(step, values)
            except Exception as error:  # noqa: BLE001 (of W&B, of its socket, of files that another process writes)
                self._wandb = None
                abandon_wandb(error)
        if self._board_folder is not None:
            if self._board is None:
                self._board = _event_writer_class()(str(self._board_folder), purge_step=self._purge_step)
            for key, value in values.items():
                if value is not None:
                    self._board.add_scalar(key, value, step)

    def _write_to_wandb(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Write a row of metrics. Only the trainer writes to W&B while a run trains: one row of scores goes along."""
        pending = next(iter(self._scores.pending()), None)
        row = {"step": step, **values, **({} if pending is None else pending.values)}
        row = {key: value for key, value in row.items() if value is not None}
        # W&B drops a row whose number is not larger than the last one. After a rollback, step numbers repeat.
        self._row = max(step, self._row + 1)
        within(LOG_WAIT_S, lambda: self._wandb.log(row, step=self._row), f"its process {SERVICE} takes no more rows")
        if pending is not None:
            self._scores.mark_logged(pending)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            finish_wandb(self._wandb, self._finish_timeout_s)
        if self._board is not None:
            self._board.close()


def open_wandb(folder: RunPaths, settings: WandbConfig, config: Mapping[str, Any] | None = None) -> Any:
    """The W&B run of a run folder: a new one, or the one whose id the folder holds."""
    import wandb  # takes a second to import

    # W&B reads its variables itself, and a variable that the user has set wins over a value that no recipe sets.
    ours = {"WANDB_DIR": ("dir", str(folder.path)), "WANDB_NAME": ("name", folder.path.name)}
    own = {
        "WANDB_SILENT": ("silent", True), "WANDB_CONSOLE": ("console", "off"),
        "WANDB_FINISH_TIMEOUT": ("finish_timeout", settings.finish_timeout_s),
    }  # fmt: skip
    known = known_wandb_id(folder)

    def start(mode: Literal["online", "offline", "disabled"] | None) -> Any:
        resume = {"WANDB_RESUME": ("resume", "allow")} if mode == "online" else {}
        return wandb.init(
            project=settings.project, entity=settings.entity, mode=mode, id=known, **_unless_set(ours | resume),
            config=None if config is None else dict(config), settings=wandb.Settings(**_unless_set(own)),
        )  # fmt: skip

    try:
        wandb.Settings(project=settings.project)
        wandb.setup()  # reads the variables
    except (wandb.errors.UsageError, ValueError) as error:
        said = " ".join(str(error).partition("For further information")[0].split())
        raise ValueError(f"wandb: {said}; allowed: see the settings and the variables of W&B") from error
    try:
        run = start(settings.mode)
    except wandb.errors.Error as error:
        if settings.mode != "online":
            raise
        # A long run must not depend on a server. `wandb sync` sends the offline record later.
        where = environment.text("WANDB_DIR") or folder.path
        logger.warning("W&B does not answer (%s); this run is recorded offline, below %s/wandb", error, where)
        run = start("offline")
    run.define_metric("*", step_metric="step")
    run.define_metric("eval/*", step_metric="eval/step")
    write_atomically(folder.wandb_id_file, f"{run.id}\n")
    return run


def known_wandb_id(folder: RunPaths) -> str | None:
    """The id of the W&B run that a run folder continues; None if it has none, or its file is damaged."""
    if not folder.wandb_id_file.exists():
        return None
    text = folder.wandb_id_file.read_text(encoding="utf-8", errors="replace").strip()
    if _WANDB_ID.fullmatch(text):
        return text
    logger.warning("%s: %r is not the id of a W&B run; a new W&B run begins", folder.wandb_id_file, text[:80])
    return None


def _unless_set(values: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """Arguments by name, without those whose variable of the environment is set."""
    return {name: value for variable, (name, value) in values.items() if environment.text(variable) is None}


@dataclass(frozen=True)
class PendingScores:
    """A row of scores that W&B lacks: the id of its results, and `eval/step`, `eval/fid`, ..."""

    id: str
    values: dict[str, Any]


class WandbScores:
    """The scores that `python -m eval watch` writes for a run, and a record of those that W&B has."""

    def __init__(self, run: RunPaths) -> None:
        self.table, self.logged_file = run.evaluations.table, run.wandb_scores_file

    def pending(self) -> list[PendingScores]:
        """The rows that W&B lacks, in the order of the table."""
        if not self.table.is_file():
            return []
        logged = set(self._logged())
        rows = read_json_lines(self.table)
        return [
            PendingScores(row["id"], {f"eval/{key}": value for key, value in row.items() if _is_number(value)})
            for row in rows
            if row["id"] not in logged
        ]

    def mark_logged(self, scores: PendingScores) -> None:
        write_json(self.logged_file, [*self._logged(), scores.id])

    def _logged(self) -> list[str]:
        if not self.logged_file.is_file():
            return []
        ids: list[str] = read_json(self.logged_file)
        return ids


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def log_scores(folder: RunPaths, settings: WandbConfig) -> None:
    """Add pending scores to the W&B run of a training that is not running. Two writers would overwrite each other."""
    scores, metrics = WandbScores(folder), folder.metrics_file
    if settings.mode == "disabled" or not scores.pending():
        return
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []  # an imported run has none
    step = max((_step_of(line, default=0) for line in lines), default=0)
    run = open_wandb(folder, settings)
    for number, pending in enumerate(scores.pending(), start=max(step + 1, run.step)):
        run.log(pending.values, step=number)
        scores.mark_logged(pending)
    finish_wandb(run, settings.finish_timeout_s)


def finish_wandb(run: Any, timeout_s: float) -> None:
    """End a W&B run. W&B gives up after `timeout_s` by itself; its process is killed if it does not answer then."""
    try:
        within(timeout_s + SERVICE_WAIT_S, run.finish, f"its process {SERVICE} does not answer")
    except Exception as error:  # noqa: BLE001 (the run itself is complete)
        abandon_wandb(error)


def abandon_wandb(cause: Exception) -> None:
    """Go on without W&B: end its process, and its hook at the exit of Python, which would wait for that process."""
    import wandb

    logger.warning(
        "W&B is given up (%s); the run does not depend on it, and metrics.jsonl has every step. `wandb sync` sends the "
        "rows that it has recorded", error_text(cause),
    )  # fmt: skip
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.name().startswith(SERVICE):
                child.kill()
    # It speaks to the process that is gone, and would exit with the code of that process.
    with contextlib.suppress(Exception, SystemExit):
        within(SERVICE_WAIT_S, wandb.teardown, "W&B does not end")


def _event_writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("tensorboard: true, but it is not installed; install sfd-scale[tensorboard]") from error
    return SummaryWriter


def _step_of(line: str, default: int) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return default
