"""The losses, one value per sample.

N batch · C channels · H, W latent grid · T tokens · D feature channels.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn.functional import cosine_similarity

AlignmentMode = Literal["cos", "mse", "cos_mse"]


def velocity_loss(predicted: Tensor, target: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Mean over (C, H, W) of weight·(predicted − target)² (arXiv 2512.04926): (N,).

    The mean divides by C·H·W and not by the sum of the weights (broadcastable, such as 2 on the semantic channels).
    """
    return (weight * (predicted - target).square()).flatten(1).mean(1)


def cosine_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean over (H, W) of 1 − cosine over the channels (arXiv 2410.10356): (N,).

    Clip the gradient norm with this loss. A last layer initialised to zero makes `predicted` zero, where the gradient
    is a unit vector divided by PyTorch's eps of 1e-8: millions of times the gradients of later steps.
    """
    return (1 - cosine_similarity(predicted, target, dim=1)).flatten(1).mean(1)


def alignment_loss(projected: Tensor, features: Tensor, mode: AlignmentMode) -> Tensor:
    """Distance of the projected tokens from the features of the clean image (REPA, arXiv 2410.06940): (N,).

    Args:
        projected: (N, T, D), the output of the model's alignment head.
        features: (N, D, H, W) with H·W = T, in the same row order as the tokens.
        mode: `cos` is the mean over tokens of 1 − cosine, `mse` the mean square error, `cos_mse` the mean of both.

    Raises:
        ValueError: if the shapes do not fit.
    """
    tokens = features.flatten(2).transpose(1, 2)  # (N, T, D)
    if tokens.shape != projected.shape:
        raise ValueError(
            f"alignment features have shape {tuple(tokens.shape)} (samples, tokens, channels), but the alignment head "
            f"gives {tuple(projected.shape)}; set the head's dim and patch size to those of the data's vision encoder"
        )
    cosine = (1 - cosine_similarity(projected, tokens, dim=-1)).mean(1)
    if mode == "cos":
        return cosine
    square = (projected - tokens).square().flatten(1).mean(1)
    return square if mode == "mse" else (cosine + square) / 2
