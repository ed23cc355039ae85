"""Weights of a checkpoint as one safetensors file, without ranks or an engine."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load

from sfd_scale.checkpoint.boxes import PARAMS_PART
from sfd_scale.checkpoint.folder import (
    Reader,
    check_same_model,
    checkpoint_hash,
    committed,
    damage,
    one_error,
    parts_of,
    read_metadata,
    read_state,
    shapes,
)
from sfd_scale.engines import ema
from sfd_scale.runtime.files import atomically
from sfd_scale.runtime.progress import MB, progress

Weights = Literal["ema", "params", "exp_avg", "exp_avg_sq"]
_PART: dict[str, str] = {
    "ema": ema.PART,
    "params": PARAMS_PART,
    "exp_avg": "optim.exp_avg",
    "exp_avg_sq": "optim.exp_avg_sq",
}


def load_weights(path: Path, weights: Weights = "ema") -> dict[str, Tensor]:
    """Full fp32 weights, or Adam's moments, by name, from a checkpoint folder or from an exported safetensors file.

    Raises:
        ValueError: where the path is neither, or the checkpoint is damaged or of a newer release.
    """
    if path.is_file() and path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: damaged, or not a safetensors file: {error}") from error
    if not (path / "COMMIT").is_file():
        raise ValueError(f"{path}: neither a committed checkpoint folder nor a .safetensors file")
    return load_part(path, _PART[weights])


def load_part(path: Path, part: str) -> dict[str, Tensor]:
    """Full fp32 tensors of one part of a checkpoint folder, by parameter name.

    Raises:
        ValueError: where it is damaged, of a newer release, or has no such part.
    """
    read_state(path)
    prefix = f"{part}."
    stored = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    with progress(stored // MB, f"check {path.name}", "MB") as bar:
        wrong = damage(path, slice(None), bar.advance_bytes)
    if wrong:
        raise ValueError(f"{path}: damaged checkpoint: {wrong}")
    named = shapes(read_metadata(path))
    tensors: dict[str, Tensor] = {name: torch.empty(shape) for name, shape in named.items() if name.startswith(prefix)}
    if not tensors:
        raise ValueError(f"{path}: holds no {part!r}; it holds {', '.join(parts_of(path))}")
    with progress(sum(t.nbytes for t in tensors.values()) // MB, f"read {path.name}", "MB") as bar:
        for group in _groups(tensors):
            with warnings.catch_warnings(), one_error(f"{path} cannot be read"):
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # what no_dist asks for
                load(group, storage_reader=Reader(path), no_dist=True)
            bar.advance_bytes(sum(t.nbytes for t in group.values()))
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _groups(tensors: Mapping[str, Tensor], most: int = 1 << 29) -> Iterator[dict[str, Tensor]]:
    """Tensors of about `most` bytes at a time, so that a bar can move between."""
    group: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        group[name] = tensor
        if sum(t.nbytes for t in group.values()) >= most:
            yield group
            group = {}
    if group:
        yield group


def start_weights(path: Path, weights: Weights, model: nn.Module) -> dict[str, Tensor]:
    """The weights of another run for a model of the same architecture; moments and step count stay behind.

    Args:
        path: a run folder (its newest checkpoint), a checkpoint folder, or an exported file.

    Raises:
        ValueError: naming the tensors that differ; see also `load_weights`.
    """
    if (path / "checkpoints").is_dir():
        whole = committed(path / "checkpoints")
        if not whole:
            raise ValueError(f"{path}: no whole checkpoint in it")
        path = whole[-1]
    if path.suffix == ".safetensors" and path.is_file():
        with safe_open(str(path), "pt") as file:
            held = (file.metadata() or {}).get("weights", weights)
        if held != weights:
            raise ValueError(f"{path}: holds the weights {held!r}, not {weights!r}; set init_from.weights={held}")
    found = load_weights(path, weights)
    expected = {name: tuple(param.shape) for name, param in model.named_parameters()}
    check_same_model({name: tuple(tensor.shape) for name, tensor in found.items()}, expected)
    return found


def export_weights(
    checkpoint: Path, out: Path, weights: Weights = "ema", metadata: Mapping[str, str] | None = None
) -> Path:
    """Write the averaged (or the raw) weights to `out`, a safetensors file with the model's state-dict names.

    Its metadata holds the checkpoint's hash, `weights`, every text and number of the checkpoint's state (step, recipe
    digest, hash of the latent statistics, …) and `metadata`.

    Raises:
        ValueError: see `load_weights`; or where `out` is not named .safetensors.
    """
    tensors = load_weights(checkpoint, weights)
    state = {key: str(value) for key, value in read_state(checkpoint).items() if isinstance(value, str | int | float)}
    notes = {**state, "checkpoint_sha256": checkpoint_hash(checkpoint), "weights": weights, **(metadata or {})}
    return save_weights(tensors, out, notes)


def save_weights(tensors: Mapping[str, Tensor], out: Path, metadata: Mapping[str, str]) -> Path:
    """Write a safetensors file, whole or not at all.

    Raises:
        ValueError: where `out` is not named .safetensors, or the disk is full.
    """
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: the name of an export ends in .safetensors")
    with atomically(out) as partial:
        save_file(dict(tensors), partial, metadata=dict(metadata))
    return out
