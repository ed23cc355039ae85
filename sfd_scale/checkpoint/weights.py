"""Weights as one safetensors file, read and written without ranks or an engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from sfd_scale.checkpoint.folder import Checkpoint, Weights, whole_checkpoints
from sfd_scale.checkpoint.metadata import check_same_model
from sfd_scale.runtime.files import atomically
from sfd_scale.runtime.run_paths import RunPaths
from sfd_scale.runtime.weight_files import read_safetensors, safetensors_metadata, sorted_header

WEIGHTS = "model.safetensors"  # the weights in a folder for the Hugging Face hub


def load_weights(path: Path, weights: Weights = "ema") -> dict[str, Tensor]:
    """Full fp32 weights, or Adam's moments, by parameter name.

    Args:
        path: the folder of a checkpoint, or an exported safetensors file.

    Raises:
        ValueError: if the path is neither, or the checkpoint is damaged or of a newer release.
    """
    if path.is_file():
        return read_safetensors(path)
    if not Checkpoint(path).is_whole:
        raise ValueError(f"{path}: neither the folder of a whole checkpoint nor a .safetensors file")
    return Checkpoint(path).weights(weights)


def start_weights(path: Path, weights: Weights, model: nn.Module) -> dict[str, Tensor]:
    """The weights of another run for a model of the same architecture. Moments and step count are not taken.

    Args:
        path: a run folder (its newest checkpoint), the folder of a checkpoint, an exported file, or a folder with it.

    Raises:
        ValueError: naming the tensors that differ; see also `load_weights`.
    """
    run = RunPaths(path)
    if run.checkpoints_folder.is_dir():
        whole = whole_checkpoints(run.checkpoints_folder)
        if not whole:
            raise ValueError(f"{path}: no whole checkpoint in it")
        path = whole[-1].path
    elif (path / WEIGHTS).is_file():
        path /= WEIGHTS
    if path.is_file():
        stored = safetensors_metadata(path).get("weights", weights)
        if stored != weights:
            raise ValueError(f"{path}: holds the weights {stored!r}, not {weights!r}; set init_from.weights={stored}")
    found = load_weights(path, weights)
    expected = {name: tuple(param.shape) for name, param in model.named_parameters()}
    check_same_model({name: tuple(tensor.shape) for name, tensor in found.items()}, expected)
    return found


def load_whole(model: nn.Module, weights: Mapping[str, Tensor], where: Path) -> None:
    """Load weights of `load_weights`, which have no buffers, into a model.

    Args:
        where: the file or folder that they are from, for the error.

    Raises:
        ValueError: if weights are missing, unexpected, or of other shapes.
    """
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{where}: its weights do not fit the model of the recipe: {error}") from error
    missing = [name for name in missing if name not in dict(model.named_buffers())]
    if missing or unexpected:
        raise ValueError(
            f"{where}: not of the recipe's model: missing weights {missing[:4]}, unexpected {unexpected[:4]}"
        )


def export_weights(checkpoint: Checkpoint, out: Path, weights: Weights, metadata: Mapping[str, str]) -> Path:
    """Write the weights of a checkpoint to `out`, a safetensors file with the names of the model's state_dict.

    The metadata of the file has the hash of the checkpoint, `weights`, every text and number of the checkpoint's state
    (step, hash of the latent statistics, …) and `metadata`.

    Raises:
        ValueError: see `load_weights`; or if `out` is not named .safetensors.
    """
    tensors = checkpoint.weights(weights)
    state = {key: str(value) for key, value in checkpoint.state.items() if isinstance(value, str | int | float)}
    return save_weights(tensors, out, {**state, "checkpoint_sha256": checkpoint.hash, "weights": weights, **metadata})


def save_weights(tensors: Mapping[str, Tensor], out: Path, metadata: Mapping[str, str]) -> Path:
    """Write a safetensors file, whole or not at all. Equal tensors and metadata give equal bytes.

    Raises:
        ValueError: if `out` is not named .safetensors, or the disk is full.
    """
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: the name of an export ends in .safetensors")
    with atomically(out) as partial:
        save_file(dict(tensors), partial, metadata=dict(metadata))
        with partial.open("r+b") as file:
            size = int.from_bytes(file.read(8), "little")
            header = file.read(size)
            file.seek(8)
            file.write(sorted_header(header))
    return out
