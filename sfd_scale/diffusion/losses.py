"""Losses of single samples.

N batch · C channels · H, W latent grid · T tokens · D feature channels.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn.functional import cosine_similarity

AlignmentMode = Literal["cos", "mse", "cos_mse"]


def velocity_loss(predicted: Tensor, target: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Mean over (C, H, W) of weight·(predicted − target)² (arXiv 2512.04926): (N,).

    The weight (broadcastable, such as 2 on the semantic channels) does not enter the divisor.
    """
    return (weight * (predicted - target).square()).flatten(1).mean(1)


def cosine_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean over (H, W) of 1 − cosine over the channels (arXiv 2410.10356): (N,).

    Where the output is exactly zero, as a last layer that starts at zero gives it, the gradient is a unit vector over
    1e-8, PyTorch's smallest length: the first step of a run is millions of times the others, unless it is clipped.
    """
    return (1 - cosine_similarity(predicted, target, dim=1)).flatten(1).mean(1)


def alignment_loss(projected: Tensor, features: Tensor, mode: AlignmentMode) -> Tensor:
    """How far tokens are from the features of the clean image (REPA, arXiv 2410.06940): (N,).

    Args:
        projected: (N, T, D) of the model's alignment head.
        features: (N, D, H, W) with H·W = T, in the same row order as the tokens.
        mode: `cos` is the mean over tokens of 1 − cosine, `mse` the mean square, `cos_mse` the mean of both.

    Raises:
        ValueError: if the shapes do not fit.
    """
    tokens = features.flatten(2).transpose(1, 2)  # (N, T, D)
    if tokens.shape != projected.shape:
        raise ValueError(
            f"alignment features are {tuple(tokens.shape)} (samples, tokens, channels), the model's alignment head "
            f"gives {tuple(projected.shape)}; set the head's dim and the patch size to the vision encoder of the data"
        )
    cosine = (1 - cosine_similarity(projected, tokens, dim=-1)).mean(1)
    if mode == "cos":
        return cosine
    square = (projected - tokens).square().flatten(1).mean(1)
    return square if mode == "mse" else (cosine + square) / 2
