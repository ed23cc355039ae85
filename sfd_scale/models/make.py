"""Settings of a model → the model, without weights."""

from __future__ import annotations

from typing import Any

from sfd_scale.diffusion.latents import LatentLayout
from sfd_scale.diffusion.schedule import SemanticFirstSchedule
from sfd_scale.models.lightningdit import LightningDiT, LightningDiTConfig
from sfd_scale.models.semantic_vae import SemanticVAE, SemanticVAEConfig
from sfd_scale.toy.convnet import SmallConvNet, SmallConvNetConfig


def bare_model(settings: Any, layout: LatentLayout, schedule: SemanticFirstSchedule) -> Any:
    match settings:
        case LightningDiTConfig():
            return LightningDiT(
                settings,
                in_channels=layout.channels,
                input_size=layout.size,
                two_clocks=not schedule.synchronous,
            )
        case SemanticVAEConfig():
            return SemanticVAE(settings)
        case SmallConvNetConfig():
            return SmallConvNet(settings)
    raise AssertionError(settings)
