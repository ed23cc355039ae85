"""When to save, what to keep, and the save and load of all ranks together."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
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
from sfd_scale.checkpoint.boxes import (
    PARAMS_PART,
    Parts,
    Staged,
    check_shares_can_be_stored,
    stage,
    state_parts,
    stored_shapes,
)
from sfd_scale.checkpoint.folder import CheckpointError
from sfd_scale.engines.ema import EMA
from sfd_scale.engines.engine import Engine, Fragment
from sfd_scale.runtime import distributed
from sfd_scale.runtime.files import sha256
from sfd_scale.runtime.settings import NoEffectOnResults, above, at_least

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save: every so many steps, seconds, or both. What to keep: the last `keep_last` of them (null: all), and
    every one whose step `keep_every` divides, which is saved whether or not it is due otherwise."""

    every: int | None = 5000  # steps between saves
    every_s: float | None = None  # seconds between saves, counted from the last one
    keep_last: int | None = 2
    keep_every: int | None = None
    background: NoEffectOnResults[bool] = True  # write while training goes on, from a copy in host memory

    def __post_init__(self) -> None:
        at_least(self, every=1, keep_last=1, keep_every=1)
        above(self, every_s=0)


def whole_state(fragments: Sequence[Fragment], ema: EMA) -> Parts:
    """The parts of a checkpoint: weights, moments, averages."""
    return state_parts(fragments, ema.averages)


def power_averages(fragments: Sequence[Fragment], ema: EMA) -> Parts:
    """The parts of a snapshot, which averages of other lengths are made from after training."""
    return ema.powers


