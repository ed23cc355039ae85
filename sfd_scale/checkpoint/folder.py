"""The folder of one checkpoint.

    step-00001000/
        __<rank>_0.distcp, .metadata   torch's distributed checkpoint: fp32 tensors in full shapes
        state.json                     step, format, and the trainer's record
        checksums.json                 sha256 and size of each file above, computed by the rank that wrote it
        COMMIT                         sha256 of checksums.json; written last

A folder without COMMIT is not a checkpoint. `step-….tmp` is an unfinished save, `step-….deleted` a removal that was cut
off, and `step-….aside-1` is kept for the user: a damaged or cut-off save, or a checkpoint from before a rollback.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load

from sfd_scale.checkpoint.boxes import EXP_AVG_PART, EXP_AVG_SQ_PART, PARAMS_PART
from sfd_scale.checkpoint.metadata import CheckpointError, SafeReader, as_checkpoint_error, read_metadata, shapes
from sfd_scale.engines import ema
from sfd_scale.runtime.errors import error_text
from sfd_scale.runtime.files import read_json, sha256
from sfd_scale.runtime.leftovers import free_path, remove
from sfd_scale.runtime.progress import MB, progress
from sfd_scale.runtime.run_paths import step_name, step_of

logger = logging.getLogger(__name__)
FORMAT = 1
_STATE, _CHECKSUMS, _COMMIT = "state.json", "checksums.json", "COMMIT"

Weights = Literal["ema", "params", "exp_avg", "exp_avg_sq"]
PART_OF: dict[Weights, str] = {
    "ema": ema.PART,
    "params": PARAMS_PART,
    "exp_avg": EXP_AVG_PART,
    "exp_avg_sq": EXP_AVG_SQ_PART,
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk. The properties read its files; the files may be gone by the next call."""

    path: Path

    @classmethod
    def of_step(cls, root: Path, step: int) -> Checkpoint:
        """The checkpoint of a step below `root`, whether or not there is one."""
        return cls(root / step_name(step))

    @property
    def step(self) -> int:
        """The step in the folder's name.

        Raises:
            ValueError: for a folder with another name.
        """
        step = step_of(self.path)
        if step is None:
            raise ValueError(f"{self.path}: not a checkpoint's name; allowed: one such as {step_name(1000)}")
        return step

    @property
    def is_whole(self) -> bool:
        """Whether the save was finished. `damage` tells whether the files are still intact."""
        return (self.path / _COMMIT).is_file()

    @property
    def hash(self) -> str:
        """The fingerprint of the contents: sha256 over the sha256 of the files."""
        return (self.path / _COMMIT).read_text(encoding="utf-8").strip()

    @property
    def state(self) -> dict[str, Any]:
        """The trainer's record, with `step`, `format` and `optimizer_steps`.

        Raises:
            ValueError: if the file is damaged, or written by a newer release.
        """
        file = self.path / _STATE
        state = _read_object(file)
        missing = [key for key in ("format", "step", "optimizer_steps") if type(state.get(key)) is not int]
        if missing:
            raise ValueError(f"{file}: no whole number under {', '.join(missing)}; the file is damaged")
        if state["format"] > FORMAT:
            raise ValueError(
                f"{self.path}: checkpoint format {state['format']}; this release of sfd-scale reads up to {FORMAT}: "
                "update it"
            )
        return state

    @property
    def parts(self) -> list[str]:
        """The stored parts: `model`, Adam's moments, `ema` and its power-function averages."""
        parts = self.state.get("parts")
        return list(PART_OF[name] for name in ("params", "exp_avg", "exp_avg_sq", "ema")) if parts is None else parts

    def checksums(self) -> dict[str, dict[str, Any]]:
        """File name → {"sha256", "bytes"}, after a check of the list itself against COMMIT.

        Raises:
            CheckpointError: if the list was changed.
        """
        text = (self.path / _CHECKSUMS).read_bytes()
        if hashlib.sha256(text).hexdigest() != self.hash:
            raise CheckpointError(f"{self.path}: {_CHECKSUMS} is not the file that was committed")
        listing = json.loads(text)
        for name in listing:
            if Path(name).name != name or name in (".", ".."):
                raise CheckpointError(f"{self.path}: {_CHECKSUMS} names {name!r}, which leads out of the folder")
        return listing

    def damage(self, share: slice = slice(None), read: Callable[[int], None] | None = None) -> str | None:
        """A description of the damage to a finished save; None if the files are as they were written.

        Args:
            share: which files to check; ranks share them out.
            read: see `sha256`.
        """
        try:
            for name, expected in sorted(self.checksums().items())[share]:
                path = self.path / name
                if not path.is_file():
                    return f"{name} is missing"
                if path.stat().st_size != expected["bytes"]:
                    return f"{name} has {path.stat().st_size} bytes of {expected['bytes']}"
                if sha256(path, read) != expected["sha256"]:
                    return f"{name} has changed since it was written"
        except (OSError, ValueError, KeyError, TypeError, RecursionError, CheckpointError) as error:
            return error_text(error)
        return None

    def weights(self, weights: Weights = "ema") -> dict[str, Tensor]:
        """Full fp32 weights, or Adam's moments, by parameter name.

        Raises:
            ValueError: if this is no whole checkpoint, is damaged, or is of a newer release.
        """
        if not self.is_whole:
            raise ValueError(f"{self.path}: not a whole checkpoint (no {_COMMIT} in it)")
        return self.tensors(PART_OF[weights])

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Full fp32 tensors of one part, by parameter name.

        Raises:
            ValueError: if the checkpoint is damaged, of a newer release, or has no such part.
        """
        name, prefix, stored_parts = self.path.name, f"{part}.", self.parts
        size = sum(file.stat().st_size for file in self.path.iterdir() if file.is_file())
        with progress(size // MB, f"check {name}", "MB") as bar:
            wrong = self.damage(read=bar.advance_bytes)
        if wrong:
            raise ValueError(f"{self.path}: damaged checkpoint: {wrong}")
        stored = shapes(read_metadata(self.path))
        tensors = {name: torch.empty(shape) for name, shape in stored.items() if name.startswith(prefix)}
        if not tensors:
            raise ValueError(f"{self.path}: holds no {part!r}; it holds {', '.join(stored_parts)}")
        with progress(sum(t.nbytes for t in tensors.values()) // MB, f"read {name}", "MB") as bar:
            for group in _groups(tensors):
                with warnings.catch_warnings(), as_checkpoint_error(f"{self.path} cannot be read"):
                    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # due to no_dist
                    load(group, storage_reader=SafeReader(self.path), no_dist=True)
                bar.advance_bytes(sum(t.nbytes for t in group.values()))
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    def move_aside(self) -> None:
        """Rename the folder, if it exists, to a name that no load sees. It is kept for the user."""
        if self.path.exists():
            numbered = (self.path.with_name(f"{self.path.name}.aside-{n}") for n in range(1, 1000))
            aside = next(path for path in numbered if not path.exists())
            logger.warning("%s exists; kept as %s", self.path, aside.name)
            os.replace(self.path, aside)

    def mark_deleted(self) -> None:
        """Rename the folder first, so that a kill during the removal leaves nothing that looks like a checkpoint."""
        os.replace(self.path, free_path(self.path.with_name(f"{self.path.name}.deleted")))


def require_listing(root: Path) -> None:
    """Check that a folder of checkpoints, which may be missing, can be listed. `glob` finds nothing in any other one.

    Raises:
        OSError: if it is a file, a link that leads nowhere, or not readable.
    """
    if os.path.lexists(root):
        os.listdir(root)


def whole_checkpoints(root: Path) -> list[Checkpoint]:
    """The whole checkpoints below `root`, oldest first."""
    found = [Checkpoint(path) for path in root.glob("step-*") if step_of(path) is not None]
    return sorted((checkpoint for checkpoint in found if checkpoint.is_whole), key=lambda checkpoint: checkpoint.step)


def unfinished(root: Path) -> list[Path]:
    """Folders below `root` that look like checkpoints and are not whole, except those that were set aside."""
    whole = {checkpoint.path for checkpoint in whole_checkpoints(root)}
    return [path for path in sorted(root.glob("step-*")) if path not in whole and ".aside-" not in path.name]


# ------------------------------------------------------------------------------------------------- writing


def new_partial(final: Path) -> Path:
    """A new folder, in which a checkpoint is written before it gets its name."""
    partial = free_path(final.with_name(f"{final.name}.tmp"))
    partial.mkdir(parents=True)
    return partial


def commit(
    checkpoint: Checkpoint, partial: Path, state: Mapping[str, Any], sums: Mapping[str, Mapping[str, Any]], *,
    replace: bool,
) -> None:  # fmt: skip
    """Turn the folder `partial` into a whole checkpoint.

    Args:
        sums: the `fingerprint` of each tensor file.
        replace: delete a whole checkpoint of this step; otherwise it is moved aside.
    """
    final = checkpoint.path
    _write_synced(partial / _STATE, json.dumps(state, indent=1, sort_keys=True))
    sums = {**{name: fingerprint(partial / name) for name in (".metadata", _STATE)}, **sums}
    listing = json.dumps(sums, indent=1, sort_keys=True)
    _write_synced(partial / _CHECKSUMS, listing)
    _sync_folder(partial)
    if replace and checkpoint.is_whole:
        checkpoint.mark_deleted()
    else:
        checkpoint.move_aside()
    os.replace(partial, final)
    _sync_folder(final.parent)
    _write_synced(final / _COMMIT, hashlib.sha256(listing.encode()).hexdigest() + "\n")
    _sync_folder(final)


def remove_leftovers(root: Path) -> None:
    """Delete unfinished saves, and checkpoints that are marked as deleted."""
    for leftover in [*root.glob("step-*.deleted"), *root.glob("step-*.tmp")]:
        remove(leftover)


def fingerprint(path: Path) -> dict[str, Any]:
    """Checksum and size of a file, as in checksums.json."""
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Make renames and new files in a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_object(path: Path) -> dict[str, Any]:
    data = read_json(path)
    if not isinstance(data, dict):
        raise ValueError(f"{path}: a {type(data).__name__} where an object should be")
    return data


def _groups(tensors: Mapping[str, Tensor], most: int = 1 << 29) -> Iterator[dict[str, Tensor]]:
    """Groups of about `most` bytes, so that the progress bar moves between them."""
    group: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        group[name] = tensor
        if sum(t.nbytes for t in group.values()) >= most:
            yield group
            group = {}
    if group:
        yield group
