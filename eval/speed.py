"""The settings of an evaluation that are slow on a machine, with the key that changes each."""

from __future__ import annotations

import torch

from eval.recipe import EvalRecipe
from sfd_scale.diffusion.adaptive import Dopri5Config
from sfd_scale.runtime.device import fast_bf16


def slow_settings(recipe: EvalRecipe, device: torch.device) -> list[str]:
    """A sentence for each setting that costs speed on this device, with the key that changes it."""
    if device.type != "cuda":
        slow = recipe.precision == "bf16" and not fast_bf16(device)
        return ["precision: bf16 is emulated on this CPU; precision=fp32"] if slow else []
    found = []
    if not recipe.compile:
        found.append("compile: false launches a kernel for each small operation; compile=true")
    if recipe.precision != "bf16":
        found.append(f"precision: {recipe.precision}, as in the official code; precision=bf16 is faster")
    if isinstance(recipe.sampler, Dopri5Config):
        found.append("sampler.kind: dopri5, as in the official code; the recipes in _fast take a fixed-step solver")
    if recipe.attention == "math":
        found.append("attention: math is plain matrix products; attention=auto")
    return found
