"""The worker of benchmarks/host_time: makes an engine of the checkout in PYTHONPATH, and steps it on request.

It prints `ready` and the folder of the package. Then each line of its input is a number of steps, and its
answer the CPU seconds that they took.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import sfd_scale
from sfd_scale.engines import fsdp
from sfd_scale.engines.block_transforms import prepare_blocks
from sfd_scale.engines.deepspeed import DeepSpeedConfig, make_deepspeed
from sfd_scale.engines.ema import EMA, EMAConfig
from sfd_scale.engines.fsdp import FSDPConfig, make_fsdp
from sfd_scale.engines.optim import AdamWConfig
from sfd_scale.models.lightningdit import LightningDiT, LightningDiTConfig

# As deep as XXL, and so narrow that the arithmetic takes no time. Four tokens.
DEPTH, WIDTH, HEADS, CHANNELS, SIDE = 24, 64, 2, 8, 2
# As `auto` chooses for XXL. It would take all of these small blocks as one unit, and flatten their parameters.
_UNITS = {"blocks_per_unit": 2, "flat_parameters": False}
_FLAT = {"flat_parameters": True}
_SHARDED = {"compile": True, "reshard_after_forward": True, **_UNITS}
RANKS = 8  # of the names with "ranks"
SETTINGS: dict[str, dict[str, Any]] = {
    "fsdp compiled": _SHARDED,
    "fsdp compiled, whole weights": _SHARDED | {"reshard_after_forward": False},
    "fsdp compiled, 8 ranks": _SHARDED,
    "fsdp compiled, whole weights, 8 ranks": _SHARDED | {"reshard_after_forward": False},
    "fsdp compiled, units of 1 block, 8 ranks": _SHARDED | {"blocks_per_unit": 1},
    "fsdp compiled, units of 4 blocks, 8 ranks": _SHARDED | {"blocks_per_unit": 4},
    "fsdp compiled, flat parameters, 8 ranks": _SHARDED | _FLAT,
    "fsdp compiled, flat parameters, units of 4 blocks, 8 ranks": _SHARDED | _FLAT | {"blocks_per_unit": 4},
    "fsdp compiled, flat parameters, whole weights, 8 ranks": _SHARDED | _FLAT | {"reshard_after_forward": False},
    "zero1 compiled, flat parameters": {"compile": True, "zero_stage": 1, **_FLAT},
    "zero2 compiled, flat parameters": {"compile": True, "zero_stage": 2, **_FLAT},
    "fsdp eager": {"reshard_after_forward": True, **_UNITS},
    "zero1 compiled": {"compile": True, "zero_stage": 1, "flat_parameters": False},
    "zero2 compiled": {"compile": True, "zero_stage": 2, "flat_parameters": False},
}


def make_step(name: str) -> Callable[[], None]:
    """One optimizer step on one rank in bf16: forward, backward, norm, AdamW, EMA."""
    config = LightningDiTConfig(depth=DEPTH, width=WIDTH, heads=HEADS)
    model = LightningDiT(config, in_channels=CHANNELS, input_size=SIDE, two_clocks=True)
    model.init_weights(0)
    inputs = (torch.randn(1, CHANNELS, SIDE, SIDE), torch.tensor([0.2]), torch.tensor([0.4]), torch.tensor([1]))
    if name == "no engine, compiled":
        return _plain(model, inputs)
    settings = SETTINGS[name]
    engine: Any
    if name.startswith("fsdp"):
        if "ranks" in name:
            _pretend_ranks()
        engine = make_fsdp(model, AdamWConfig(), FSDPConfig(**_known(FSDPConfig, settings)))
    else:
        engine = make_deepspeed(model, AdamWConfig(), DeepSpeedConfig(**_known(DeepSpeedConfig, settings)))
    ema = EMA(engine.fragments(), EMAConfig())

    def step() -> None:
        engine.backward(engine.model(*inputs)[0].square().mean(), True)
        engine.step(1e-4)
        ema.update(0)

    return step


def _known(config: type[FSDPConfig | DeepSpeedConfig], settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that an engine of this checkout has, which may be an older one."""
    return {key: value for key, value in settings.items() if key in {f.name for f in dataclasses.fields(config)}}


def _pretend_ranks() -> None:
    """Be rank 0 of several, whose collectives send nothing: FSDP2 has another path for one rank.

    The fake group returns this rank's values for all ranks, so that the checks of the start would fail.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    for check in ("check_same_weights", "check_fragments"):
        setattr(fsdp, check, lambda *arguments: None)


def _plain(model: LightningDiT, inputs: tuple[torch.Tensor, ...]) -> Callable[[], None]:
    prepare_blocks(model, "none", compiled=True)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        model(*inputs)[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    torch.set_num_threads(1)
    step = make_step(sys.argv[1])
    for _ in range(5):
        step()
    print(f"ready {Path(sfd_scale.__file__).resolve().parents[1]}", flush=True)
    for line in sys.stdin:
        started = time.process_time()
        for _ in range(int(line)):
            step()
        print(time.process_time() - started, flush=True)


if __name__ == "__main__":
    main()
