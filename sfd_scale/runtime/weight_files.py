"""Reads weights from a safetensors file or a torch file, without executing pickled code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sfd_scale.runtime.torch_file import LazyTensor, TorchFile

State = dict[str, Tensor]


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
    """Read a state dict from a safetensors or torch file.

    In a torch file it is the whole content, or below a usual key (`_WEIGHTS`; the official semantic VAE training writes
    model_state_dict).

    Args:
        prefixes: keep only names that start with one of these.

    Raises:
        ValueError: names the file, if it cannot be read or holds no state dict.
    """
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        try:
            return {name: value for name, value in load_file(path).items() if name.startswith(prefixes)}
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    file = TorchFile(path)
    candidates = [file.content]
    if isinstance(file.content, dict):
        candidates += [file.content[name] for name in _WEIGHTS if name in file.content]
    for candidate in candidates:
        if isinstance(candidate, dict) and candidate and all(isinstance(v, LazyTensor) for v in candidate.values()):
            bare = strip_prefixes(candidate)
            return file.load({name: value for name, value in bare.items() if name.startswith(prefixes)})
    raise ValueError(f"{path} holds no state dict, neither as its content nor under {', '.join(_WEIGHTS)}")
