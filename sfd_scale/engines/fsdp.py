"""PyTorch's fully sharded data parallelism (FSDP2): full sharding, hybrid sharding and replication."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from sfd_scale.engines.block_transforms import blocks_of, float32_parameters, prepare_blocks, use_float8
from sfd_scale.engines.engine import (
    EngineConfig,
    Fragment,
    StepResult,
    check_fragments,
    check_same_weights,
    describe_fragments,
    ensure_group,
)
from sfd_scale.engines.flat_parameters import FlatParameters, arrange
from sfd_scale.engines.fsdp_units import BlocksPerUnit, units_of
from sfd_scale.engines.muon import LocatedFragment, Muon, MuonConfig, refuse_offload
from sfd_scale.engines.optim import AdamWConfig, create_state, param_groups, set_lr, set_step, step_if_finite
from sfd_scale.engines.replica_check import Replicas
from sfd_scale.runtime import distributed
from sfd_scale.runtime.device import HostCopy


@dataclass(frozen=True, kw_only=True)
class FSDPConfig(EngineConfig):
    """FSDP2 settings.

    sharding: full shards weights, gradients and optimizer state over all ranks. hybrid shards over groups of
        `shard_size` ranks and replicates between groups. replicate is data parallelism without sharding (DDP).
    shard_size: of hybrid sharding; null for the ranks of one node.
    reshard_after_forward: free a block's gathered weights between forward and backward. This saves memory, and sends
        the weights twice per step. `auto`: only where the whole weights would not fit the memory (build.make_engine);
        an engine that is made without that decision frees them.
    blocks_per_unit: blocks whose weights are gathered together; `auto`: by their size, see fsdp_units. It changes no
        result.
    cpu_offload: keep weights, gradients and Adam's moments in host memory.
    float8: compute the matmuls of attention and MLP in float8 (torchao). Needs compute capability 8.9 or newer.
    """

    kind: Literal["fsdp"] = "fsdp"
    sharding: Literal["full", "hybrid", "replicate"] = "full"
    shard_size: int | None = None
    reshard_after_forward: bool | Literal["auto"] = "auto"
    blocks_per_unit: BlocksPerUnit = "auto"
    cpu_offload: bool = False
    float8: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shard_size is not None and (self.sharding != "hybrid" or self.shard_size < 1):
            raise ValueError(f"shard_size: {self.shard_size}; allowed: 1 and up, with sharding hybrid only")
        if self.blocks_per_unit != "auto" and self.blocks_per_unit < 1:
            raise ValueError(f"blocks_per_unit: {self.blocks_per_unit}; allowed: 1 and up, or auto")
        if self.float8 and (self.precision != "bf16" or not self.compile):
            raise ValueError("float8: true; allowed with precision bf16 and compile true, without which it is slower")
        if self.float8 and self.flat_parameters is True:
            raise ValueError("flat_parameters: true; allowed with float8 false: its layers want whole parameters")

    @property
    def can_flatten(self) -> bool:
        return not self.float8


def make_fsdp(model: nn.Module, optimizer: AdamWConfig | MuonConfig, config: FSDPConfig) -> FSDPEngine:
    """Shard an initialised fp32 model. `model.blocks` are gathered in units of neighbouring blocks.

    Raises:
        ValueError: if `shard_size` does not divide the number of ranks, or the weights differ between ranks.
    """
    return FSDPEngine(model, optimizer, config)


def _mesh(config: FSDPConfig, device: torch.device) -> DeviceMesh:
    ranks = distributed.world_size()
    if config.sharding == "full":
        return init_device_mesh(device.type, (ranks,), mesh_dim_names=("shard",))
    size = 1 if config.sharding == "replicate" else config.shard_size or distributed.local_world_size()
    if ranks % size:
        allowed = [n for n in range(1, ranks + 1) if ranks % n == 0]
        raise ValueError(f"engine.shard_size: {size} does not divide {ranks} ranks; allowed here: {allowed}")
    return init_device_mesh(device.type, (ranks // size, size), mesh_dim_names=("replicate", "shard"))


class FSDPEngine:
    """One model under FSDP2 with torch's AdamW on its shards.

    Attributes:
        flat: the parameters of the model in the place of those that FSDP2 knows.
    """

    def __init__(self, model: nn.Module, optimizer: AdamWConfig | MuonConfig, config: FSDPConfig) -> None:
        refuse_offload(optimizer, "cpu_offload", config.cpu_offload)
        ensure_group()
        check_same_weights(model)
        self.config, self.device, self.optimizer_steps = config, distributed.device(), 0
        shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
        if config.float8:
            use_float8(model, self.device)
        prepare_blocks(model, config.activation_checkpointing, config.compile)
        self.mesh = _mesh(config, self.device)
        # One rank in fp32 has nothing to gather, cast or reduce. FSDP2 would copy all weights and gradients.
        alone = distributed.world_size() == 1 and config.precision == "fp32" and not config.cpu_offload
        self.flat = FlatParameters(model) if alone else arrange(model, optimizer, config)
        self._root = None if alone else self._shard(model)
        self._model = model.to(self.device) if alone else model  # fully_shard and .to change the model in place
        self._params = dict(model.named_parameters())
        self._shards = {name: _shard(param) for name, param in self._params.items()}
        self.optimizer = _make_optimizer(model, optimizer, self._shards, self.flat)
        self._updated = self._params if isinstance(self.optimizer, Muon) else self._shards
        create_state(self.optimizer, [(p, group) for group in self.optimizer.param_groups for p in group["params"]])
        self._fragments = self._make_fragments()
        check_fragments(self._fragments, shapes)
        if isinstance(self.optimizer, Muon):
            located = [LocatedFragment(fragment, self._params[fragment.name], 0, 0) for fragment in self._fragments]
            self.optimizer.bind([(param, 0) for param in self._params.values()], located)

    def _shard(self, model: nn.Module) -> FSDPModule:
        bf16 = torch.bfloat16 if self.config.precision == "bf16" else None
        pinned = self.device.type == "cuda"
        offload = CPUOffloadPolicy(pin_memory=pinned) if self.config.cpu_offload else OffloadPolicy()
        # cast_forward_inputs would round the diffusion time to bf16, which makes the error of the loss 8 times larger.
        policy = MixedPrecisionPolicy(
            param_dtype=bf16, reduce_dtype=torch.float32, cast_forward_inputs=False,
            param_dtype_override_fn=_keeping([*float32_parameters(model), *self.flat.float32]),
        )  # fmt: skip
        blocks, width = blocks_of(model), 4 if bf16 is None else 2
        sizes = [width * sum(p.numel() for p in block.parameters()) for block in blocks]
        for unit in units_of(blocks, sizes, self.config.blocks_per_unit):
            fully_shard(
                unit, mesh=self.mesh, mp_policy=policy, offload_policy=offload,
                reshard_after_forward=bool(self.config.reshard_after_forward),
            )  # fmt: skip
        # The model returns a view. The warning is about writing to it in place, which nothing here does.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        return fully_shard(model, mesh=self.mesh, mp_policy=policy, offload_policy=offload)

    @property
    def model(self) -> nn.Module:
        return self._model

    def backward(self, loss: Tensor, last: bool) -> None:
        if self._root is not None:
            # Gradient accumulation without communication: unsharded gradients stay on each rank until the last
            # micro-batch, whose backward pass reduces them once.
            self._root.set_requires_gradient_sync(last)
            self._root.set_is_last_backward(last)
        loss.backward()

    def step(self, lr: float) -> StepResult:
        for name, param in self._params.items():
            self._shards[name].grad = None if param.grad is None else _shard(param.grad)
        norm = self._total_norm()
        fetched = HostCopy(norm)
        if self.config.grad_clip is not None:
            clip_grads_with_norm_(self._shards.values(), self.config.grad_clip, norm)
        set_lr(self.optimizer, lr)
        if isinstance(self.optimizer, Muon):
            # Its messages between ranks cannot be undone by a flag on the device: the host waits for the norm first.
            if math.isfinite(fetched.item()):
                self.optimizer.step()
        else:
            step_if_finite(self.optimizer, norm)
        self._clear_gradients()
        # The device computes the update while the host waits for the norm.
        value = fetched.item()
        applied = math.isfinite(value)
        self.optimizer_steps += applied
        return StepResult(value, applied)

    def _total_norm(self) -> Tensor:
        """The norm of all gradients together, 0-d: of the shards of this rank, then over the ranks."""
        norm = get_total_norm([shard.grad for shard in self._shards.values() if shard.grad is not None])
        group = self.mesh.get_group("shard")
        if self._root is None or dist.get_world_size(group) == 1:
            return norm
        squares = norm.square()
        dist.all_reduce(squares, group=group)
        return squares.sqrt()

    def _clear_gradients(self) -> None:
        for tensor in (*self._params.values(), *self._shards.values()):
            tensor.grad = None

    def fragments(self) -> list[Fragment]:
        return self._fragments

    def replicas(self) -> Replicas:
        if self.mesh.ndim == 1:
            return Replicas({})
        return Replicas({f.name: f.param for f in self._fragments}, self.mesh.get_local_rank("shard"))

    def set_optimizer_steps(self, steps: int) -> None:
        self.optimizer_steps = steps
        set_step(self.optimizer, steps)

    def after_load(self) -> None:
        """Free gathered weights. Forward gathers them again, from the memory of the fragments."""
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def describe(self) -> dict[str, Any]:
        return {
            "engine": f"fsdp2-{self.config.sharding}",
            "mesh": dict(zip(self.mesh.mesh_dim_names or (), self.mesh.shape, strict=True)),
            "precision": self.config.precision,
            "compile": self.config.compile,
            "reshard_after_forward": bool(self.config.reshard_after_forward),
            "float8": self.config.float8,
            "reduce_dtype": "fp32",
            "optimizer": type(self.optimizer).__name__,
            **describe_fragments(self._fragments),
        }

    def close(self) -> None:
        self._clear_gradients()

    def _make_fragments(self) -> list[Fragment]:
        primary = self.mesh.ndim == 1 or self.mesh.get_local_rank("replicate") == 0
        found = []
        for name, param in self._params.items():
            state = self.optimizer.state[self._updated[name]]
            local, exp_avg = _local(param), _local(state["exp_avg"])
            exp_avg_sq = _local(state["exp_avg_sq"]) if "exp_avg_sq" in state else None
            start = _rows_before(param) * math.prod(param.shape[1:])
            if local.numel():
                found.append(Fragment(name, tuple(param.shape), start, local, exp_avg, exp_avg_sq, primary))
        return self.flat.fragments(found)


def _keeping(kept: list[nn.Parameter]) -> Callable[[nn.Parameter], torch.dtype | None]:
    """For FSDP2's policy: the type of these parameters in forward is their own; None stands for the policy's."""
    ids = {id(param) for param in kept}
    return lambda param: param.dtype if id(param) in ids else None


def _make_optimizer(
    model: nn.Module, config: AdamWConfig | MuonConfig, shards: dict[str, Tensor], flat: FlatParameters
) -> torch.optim.AdamW:
    """AdamW over the shards: for each DTensor the host would take 24 µs to find what its kernel has to do."""
    if isinstance(config, MuonConfig):
        return Muon(model, config)
    shard_of = {id(param): shards[name] for name, param in model.named_parameters()}
    groups = param_groups(model, config, decayed=flat.is_decayed)
    for group in groups:
        group["params"] = [shard_of[id(param)] for param in group["params"]]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=config.betas, eps=config.eps,
        fused=True,  # one pass over memory, on the CPU too
    )  # fmt: skip


def _shard(tensor: Tensor) -> Tensor:
    """This rank's part of a parameter or a gradient, in the same memory; itself if it is whole."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard of a parameter, as a flat view of the same memory."""
    local: Tensor = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().view(-1)
    assert local.dtype == torch.float32
    return local


def _rows_before(param: Tensor) -> int:
    """Number of rows on the lower ranks of the shard mesh, which splits dimension 0 as torch.chunk does."""
    if not isinstance(param, DTensor):
        return 0
    assert param.placements[-1] == Shard(0) and all(p == Replicate() for p in param.placements[:-1])
    mesh = param.device_mesh
    shards, index = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    return min(math.ceil(param.shape[0] / shards) * index, param.shape[0])
