"""The straight path from noise to data (flow matching, arXiv 2210.02747; rectified flow, arXiv 2209.03003)."""

from __future__ import annotations

from torch import Tensor


def interpolate(noise: Tensor, data: Tensor, t: Tensor) -> Tensor:
    """x_t = t·data + (1 − t)·noise (arXiv 2209.03003, Eq. 1): (N, C, H, W), t broadcastable to it."""
    return t * data + (1 - t) * noise


def predicted_data(x: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """The data to which a velocity leads from x_t: x_t + (1 − t)·velocity (N, C, H, W), t broadcastable to it."""
    return x + (1 - t) * velocity


def velocity(noise: Tensor, data: Tensor) -> Tensor:
    """dx_t/dt = data − noise, the same at every t (arXiv 2209.03003, Eq. 1): (N, C, H, W)."""
    return data - noise
