"""Saving and loading by all ranks together: when to save, and which checkpoints to keep."""

from __future__ import annotations

import logging
import math
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from sfd_scale.checkpoint import folder as files
from sfd_scale.checkpoint import metadata
from sfd_scale.checkpoint.boxes import (
    Parts,
    Staged,
    check_torch_stores_shards,
    stage,
    state_parts,
    stored_shapes,
)
from sfd_scale.checkpoint.folder import Checkpoint
from sfd_scale.checkpoint.metadata import CheckpointError
from sfd_scale.engines.ema import EMA
from sfd_scale.engines.engine import Engine, Fragment
from sfd_scale.runtime import distributed
from sfd_scale.runtime.errors import error_text
from sfd_scale.runtime.leftovers import remove
from sfd_scale.runtime.settings import NoEffectOnResults, above, at_least

logger = logging.getLogger(__name__)
T = TypeVar("T")
_SLOW_SAVE_S, _SAVE_LIMIT_S = 60.0, 3600.0  # of a wait for a save in the background


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save: every `every` steps, every `every_s` seconds, or both. Which checkpoints to keep: the last
    `keep_last` (null: all), and those at multiples of `keep_every` steps, at which a run always saves."""

    every: int | None = 5000  # steps between saves
    every_s: float | None = None  # seconds since the last save
    keep_last: int | None = 2
    keep_every: int | None = None
    background: NoEffectOnResults[bool] = True  # write from a copy in host memory, during training

    def __post_init__(self) -> None:
        at_least(self, every=1, keep_last=1, keep_every=1)
        above(self, every_s=0)


def whole_state(fragments: Sequence[Fragment], ema: EMA) -> Parts:
    """The parts of a checkpoint: weights, moments, averages."""
    return state_parts(fragments, ema.averages)


def power_averages(fragments: Sequence[Fragment], ema: EMA) -> Parts:
    """The parts of a snapshot: the power-function averages, for post-hoc EMA."""
    return ema.powers


class CheckpointManager:
    """The checkpoints of one run. All ranks have to call its methods together, except `due` and `overdue`.

    Args:
        parts: selects the tensors to save.
        replace: delete a whole checkpoint of the same step when a save takes its place. By default it is moved aside.
    """

    def __init__(
        self, folder: Path, config: CheckpointConfig, parts: Callable[[Sequence[Fragment], EMA], Parts] = whole_state,
        replace: bool = False,
    ) -> None:  # fmt: skip
        check_torch_stores_shards()
        self.folder, self.config, self.parts, self.replace = folder, config, parts, replace
        self._group: dist.ProcessGroup | None = None
        self._staged: dict[str, Staged] | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._damaged: set[Checkpoint] = set()
        self._saved_at, self._stalled_s = time.monotonic(), 0.0
        self._timings: dict[str, float] = {}

    def due(self, step: int) -> bool:
        """Whether the step is one to save at."""
        return any(every is not None and step % every == 0 for every in (self.config.every, self.config.keep_every))

    def overdue(self) -> bool:
        """Whether the last save is too long ago by the clock of this rank. The ranks have to agree on the answer."""
        return self.config.every_s is not None and time.monotonic() - self._saved_at > self.config.every_s

    def timings(self) -> dict[str, float]:
        """Seconds of the last save, from its call to its commit, and seconds that it held up the caller. Told once."""
        found, self._timings = self._timings, {}
        return found

    def check_space(self, engine: Engine, ema: EMA) -> None:
        """Warn if the disk has no room for the next checkpoint, which is written before an old one is removed."""
        fragments = engine.fragments()
        self._warn_of_space(_bytes(stored_shapes(fragments, self.parts(fragments, ema))))

    def _warn_of_space(self, needed: int) -> None:
        if not distributed.is_main():
            return
        there = next(path for path in (self.folder, *self.folder.parents) if path.is_dir())
        free = shutil.disk_usage(there).free
        if free < needed:
            logger.warning(
                "the next checkpoint needs %s and %s has %s free: make room, lower checkpoint.keep_last, or the save "
                "will fail", _readable(needed), there, _readable(free),
            )  # fmt: skip

    # --------------------------------------------------------------------------------------------- save

    def save(self, step: int, engine: Engine, ema: EMA, state: Mapping[str, Any]) -> None:
        """Save as `step-<step>`; with `background`, return once the tensors are copied to host memory.

        Raises:
            CheckpointError: if this save, or the one before it in the background, failed on any rank.
        """
        called = time.monotonic()
        self.wait()
        on_gpu = engine.device.type == "cuda"
        parts = self.parts(engine.fragments(), ema)
        if self._staged is None:
            self._staged = stage(engine.fragments(), parts, pinned=on_gpu, own=True)
        for staged in self._staged.values():
            staged.flat.copy_(staged.source, non_blocking=on_gpu)
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        expected = stored_shapes(engine.fragments(), parts)
        record = _record(step, engine.optimizer_steps, parts, state)
        tensors = {name: s.rows for name, s in self._staged.items()}
        work = (called, step, tensors, expected, record, self._checkpoint_group())
        self._saved_at = time.monotonic()
        if self.config.background:
            self._thread = threading.Thread(target=self._in_background, args=work, name="checkpoint", daemon=True)
            self._stalled_s = time.monotonic() - called
            self._thread.start()
        else:
            self._write(*work)
            self._timings["checkpoint_stall_s"] = self._timings["checkpoint_save_s"]

    def save_whole(
        self, step: int, parts: Mapping[str, Mapping[str, torch.Tensor]], optimizer_steps: int, state: Mapping[str, Any]
    ) -> Checkpoint:
        """Save full fp32 tensors as `step-<step>`, in one process without an engine: for imported runs.

        Args:
            parts: for each part (boxes.state_parts), the tensors by parameter name.
        """
        tensors = {f"{part}.{name}": tensor for part, named in parts.items() for name, tensor in named.items()}
        expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self._write(time.monotonic(), step, tensors, expected, _record(step, optimizer_steps, parts, state), None)
        return Checkpoint.of_step(self.folder, step)

    def wait(self) -> None:
        """Wait for the save in the background, and raise its error if it failed.

        Raises:
            CheckpointError: if it failed, or does not end in an hour.
        """
        if self._thread is not None:
            began, said = time.monotonic(), _SLOW_SAVE_S
            while self._thread.is_alive():
                self._thread.join(1.0)
                waited = time.monotonic() - began
                if waited > said:
                    said *= 2
                    logger.warning("waiting for a save in %s for %.0f s; its storage is slow", self.folder, waited)
                if waited > _SAVE_LIMIT_S:
                    raise CheckpointError(f"{self.folder}: a save did not end in {waited:.0f} s; check its storage")
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _in_background(self, *args: Any) -> None:
        try:
            self._write(*args)
            self._timings["checkpoint_stall_s"] = self._stalled_s
        except BaseException as error:  # noqa: BLE001  raised by `wait` on the main thread
            self._error = error

    def _write(
        self, called: float, step: int, tensors: dict[str, Any], expected: dict[str, tuple[int, ...]],
        record: Mapping[str, Any],
        group: dist.ProcessGroup | None,
    ) -> None:  # fmt: skip
        """Write, check, commit. The ranks agree after every stage, so that a failure of one rank fails all of them."""
        checkpoint = Checkpoint.of_step(self.folder, step)
        final, first = checkpoint.path, distributed.is_main()

        def prepare() -> Path | None:
            if not first:
                return None
            self._warn_of_space(_bytes(expected))
            return files.new_partial(final)

        def write() -> dict[str, dict[str, Any]]:
            # No copies ahead: the tensors are in host memory, and this thread must leave the GPU to training.
            writer = FileSystemWriter(partial, single_file_per_rank=True, sync_files=True, per_thread_copy_ahead=0)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # due to no_dist
                save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)
            own = partial.glob(f"__{distributed.rank()}_*.distcp")
            return {path.name: files.fingerprint(path) for path in own}

        def commit() -> None:
            if first:
                metadata.check_complete(metadata.read_metadata(partial), expected)
                sums = {name: sum_ for written in by_rank for name, sum_ in written.items()}
                files.commit(checkpoint, partial, record, sums, replace=self.replace)
                self._prune()

        made = _together(prepare, group, f"{final.name}: making the folder")[0]
        assert made is not None  # by rank 0
        partial: Path = made
        try:
            by_rank = _together(write, group, f"{final.name}: writing tensors")
            _together(commit, group, f"{final.name}: committing")
        except CheckpointError:
            if first:
                remove(partial)  # it may fill the disk
            raise
        self._timings = {"checkpoint_save_s": time.monotonic() - called}
        if first:
            logger.info("saved %s, %s in %.1f s", final, _readable(_bytes(expected)), time.monotonic() - called)
            self._warn_of_space(_bytes(expected))

    # --------------------------------------------------------------------------------------------- load

    def latest(self, before: int | None = None) -> Checkpoint | None:
        """The newest intact checkpoint; with `before`, the newest one of an earlier step. Damaged checkpoints are
        reported, skipped and kept.

        Raises:
            ValueError: on all ranks, if the folder cannot be read, or none of its checkpoints is intact. To start anew
                beside them is for the user to decide.
        """
        self.wait()
        damaged: list[str] = []
        for candidate in reversed(self._candidates()):
            if before is not None and candidate.step >= before:
                continue
            share = slice(distributed.rank(), None, distributed.world_size())
            reports = [r for r in distributed.all_gather_object(candidate.damage(share)) if r]
            if not reports:
                return candidate
            self._damaged.add(candidate)
            damaged.append(f"{candidate.path.name}: {'; '.join(reports)}")
            if distributed.is_main():
                logger.warning("%s is damaged and skipped: %s", candidate.path, "; ".join(reports))
        if damaged and before is None:
            raise ValueError(
                f"{self.folder}: none of its checkpoints is intact ({'; '.join(damaged)}); give the command again if "
                "the storage failed, restore one of them with all its files, or move the folder away to start anew"
            )
        return None

    def remove_leftovers(self) -> None:
        """Remove what a killed start left: unfinished saves, and checkpoints that are marked as deleted."""
        if distributed.is_main():
            files.remove_leftovers(self.folder)

    def set_aside(self, after: int) -> None:
        """Rename the checkpoints of steps after `after`, so that no load sees them."""
        self.wait()
        if distributed.is_main():
            for checkpoint in files.whole_checkpoints(self.folder):
                if checkpoint.step > after:
                    checkpoint.move_aside()
        distributed.barrier()

    def _candidates(self) -> list[Checkpoint]:
        found: list[Checkpoint] = []
        failure = None
        if distributed.is_main():
            try:
                files.require_listing(self.folder)
                found = files.whole_checkpoints(self.folder)
            except OSError as error:
                failure = error_text(error)
            for path in files.unfinished(self.folder):
                logger.warning("%s is not a whole checkpoint and is skipped", path)
        found, failure = distributed.broadcast_object((found, failure))
        if failure is not None:
            raise ValueError(failure)
        return found

    def load(self, checkpoint: Checkpoint, engine: Engine, ema: EMA) -> dict[str, Any]:
        """Fill weights, moments, averages and the optimizer's step count; returns `checkpoint.state`.

        Raises:
            ValueError: if the checkpoint is of another model, naming the tensors, or of a newer release.
        """
        self.wait()
        state = checkpoint.state
        parts = self.parts(engine.fragments(), ema)
        expected = stored_shapes(engine.fragments(), parts)
        metadata.check_same_model(metadata.shapes(metadata.read_metadata(checkpoint.path)), expected)
        staged = stage(engine.fragments(), parts, pinned=False, own=False)
        tensors = {name: s.rows for name, s in staged.items()}
        group = self._checkpoint_group()
        with metadata.as_checkpoint_error(f"{checkpoint.path} cannot be read"):
            reader = metadata.SafeReader(checkpoint.path)
            load(tensors, storage_reader=reader, process_group=group, no_dist=group is None)
        with torch.no_grad():
            for s in staged.values():
                s.source.copy_(s.flat)
        engine.set_optimizer_steps(state["optimizer_steps"])
        engine.after_load()
        return state

    # --------------------------------------------------------------------------------------------- keep

    def _prune(self) -> None:
        """On rank 0, after a commit: delete the checkpoints that need not be kept, and unfinished saves."""
        whole = [checkpoint for checkpoint in files.whole_checkpoints(self.folder) if checkpoint not in self._damaged]
        for checkpoint in whole[: -self.config.keep_last] if self.config.keep_last is not None else []:
            if self.config.keep_every is None or checkpoint.step % self.config.keep_every:
                checkpoint.mark_deleted()
        files.remove_leftovers(self.folder)

    def _checkpoint_group(self) -> dist.ProcessGroup | None:
        """A gloo group of all ranks for checkpoints, so that the background thread disturbs no other collective."""
        if self._group is None and dist.is_initialized():
            group = dist.new_group(backend="gloo")
            assert isinstance(group, dist.ProcessGroup)  # every rank is a member
            self._group = group
        return self._group


def _record(step: int, optimizer_steps: int, parts: Iterable[str], state: Mapping[str, Any]) -> dict[str, Any]:
    """The content of state.json."""
    own = {"step": step, "format": files.FORMAT, "optimizer_steps": optimizer_steps, "parts": list(parts)}
    return {**state, **own}


def _bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of fp32 tensors of these shapes."""
    return sum(4 * math.prod(shape) for shape in shapes.values())


def _readable(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def _failure(error: BaseException) -> str:
    """What went wrong on a rank: in our words for errors of the storage, with the kind of any other error."""
    return error_text(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"


def _together(work: Callable[[], T], group: dist.ProcessGroup | None, what: str) -> list[T]:
    """Do `work` on every rank; returns the results of all. If one rank fails, all raise CheckpointError."""
    result: T | None = None
    failure = None
    try:
        result = work()
    except CheckpointException as error:
        # It is raised on all ranks, and is no subclass of Exception. Each rank reports its own failure.
        own = error.failures.get(distributed.rank())
        failure = _failure(own[0]) if own else None
    except Exception as error:
        failure = _failure(error)
        if not isinstance(error, OSError | ValueError):
            logger.exception("%s", what)
    outcomes: list[Any] = [(result, failure)]
    if group is not None:
        outcomes = [None] * dist.get_world_size(group)
        dist.all_gather_object(outcomes, (result, failure), group=group)
    failures = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(outcomes) if text is not None]
    if failures:
        raise CheckpointError(f"{what} failed on {'; '.join(failures)}")
    return [value for value, _ in outcomes]