class CheckpointManager:
    """The checkpoints of one run. Every method but `due`, `overdue` and `read_state` is called by all ranks together.

    Args:
        parts: what a checkpoint holds.
        replace: a save takes the place of a whole checkpoint of the same step, rather than keep it under another name.
    """

    def __init__(
        self, folder: Path, config: CheckpointConfig, parts: Callable[[Sequence[Fragment], EMA], Parts] = whole_state,
        replace: bool = False,
    ) -> None:  # fmt: skip
        check_shares_can_be_stored()
        self.folder, self.config, self.parts, self.replace = folder, config, parts, replace
        self._group: dist.ProcessGroup | None = None
        self._staged: dict[str, Staged] | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._damaged: set[Path] = set()
        self._saved_at, self._stalled_s = time.monotonic(), 0.0
        self._timings: dict[str, float] = {}

    def due(self, step: int) -> bool:
        """Whether the step is one to save at."""
        return any(every is not None and step % every == 0 for every in (self.config.every, self.config.keep_every))

    def overdue(self) -> bool:
        """Whether the last save is too long ago by this rank's clock: the ranks have to agree on it."""
        return self.config.every_s is not None and time.monotonic() - self._saved_at > self.config.every_s

    def timings(self) -> dict[str, float]:
        """Of the last save, once: seconds from its call to its commit, seconds that the caller stood still for it."""
        found, self._timings = self._timings, {}
        return found

    def check_space(self, engine: Engine, ema: EMA) -> None:
        """Warn where the disk has no room for the next checkpoint, which is written before an old one is removed."""
        shapes = stored_shapes(self.parts(engine.fragments(), ema), _all_shapes(engine))
        self._warn_of_space(_bytes(shapes))

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
        """Save as `step-<step>`; in the background, if so configured, once the tensors are copied to host memory.

        Raises:
            CheckpointError: where this save, or the one before it in the background, failed on any rank.
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
        expected = stored_shapes(parts, _all_shapes(engine))
        text = _record(step, engine.optimizer_steps, parts, state)
        tensors = {name: s.rows for name, s in self._staged.items()}
        work = (called, step, tensors, expected, text, self._checkpoint_group())
        self._saved_at = time.monotonic()
        if self.config.background:
            self._thread = threading.Thread(target=self._in_background, args=work, name="checkpoint")
            self._stalled_s = time.monotonic() - called
            self._thread.start()
        else:
            self._write(*work)
            self._timings["checkpoint_stall_s"] = self._timings["checkpoint_save_s"]

    def save_whole(
        self, step: int, parts: Mapping[str, Mapping[str, torch.Tensor]], optimizer_steps: int, state: Mapping[str, Any]
    ) -> Path:
        """Save full fp32 tensors as `step-<step>`, on one process without an engine: what comes from elsewhere.

        Args:
            parts: the tensors by parameter, for each prefix of a stored name (boxes.state_parts).
        """
        tensors = {f"{part}.{name}": tensor for part, named in parts.items() for name, tensor in named.items()}
        expected = stored_shapes(parts, {name: tuple(tensor.shape) for name, tensor in parts[PARAMS_PART].items()})
        self._write(time.monotonic(), step, tensors, expected, _record(step, optimizer_steps, parts, state), None)
        return self.folder / files.folder_name(step)

    def wait(self) -> None:
        """Wait for the save in the background; raises what it raised."""
        if self._thread is not None:
            self._thread.join()
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
        self, called: float, step: int, tensors: dict[str, Any], expected: dict[str, tuple[int, ...]], state: str,
        group: dist.ProcessGroup | None,
    ) -> None:  # fmt: skip
        """Write, check, commit. Every stage is agreed on by all ranks, so that one failing rank fails them all."""
        final = self.folder / files.folder_name(step)
        partial = final.with_name(f"{final.name}.tmp")
        first = distributed.is_main()

        def prepare() -> None:
            if first:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                self._warn_of_space(_bytes(expected))

        def write() -> dict[str, dict[str, Any]]:
            # Nothing to copy ahead: all is in host memory, and this thread must not meet the GPU, which trains.
            writer = FileSystemWriter(partial, single_file_per_rank=True, sync_files=True, per_thread_copy_ahead=0)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # no_dist asks for it
                save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)
            own = partial.glob(f"__{distributed.rank()}_*.distcp")
            return {path.name: _fingerprint(path) for path in own}

        def commit() -> None:
            if first:
                files.check_complete(files.read_metadata(partial), expected)
                files.write_synced(partial / "state.json", state)
                sums = {name: _fingerprint(partial / name) for name in (".metadata", "state.json")}
                for written in by_rank:
                    sums |= written
                listing = json.dumps(sums, indent=1, sort_keys=True)
                files.write_synced(partial / "checksums.json", listing)
                files.sync_folder(partial)
                _move_aside(final, delete=self.replace)
                os.replace(partial, final)
                files.sync_folder(self.folder)
                files.write_synced(final / "COMMIT", hashlib.sha256(listing.encode()).hexdigest() + "\n")
                files.sync_folder(final)
                self._prune()

        _together(prepare, group, f"{final.name}: making the folder")
        try:
            by_rank = _together(write, group, f"{final.name}: writing tensors")
            _together(commit, group, f"{final.name}: committing")
        except CheckpointError:
            if first:
                shutil.rmtree(partial, ignore_errors=True)  # it may be what fills the disk
            raise
        self._timings = {"checkpoint_save_s": time.monotonic() - called}
        if first:
            logger.info("saved %s, %s in %.1f s", final, _readable(_bytes(expected)), time.monotonic() - called)
            self._warn_of_space(_bytes(expected))

    # --------------------------------------------------------------------------------------------- load

    def latest(self, before: int | None = None) -> Path | None:
        """The newest whole checkpoint, of those older than step `before` if it is given. Damaged ones are reported,
        skipped and left where they are."""
        self.wait()
        for candidate in reversed(self._candidates()):
            if before is not None and (files.step_of(candidate) or 0) >= before:
                continue
            share = slice(distributed.rank(), None, distributed.world_size())
            reports = [r for r in distributed.all_gather_object(files.damage(candidate, share)) if r]
            if not reports:
                return candidate
            self._damaged.add(candidate)
            if distributed.is_main():
                logger.warning("%s is damaged and skipped: %s", candidate, "; ".join(reports))
        return None

    def set_aside(self, after: int) -> None:
        """Checkpoints newer than step `after` keep their files under a name that `latest` passes by."""
        self.wait()
        if distributed.is_main():
            for path in files.committed(self.folder):
                if (files.step_of(path) or 0) > after:
                    _move_aside(path, delete=False)
        distributed.barrier()

    def _candidates(self) -> list[Path]:
        found: list[Path] = []
        if distributed.is_main() and self.folder.is_dir():
            found = files.committed(self.folder)
            for path in sorted(self.folder.glob("step-*")):
                if path not in found and ".aside-" not in path.name:
                    logger.warning("%s is not a whole checkpoint and is skipped", path)
        return distributed.broadcast_object(found)

    def read_state(self, path: Path) -> dict[str, Any]:
        """See `folder.read_state`."""
        return files.read_state(path)

    def load(self, path: Path, engine: Engine, ema: EMA) -> dict[str, Any]:
        """Fill weights, moments, averages and the optimizer's step count; returns the trainer's state.

        Raises:
            ValueError: where the checkpoint is of another model, naming the tensors, or of a newer release.
        """
        self.wait()
        state = files.read_state(path)
        parts = self.parts(engine.fragments(), ema)
        expected = stored_shapes(parts, _all_shapes(engine))
        files.check_same_model(files.shapes(files.read_metadata(path)), expected)
        staged = stage(engine.fragments(), parts, pinned=False, own=False)
        tensors = {name: s.rows for name, s in staged.items()}
        group = self._checkpoint_group()
        with files.one_error(f"{path} cannot be read"):
            load(tensors, storage_reader=files.Reader(path), process_group=group, no_dist=group is None)
        with torch.no_grad():
            for s in staged.values():
                s.source.copy_(s.flat)
        engine.set_optimizer_steps(state["optimizer_steps"])
        engine.after_load()
        return state

    # --------------------------------------------------------------------------------------------- keep

    def _prune(self) -> None:
        """On rank 0, after a commit: remove what retention does not keep, and what earlier saves left unfinished."""
        whole = [path for path in files.committed(self.folder) if path not in self._damaged]
        for path in whole[: -self.config.keep_last] if self.config.keep_last is not None else []:
            step = files.step_of(path) or 0
            if self.config.keep_every is None or step % self.config.keep_every:
                # First the name, so that a kill in between leaves nothing that looks like a checkpoint.
                os.replace(path, path.with_name(f"{path.name}.deleted"))
        for leftover in [*self.folder.glob("step-*.deleted"), *self.folder.glob("step-*.tmp")]:
            shutil.rmtree(leftover, ignore_errors=True)

    def _checkpoint_group(self) -> dist.ProcessGroup | None:
        """A gloo group of all ranks for checkpoints alone, so that the background thread meets no other collective."""
        if self._group is None and dist.is_initialized():
            group = dist.new_group(backend="gloo")
            assert isinstance(group, dist.ProcessGroup)  # only a rank outside of it gets something else
            self._group = group
        return self._group


def _record(step: int, optimizer_steps: int, parts: Iterable[str], state: Mapping[str, Any]) -> str:
    """state.json."""
    record = {**state, "step": step, "format": files.FORMAT, "optimizer_steps": optimizer_steps, "parts": list(parts)}
    return json.dumps(record, indent=1, sort_keys=True)


def _all_shapes(engine: Engine) -> dict[str, tuple[int, ...]]:
    """Name → full shape of every parameter, from the fragments of all ranks."""
    local = {fragment.name: fragment.shape for fragment in engine.fragments()}
    return {name: shape for part in distributed.all_gather_object(local) for name, shape in part.items()}


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


def _bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of fp32 tensors of these shapes."""
    return sum(4 * math.prod(shape) for shape in shapes.values())


