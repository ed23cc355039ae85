"""One set of weights from a file, safetensors or torch, without running anything in it."""

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
    """Names without what wrappers put in front of them."""
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
    """One flat set of weights, from safetensors or from a torch file: bare, or under one of the names that scripts give
    it (`_WEIGHTS`; the authors' training of a semantic VAE writes model_state_dict).

    Only names that start with one of `prefixes` are kept.

    Raises:
        ValueError: that names the file, if it cannot be read or holds no such set.
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
    raise ValueError(f"{path} holds no set of weights, neither bare nor under {', '.join(_WEIGHTS)}")
