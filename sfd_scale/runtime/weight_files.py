"""Reads weights from a safetensors file or a torch file, without executing pickled code; writes safetensors files."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sfd_scale.runtime.file_kind import file_error, require_kind
from sfd_scale.runtime.old_torch_file import OldTorchFile
from sfd_scale.runtime.torch_file import LazyTensor, TorchFile

State = dict[str, Tensor]
_CHECKSUM = "crc32 "  # before the name of a tensor, in the metadata


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """The open file of `safetensors.safe_open`, for the CPU.

    Raises:
        ValueError: names the file and says what it is, if it is no safetensors file, is damaged, or lacks a tensor that
            is asked for.
    """
    require_kind(path, "safetensors")
    try:
        file = safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(file_error(path, "safetensors", error)) from error
    with file as opened:
        try:
            yield opened
        except SafetensorError as error:
            raise ValueError(f"{path}: {error}") from error


def read_safetensors(path: Path) -> State:
    """All tensors of a safetensors file, on the CPU. Errors are those of `open_safetensors`."""
    with open_safetensors(path) as file:
        return {name: read_tensor(path, file, name) for name in file.keys()}  # noqa: SIM118 - not a mapping


def read_tensor(path: Path, file: Any, name: str) -> Tensor:
    """A tensor of an open file, compared with its checksum. Only files of `safetensors_bytes` have one.

    Raises:
        ValueError: if the tensor is not as it was written.
    """
    tensor: Tensor = file.get_tensor(name)
    written = (file.metadata() or {}).get(_CHECKSUM + name)
    if written is not None and written != _checksum(tensor):
        raise ValueError(
            f"{path} is damaged: {name} has another checksum than when it was written; remove the file and run the "
            "same command again, which computes it anew"
        )
    return tensor


def _checksum(tensor: Tensor) -> str:
    """CRC-32 of a tensor's bytes."""
    return str(zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data))


def safetensors_metadata(path: Path) -> dict[str, str]:
    """The texts in the header of a safetensors file. Errors are those of `open_safetensors`."""
    with open_safetensors(path) as file:
        return file.metadata() or {}


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The contents of a safetensors file, with a checksum of each tensor, which is contiguous and on the CPU.

    Equal tensors and metadata give equal bytes.
    """
    sums = {_CHECKSUM + name: _checksum(tensor) for name, tensor in tensors.items()}
    data = save(dict(tensors), {**(metadata or {}), **sums})
    start = 8 + int.from_bytes(data[:8], "little")
    return data[:8] + sorted_header(data[8:start]) + data[start:]


def sorted_header(header: bytes) -> bytes:
    """The JSON header of a safetensors file with its metadata in alphabetical order, and of the same length.

    The library writes them in the order of a hash table, so that each file of the same tensors has other bytes.
    """
    values = json.loads(header)
    values = {"__metadata__": dict(sorted(values.pop("__metadata__").items())), **values}
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode()
    assert len(text) <= len(header), "the same header in another order"
    return text.ljust(len(header))


_PREFIXES = ("module.", "_orig_mod.")


def strip_prefixes(state: Mapping[str, Any]) -> dict[str, Any]:
    """Remove the name prefixes of DistributedDataParallel and torch.compile.

    Raises:
        ValueError: if two names become equal.
    """
    out: dict[str, Any] = {}
    for name, value in state.items():
        bare = name
        while bare.startswith(_PREFIXES):
            bare = bare.split(".", 1)[1]
        if bare in out:
            raise ValueError(f"{bare} occurs twice, with and without a prefix")
        out[bare] = value
    return out


_WEIGHTS = ("state_dict", "model_state_dict", "ema", "model")


def read_weights(path: Path, prefixes: tuple[str, ...] = ("",)) -> State:
    """Read a state dict from a safetensors or torch file. The content of the file decides, not its name.

    In a torch file it is the whole content, or below a usual key (`_WEIGHTS`; the official semantic VAE training writes
    model_state_dict).

    Args:
        prefixes: keep only names that start with one of these.

    Raises:
        ValueError: names the file, if it cannot be read or holds no state dict.
    """
    kind = require_kind(path, "weights")
    if kind == "safetensors":
        return {name: value for name, value in read_safetensors(path).items() if name.startswith(prefixes)}
    file = OldTorchFile(path) if kind == "old torch" else TorchFile(path)
    candidates = [file.content]
    if isinstance(file.content, dict):
        candidates += [file.content[name] for name in _WEIGHTS if name in file.content]
    for candidate in candidates:
        if isinstance(candidate, dict) and candidate and all(isinstance(v, LazyTensor) for v in candidate.values()):
            bare = strip_prefixes(candidate)
            return file.load({name: value for name, value in bare.items() if name.startswith(prefixes)})
    raise ValueError(f"{path} holds no state dict, neither as its content nor under {', '.join(_WEIGHTS)}")
