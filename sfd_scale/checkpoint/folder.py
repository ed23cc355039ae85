"""The folder of one checkpoint: names, what it holds, whether it is whole.

    step-00001000/
        __<rank>_0.distcp, .metadata   torch's distributed checkpoint: fp32 tensors in full shapes
        state.json                     step, format, and what the trainer records
        checksums.json                 sha256 and size of each file above, made by the rank that wrote it
        COMMIT                         sha256 of checksums.json; written last

A folder without COMMIT is not a checkpoint. `step-….tmp` is a save under way or cut off.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum, EnumType
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from sfd_scale.runtime.files import sha256

FORMAT = 1
_TENSORS = re.compile(r"__\d+_\d+\.distcp")
_STEP = re.compile(r"step-(\d{8,})")


class CheckpointError(OSError):
    """A checkpoint is damaged, or could not be written."""


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step of a checkpoint folder; None for any other name."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def committed(root: Path) -> list[Path]:
    """The committed checkpoints below `root`, oldest first."""
    found = [path for path in root.glob("step-*") if step_of(path) is not None and (path / "COMMIT").is_file()]
    return sorted(found, key=lambda path: step_of(path) or 0)


def write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make renames and new files in a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoint_hash(folder: Path) -> str:
    """The identity of a checkpoint's contents: sha256 over the sha256 of its files."""
    return (folder / "COMMIT").read_text().strip()


def read_state(folder: Path) -> dict[str, Any]:
    """What the trainer recorded, with `step`, `format` and `optimizer_steps`.

    Raises:
        ValueError: for a checkpoint of a newer release.
    """
    state = _read_object(folder / "state.json")
    missing = [key for key in ("format", "step", "optimizer_steps") if type(state.get(key)) is not int]
    if missing:
        raise ValueError(f"{folder / 'state.json'}: no whole number under {', '.join(missing)}; the file is damaged")
    if state["format"] > FORMAT:
        raise ValueError(
            f"{folder}: checkpoint format {state['format']}; this release of sfd-scale reads up to {FORMAT}: update it"
        )
    return state


def _read_object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: a {type(data).__name__} where an object should be")
    return data


def checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """File name → {"sha256", "bytes"}, after checking the list itself against COMMIT.

    Raises:
        CheckpointError: where the list was changed.
    """
    text = (folder / "checksums.json").read_bytes()
    if hashlib.sha256(text).hexdigest() != checkpoint_hash(folder):
        raise CheckpointError(f"{folder}: checksums.json is not the file that was committed")
    listing = json.loads(text)
    for name in listing:
        if Path(name).name != name or name in (".", ".."):
            raise CheckpointError(f"{folder}: checksums.json names {name!r}, which leads out of the folder")
    return listing


def damage(folder: Path, share: slice, read: Callable[[int], None] | None = None) -> str | None:
    """What is wrong with the files `share` of a committed checkpoint; None where they are as they were written.

    Args:
        read: see `sha256`.
    """
    try:
        for name, expected in sorted(checksums(folder).items())[share]:
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes of {expected['bytes']}"
            if sha256(path, read) != expected["sha256"]:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, KeyError, TypeError, RecursionError, CheckpointError) as error:
        return str(error)
    return None


@contextmanager
def one_error(what: str) -> Iterator[None]:
    """torch's error for a save or load on several ranks is no Exception, which code that goes on after errors misses.

    Raises:
        CheckpointError: with the first rank's cause, on all ranks.
    """
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        raise CheckpointError(f"{what}: rank {rank}: {type(cause).__name__}: {cause}") from error


