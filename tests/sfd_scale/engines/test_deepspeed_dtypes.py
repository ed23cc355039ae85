"""Why norm weights are bf16 under DeepSpeed: it keeps buffers in float32 on request, and no parameters.

If this fails, DeepSpeed can keep parameters too, and engines/deepspeed.py should do as engines/fsdp.py does.
"""

from __future__ import annotations

import torch
from torch import nn

from sfd_scale.engines.build_ops import use_own_builds
from sfd_scale.engines.deepspeed import DeepSpeedConfig, deepspeed_json
from sfd_scale.engines.engine import ensure_group
from sfd_scale.models.layers import RMSNorm
from sfd_scale.runtime import environment


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = RMSNorm(8), nn.Linear(8, 8)
        self.register_buffer("norm_buffer", torch.full((8,), 1 / 3))


def test_deepspeed_casts_the_parameters_that_it_is_asked_to_keep() -> None:
    ensure_group()
    use_own_builds()
    import deepspeed

    environment.set_default("LOCAL_RANK", "0")
    settings = deepspeed_json(DeepSpeedConfig(zero_stage=1))
    settings["data_types"] = {"keep_in_fp32_modules": ["norm"], "buffer_dtype": "bf16"}
    model = Normed()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    try:
        assert model.norm_buffer.dtype == torch.float32  # the setting acts
        assert model.norm.weight.dtype == model.out.weight.dtype == torch.bfloat16
    finally:
        engine.destroy()
