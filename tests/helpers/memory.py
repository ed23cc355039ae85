"""Measure the memory of the real engines on each rank: bytes of all live tensors, by purpose."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sfd_scale.engines import fsdp
from sfd_scale.engines.ema import EMA, EMAConfig
from sfd_scale.engines.engine import Engine
from sfd_scale.engines.muon import MuonConfig
from sfd_scale.engines.optim import AdamWConfig
from sfd_scale.models.lightningdit import LightningDiT, LightningDiTConfig
from sfd_scale.runtime import distributed
from tests.helpers.tiny import Spec, make_engine

# Two million parameters. The ranks do not divide width and depth, so that shards are padded.
CONFIG = LightningDiTConfig(depth=5, width=144, heads=3, num_classes=10)
SIDE, CHANNELS = 4, 48


def model() -> LightningDiT:
    made = LightningDiT(CONFIG, in_channels=CHANNELS, input_size=SIDE, two_clocks=True)
    made.init_weights(0)
    return made


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address → bytes of the storages of tensors on the CPU."""
    found = {}
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.device.type == "cpu" and local.layout == torch.strided:
            storage = local.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
    return found


def alive() -> dict[int, int]:
    """Storages of all tensors that Python can reach."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
    return storages([*tensors, *[t.grad for t in tensors if t.is_leaf and t.grad is not None]])


def held_bytes(engine: Engine, ema: EMA) -> dict[str, int]:
    """Bytes on this rank: master weights, Adam's moments, averages, and all tensors of the process."""
    fragments = engine.fragments()
    return {
        "masters": sum(storages(f.param for f in fragments).values()),
        "moments": sum(storages(t for f in fragments for t in (f.exp_avg, f.exp_avg_sq) if t is not None).values()),
        "averages": sum(storages(t for ts in ema.averages.values() for t in ts).values()),
        "all": sum(alive().values()),
    }


class Peak(TorchDispatchMode):
    """The most bytes that tensors made in it take at one time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live, self.now, self.bytes = dict[int, int](), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)}
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and not isinstance(tensor, DTensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self.live:
                    self.live[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.bytes = max(self.bytes, self.now)
                    weakref.finalize(storage, self._freed, storage._cdata)
        return output

    def _freed(self, key: int) -> None:
        self.now -= self.live.pop(key)


def one_step(engine: Engine, mode: Any) -> None:
    """A step of the engine, whose update runs in `mode`."""
    t, y = torch.full((2,), 0.5), torch.zeros(2, dtype=torch.long)
    velocity, _ = engine.model(torch.ones(2, CHANNELS, SIDE, SIDE), t, t, y)
    engine.backward(velocity.square().mean(), last=True)
    del velocity
    with mode:
        engine.step(1e-4)


def measure(spec: Spec, optimizer: AdamWConfig | MuonConfig) -> dict[str, int]:
    """Bytes on this rank: params, optimizer (fp32 master weights, moments), ema, and gradients before the step."""
    before = alive()
    engine = make_engine(spec, model(), optimizer)
    whole = alive()
    params = storages(_weights(engine.model))
    masters = storages([t for f in engine.fragments() for t in (f.param, f.exp_avg, f.exp_avg_sq) if t is not None])
    ema = EMA(engine.fragments(), EMAConfig())
    x = torch.zeros(2, CHANNELS, SIDE, SIDE)
    t, y = torch.full((2,), 0.5), torch.zeros(2, dtype=torch.long)
    held = alive()  # with the inputs, which are no gradients
    for last in (False, True):
        velocity, _ = engine.model(x, t, t, y)
        engine.backward(velocity.square().mean(), last=last)
        del velocity
    # ZeRO-3 allocates gradients at the start, the other engines in the first backward pass.
    gradients = {k: v for k, v in whole.items() if k not in before and k not in params and k not in masters}
    gradients |= {k: v for k, v in alive().items() if k not in held}
    out = {
        "params": sum(params.values()),
        "optimizer": sum(size for key, size in masters.items() if key not in params),
        "ema": sum(storages(ema.tensors).values()),
        "gradients": sum(gradients.values()) - sum(storages(list(engine.model.buffers())).values()),
    }
    engine.step(1e-4)
    engine.close()
    return out


def _weights(wrapped: nn.Module) -> list[Tensor]:
    """The weights that forward uses: whole, or this rank's shard."""
    out: list[Tensor] = []
    for p in wrapped.parameters():
        part = getattr(p, "ds_tensor", None)
        out += [p.detach(), *([] if part is None else [part])]
    return out


def count() -> int:
    return sum(p.numel() for p in model().parameters())


def run(specs: list[Spec], optimizer: AdamWConfig | MuonConfig) -> list[dict[str, int]]:
    distributed.init()
    return [measure(spec, optimizer) for spec in specs]


def update_peak(spec: Spec) -> int:
    """Bytes that an update by Muon takes beside the state."""
    engine = make_engine(spec, model(), MuonConfig())
    one_step(engine, Peak())
    peak = Peak()
    one_step(engine, peak)
    engine.close()
    return peak.bytes


def under_fake_ranks(world_size: int) -> dict[str, int]:
    """Measure rank 0 of many under FSDP2, with torch's fake process group."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    # The fake group returns this rank's values for all ranks, so that the fragments do not cover the parameters.
    fsdp.check_fragments = lambda *arguments: None
    return measure(Spec("fsdp", {"precision": "bf16"}), AdamWConfig())