def _readable(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def _move_aside(path: Path, delete: bool) -> None:
    """A folder (a cut-off or damaged save of this step, or one that a run went back from) is kept under another name.

    Args:
        delete: if it is whole, give it the name of one that `_prune` removes.
    """
    if delete and (path / "COMMIT").is_file():
        os.replace(path, path.with_name(f"{path.name}.deleted"))
    elif path.exists():
        aside = next(p for n in range(1, 1000) if not (p := path.with_name(f"{path.name}.aside-{n}")).exists())
        logger.warning("%s exists; kept as %s", path, aside.name)
        os.replace(path, aside)


def _together(work: Callable[[], T], group: dist.ProcessGroup | None, what: str) -> list[T]:
    """Do `work` on every rank; the results of all, or CheckpointError on all where it failed on one."""
    result: T | None = None
    failure = None
    try:
        result = work()
    except CheckpointException as error:
        # torch's, no Exception, and on all ranks already: each says what is its own.
        own = error.failures.get(distributed.rank())
        failure = f"{type(own[0]).__name__}: {own[0]}" if own else None
    except Exception as error:
        # Every rank must hear of it, or the others would wait for this one.
        failure = f"{type(error).__name__}: {error}"
        logger.exception("%s", what)
    outcomes: list[Any] = [(result, failure)]
    if group is not None:
        outcomes = [None] * dist.get_world_size(group)
        dist.all_gather_object(outcomes, (result, failure), group=group)
    failures = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(outcomes) if text is not None]
    if failures:
        raise CheckpointError(f"{what} failed on {'; '.join(failures)}")
    return [value for value, _ in outcomes]