class _MetadataUnpickler(pickle.Unpickler):
    """torch stores `.metadata` as a pickle, which could run any code. Only the classes it is made of are let in."""

    _METADATA = (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )  # fmt: skip
    _KNOWN = frozenset(
        {
            *(("torch.distributed.checkpoint.metadata", name) for name in _METADATA),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.serialization", "_get_layout"),
            ("torch", "Size"),
            ("torch", "float32"),
            ("pathlib", "PosixPath"),
            ("pathlib._local", "PosixPath"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        known = (module, name) in self._KNOWN
        if not known:
            raise CheckpointError(f".metadata names {module}.{name}, which no checkpoint of ours holds")
        return super().find_class(module, name)


def _member(kind: Any, name: Any) -> Enum:
    """A member of an enumeration, which Python 3.11.2 (Debian 12's) stores as a call of getattr."""
    if not (isinstance(kind, EnumType) and name in kind.__members__):
        raise CheckpointError(f".metadata asks for {name!r} of {kind!r}, which no checkpoint of ours does")
    member: Enum = kind.__members__[name]
    return member


class Reader(FileSystemReader):
    """torch's reader, with `.metadata` read by the unpickler above."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(Path(self.path))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def read_metadata(folder: Path) -> Metadata:
    """What a checkpoint holds, and where.

    Raises:
        CheckpointError: for anything but tensors that lie in files of this folder.
    """
    try:
        with (folder / ".metadata").open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"it holds a {type(metadata).__name__}")
        _check_places(folder, metadata)
    except Exception as error:
        raise CheckpointError(f"{folder}/.metadata cannot be read: {error}") from error
    return metadata


def _check_places(folder: Path, metadata: Metadata) -> None:
    """Every range lies inside a file of the folder, and no tensor is larger than what there is to fill it."""
    lengths: dict[str, int] = {}
    for place in (metadata.storage_data or {}).values():
        name = place.relative_path
        if not isinstance(name, str) or not _TENSORS.fullmatch(name):
            raise CheckpointError(f"it names {name!r}, which is no file of tensors of this folder")
        if name not in lengths:
            lengths[name] = (folder / name).stat().st_size if (folder / name).is_file() else -1
        if lengths[name] >= 0 and not (place.offset >= 0 <= place.length <= lengths[name] - place.offset):
            raise CheckpointError(f"bytes {place.offset} + {place.length} of {name}, which has {lengths[name]}")
    volumes = [math.prod(shape) if min(shape, default=0) >= 0 else -1 for shape in shapes(metadata).values()]
    if -1 not in lengths.values() and (min(volumes, default=0) < 0 or 4 * sum(volumes) > sum(lengths.values())):
        raise CheckpointError(f"tensors of {4 * sum(volumes)} bytes in files of {sum(lengths.values())}")


def shapes(metadata: Metadata) -> dict[str, tuple[int, ...]]:
    """Stored name → full shape."""
    return {
        name: tuple(entry.size)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def parts_of(folder: Path) -> list[str]:
    """The parts that a checkpoint holds: `model`, the moments, `ema` and its power-function averages."""
    parts = read_state(folder).get("parts")
    return ["model", "optim.exp_avg", "optim.exp_avg_sq", "ema"] if parts is None else list(parts)


def check_complete(metadata: Metadata, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare what was just written with what should be there: names, shapes, types, and every element once.

    Raises:
        CheckpointError: naming the tensors that differ.
    """
    wrong = set(expected) ^ set(metadata.state_dict_metadata)
    for name, entry in metadata.state_dict_metadata.items():
        if name in wrong or not isinstance(entry, TensorStorageMetadata):
            wrong.add(name)
            continue
        volume = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
        if (
            tuple(entry.size) != tuple(expected[name])
            or volume != math.prod(entry.size)
            or entry.properties.dtype != torch.float32
        ):
            wrong.add(name)
    if wrong:
        raise CheckpointError(f"the checkpoint just written is not whole: {', '.join(sorted(wrong)[:8])}")


def check_same_model(stored: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a checkpoint of another architecture.

    Raises:
        ValueError: naming the tensors that are missing, unknown or of another shape.
    """
    problems = [f"{name}: not in the checkpoint" for name in sorted(set(expected) - set(stored))]
    problems += [f"{name}: not in the model" for name in sorted(set(stored) - set(expected))]
    problems += [
        f"{name}: {tuple(stored[name])} in the checkpoint, {tuple(expected[name])} in the model"
        for name in sorted(set(stored) & set(expected))
        if tuple(stored[name]) != tuple(expected[name])
    ]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"the checkpoint is of another model: {'; '.join(problems[:8])}{more}")
