"""`.metadata` of torch's distributed checkpoints: names, shapes and places of tensors, read without running code."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum, EnumType
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from sfd_scale.runtime.safe_pickle import SafeUnpickler

_TENSOR_FILE = re.compile(r"__\d+_\d+\.distcp")


class CheckpointError(OSError):
    """A checkpoint is damaged or could not be written."""


@contextmanager
def as_checkpoint_error(what: str) -> Iterator[None]:
    """Turn torch's CheckpointException, which `except Exception` does not catch, into a CheckpointError.

    Raises:
        CheckpointError: on all ranks, with the cause of the first rank that failed.
    """
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        raise CheckpointError(f"{what}: rank {rank}: {type(cause).__name__}: {cause}") from error


class _MetadataUnpickler(SafeUnpickler):
    """Unpickles the classes of `.metadata` and nothing else: a pickle could run any code."""

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
            return _enum_member
        if (module, name) not in self._KNOWN:
            raise CheckpointError(f".metadata names {module}.{name}, which is in no checkpoint of sfd-scale")
        return getattr(importlib.import_module(module), name)


def _enum_member(kind: Any, name: Any) -> Enum:
    """A member of an Enum. Python 3.11.2 (Debian 12) pickles it as a call of getattr."""
    if not (isinstance(kind, EnumType) and name in kind.__members__):
        raise CheckpointError(f".metadata asks for {name!r} of {kind!r}, which is in no checkpoint of sfd-scale")
    member: Enum = kind.__members__[name]
    return member


class SafeReader(FileSystemReader):
    """torch's reader with `read_metadata` in place of its own unpickling."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(Path(self.path))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def read_metadata(folder: Path) -> Metadata:
    """The metadata of the tensors in a folder.

    Raises:
        CheckpointError: if it cannot be read, names other classes, or places tensors outside of the folder's files.
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
    """Check that every range lies inside a file of the folder, and that no tensor is larger than the files."""
    lengths: dict[str, int] = {}
    for place in (metadata.storage_data or {}).values():
        name = place.relative_path
        if not isinstance(name, str) or not _TENSOR_FILE.fullmatch(name):
            raise CheckpointError(f"it names {name!r}, which is no tensor file of this folder")
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


def check_complete(metadata: Metadata, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare a save with the tensors that it should hold: names, shapes, dtypes, and every element once.

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
    """Refuse the checkpoint of another architecture, or of another optimizer.

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
        other = "optimizer" if all(problem.startswith("optim.") for problem in problems) else "model"
        raise ValueError(f"the checkpoint is of another {other}: {'; '.join(problems[:8])}{more}")
