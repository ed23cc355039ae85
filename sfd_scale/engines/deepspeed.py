"""DeepSpeed's ZeRO, stages 0 to 3, without DeepSpeed's scheduler, dataloader, gradient accumulation and checkpoints.

This file alone reads ZeRO's fp32 state, whose place is not part of DeepSpeed's interface. So pyproject.toml pins
DeepSpeed to the 0.19 series, and `check_fragments` checks the memory layout at start-up.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from sfd_scale.engines.block_transforms import prepare_blocks
from sfd_scale.engines.build_ops import missing, progress_of, quiet_builders, use_own_builds, wait_for_builds
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
from sfd_scale.engines.muon import LocatedFragment, Muon, MuonConfig, refuse_offload
from sfd_scale.engines.optim import AdamWConfig, create_state, param_groups, set_lr, set_step
from sfd_scale.engines.replica_check import Replicas
from sfd_scale.runtime import distributed, environment
from sfd_scale.runtime.device import HostCopy


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig(EngineConfig):
    """ZeRO settings.

    zero_stage: 0 shards nothing, 1 the optimizer state, 2 also the gradients, 3 also the weights.
    offload_optimizer: keep master weights and Adam's moments in host memory, updated by the CPU (stages 1 to 3).
    offload_params: keep the weights in host memory too (stage 3).
    overlap_comm: reduce gradients during the backward pass; null: at stages 2 and 3, which can.
    persistent_elements: stage 3 keeps parameters of up to this many elements whole on every rank.
    hpz_partition_size: of ZeRO++: keep a second copy of the weights, sharded over this many ranks of a node (stage 3).
    """

    kind: Literal["deepspeed"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload_optimizer: bool = False
    offload_params: bool = False
    overlap_comm: bool | None = None
    reduce_bucket_elements: int = 100_000_000
    allgather_bucket_elements: int = 100_000_000
    persistent_elements: int = 100_000
    hpz_partition_size: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        stage = self.zero_stage
        if stage == 0 and self.precision == "bf16":
            raise ValueError(
                "zero_stage: 0; allowed with precision bf16: 1, 2, 3. DeepSpeed starts stage 0 in bf16 with a step "
                "without gradients, which makes Adam's first update a quarter too small; on one rank, use stage 1"
            )
        if self.offload_optimizer and stage == 0:
            raise ValueError("offload_optimizer: true; allowed with zero_stage 1, 2, 3")
        if self.offload_params and not (stage == 3 and self.offload_optimizer):
            raise ValueError("offload_params: true; allowed with zero_stage 3 and offload_optimizer true")
        if self.overlap_comm and stage < 2:
            raise ValueError("overlap_comm: true; allowed with zero_stage 2, 3: stage 1 reduces once, after backward")
        if self.hpz_partition_size != 1 and (stage != 3 or self.hpz_partition_size < 1):
            raise ValueError(f"hpz_partition_size: {self.hpz_partition_size}; allowed: 1, or more with zero_stage 3")
        # The hooks of stage 3 inside a block gather its weights. They do not run in a compiled block, and gather others
        # when a block is recomputed.
        if self.compile and stage == 3:
            raise ValueError("compile: true; allowed with zero_stage 0, 1, 2, or with the fsdp engine")
        if self.flat_parameters is True and not self.can_flatten:
            raise ValueError("flat_parameters: true; allowed with zero_stage 0, 1, 2, or with the fsdp engine")
        if self.activation_checkpointing == "selective" and stage == 3:
            raise ValueError(
                "activation_checkpointing: selective; allowed with zero_stage 3: none, block; or use the fsdp engine"
            )

    @property
    def overlaps(self) -> bool:
        """Whether gradients are reduced during the backward pass."""
        return self.zero_stage >= 2 if self.overlap_comm is None else self.overlap_comm

    @property
    def can_flatten(self) -> bool:
        return self.zero_stage < 3  # which gathers the parameters of each module by themselves


def make_deepspeed(model: nn.Module, optimizer: AdamWConfig | MuonConfig, config: DeepSpeedConfig) -> DeepSpeedEngine:
    """Wrap an initialised fp32 model by DeepSpeed.

    Raises:
        ValueError: if the initial weights differ between ranks.
    """
    return DeepSpeedEngine(model, optimizer, config)


def deepspeed_json(config: DeepSpeedConfig) -> dict[str, Any]:
    """The configuration for `deepspeed.initialize`. It sets every key whose default we do not want."""
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "overlap_comm": config.overlaps,
        "reduce_bucket_size": config.reduce_bucket_elements,
        "allgather_bucket_size": config.allgather_bucket_elements,
    }
    if config.offload_optimizer:
        zero["offload_optimizer"] = host
    if config.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = config.persistent_elements
        zero["zero_hpz_partition_size"] = config.hpz_partition_size
        if config.offload_params:
            zero["offload_param"] = host
    out: dict[str, Any] = {
        # Only DeepSpeed's sample counter reads these two. The trainer does gradient accumulation.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        # `_Unsharded` clips for stage 0. DeepSpeed's default is to clip at 1.0.
        "gradient_clipping": 0.0 if config.zero_stage == 0 else config.grad_clip or 0.0,
        "steps_per_print": 1_000_000_000,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # Muon; the tests of this project run it
        "communication_data_type": "fp32",
    }
    if config.precision == "bf16":
        out["bf16"] = {"enabled": True}
        if config.zero_stage >= 2:
            # With this key, stage 1 uses another optimizer class, whose memory layout this file does not support.
            out["data_types"] = {"grad_accum_dtype": "fp32"}
    return out


class _Unsharded(torch.optim.AdamW):
    """For stage 0: the gradient norm, clipping and skipping that DeepSpeed does not do there.

    DeepSpeed calls `step` after averaging the gradients over the ranks.
    """

    grad_clip: float | None = None
    result = StepResult(0.0, False)

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = get_total_norm([p.grad for p in params if p.grad is not None])
        fetched = HostCopy(norm)
        if self.grad_clip is not None:
            clip_grads_with_norm_(params, self.grad_clip, norm)
        if isinstance(self, Muon):
            if math.isfinite(fetched.item()):
                super().step(closure)
        else:
            self.found_inf = (~norm.isfinite()).float()  # as optim.step_if_finite
            super().step(closure)
        value = fetched.item()
        self.result = StepResult(value, math.isfinite(value))


class _UnshardedMuon(_Unsharded, Muon):
    pass


class DeepSpeedEngine:
    """One model under ZeRO with torch's AdamW, or DeepSpeed's CPU Adam when the optimizer is offloaded."""

    def __init__(self, model: nn.Module, optimizer: AdamWConfig | MuonConfig, config: DeepSpeedConfig) -> None:
        refuse_offload(optimizer, "offload_optimizer", config.offload_optimizer)
        ensure_group()
        check_same_weights(model)
        use_own_builds()
        with quiet_builders():
            import deepspeed  # here: the import is slow and inspects the machine

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        environment.set_default("LOCAL_RANK", "0")  # DeepSpeed does not start without it
        self.config, self.device, self.optimizer_steps = config, distributed.device(), 0
        shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
        # In bf16, DeepSpeed makes its fp32 master weights from rounded weights, and rounds the buffers. `_restore` puts
        # the initial values back.
        initial = {name: param.detach().cpu().clone() for name, param in model.named_parameters()}
        buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        prepare_blocks(model, config.activation_checkpointing, config.compile, check=config.zero_stage < 3)
        # Stage 3 replaces this function for the whole process. `close` puts it back, for other models of the process.
        self._linear = nn.functional.linear
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._flat = arrange(model, optimizer, config)
        self._client = _client_optimizer(model, optimizer, config, self._flat)
        wait_for_builds()
        with quiet_builders(), progress_of(missing()):
            self._engine, *_ = deepspeed.initialize(
                model=model, optimizer=self._client, config=deepspeed_json(config), dist_init_required=False
            )
        _unlink_shared_memory()
        if config.zero_stage in (1, 2) and not config.offload_optimizer:
            # DeepSpeed looks for Inf and NaN in each gradient, and then in the norm of all. The norm is enough: the
            # first test costs a sum for each parameter, one more collective and one more wait of the host.
            self._engine.optimizer.check_overflow = lambda partition_gradients=True: None
        tensors = self._flat_tensors()
        create_state(self._client, tensors)
        self._located = list(self._locate_fragments([tensor for tensor, _ in tensors]))
        self._fragments = self._flat.fragments(located.fragment for located in self._located)
        check_fragments(self._fragments, shapes)
        if isinstance(self._client, Muon):
            whole = config.zero_stage == 0  # one call of the optimizer's step; otherwise one for each flat tensor
            self._client.bind([(tensor, 0 if whole else i) for i, (tensor, _) in enumerate(tensors)], self._located)
        self._restore(initial, buffers)

    @property
    def model(self) -> nn.Module:
        return self._engine

    def backward(self, loss: Tensor, last: bool) -> None:
        # Without managed_gradient_accumulation, `step` ends the accumulation.
        self._engine.backward(loss, scale_wrt_gas=False)
        if self.config.zero_stage == 1 and self.config.precision == "bf16":
            self._accumulate_in_float32(last)

    def _accumulate_in_float32(self, last: bool) -> None:
        """Stage 1 adds micro-batches up in bf16. Here they are summed in float32, and the sum is rounded once."""
        if last and not self._sums:
            return
        params = [param for param in self._engine.module.parameters() if param.grad is not None]
        for param in params:
            if param in self._sums:
                self._sums[param].add_(param.grad)
            else:
                self._sums[param] = param.grad.float()
            param.grad = self._sums[param].to(param.dtype) if last else None
        if last:
            self._sums.clear()

    def step(self, lr: float) -> StepResult:
        set_lr(self._client, lr)
        self._engine.step()
        if isinstance(self._client, _Unsharded):
            result = self._client.result
        else:
            applied = bool(self._engine.was_step_applied())
            norm = float(self._engine.get_global_grad_norm())
            result = StepResult(norm if applied else math.inf, applied)
        if not result.applied and self.config.zero_stage == 2 and self.config.offload_optimizer:
            # DeepSpeed keeps the gradients of a skipped step, and would add those of the next step to them.
            gradients = self._engine.optimizer.averaged_gradients
            gradients.update(dict.fromkeys(gradients))
        self.optimizer_steps += result.applied
        return result

    def fragments(self) -> list[Fragment]:
        return self._fragments

    def replicas(self) -> Replicas:
        params = dict(self._engine.module.named_parameters())
        if self.config.zero_stage == 3:
            kept = {id(param) for param in self._engine.optimizer.persistent_parameters}
            params = {name: param for name, param in params.items() if id(param) in kept}
        return Replicas(self._flat.tensors(params))

    def set_optimizer_steps(self, steps: int) -> None:
        self.optimizer_steps = steps
        set_step(self._client, steps)

    def after_load(self) -> None:
        """Copy the master weights to the weights that forward uses and gather these, as the end of a step does."""
        zero = self._engine.optimizer
        if self.config.zero_stage in (1, 2):
            zero.update_lp_params()
        elif self.config.zero_stage == 3:
            zero._partition_all_parameters()
            for index in range(len(zero.fp32_partitioned_groups_flat)):
                zero._reassign_or_swap_out_partitioned_parameters(index)
            if zero.persistent_parameters:
                # Gather now: otherwise the next partitioning would overwrite the loaded shards with old weights.
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
            zero.invalidate_secondary_tensor()

    def describe(self) -> dict[str, Any]:
        return {
            "engine": f"deepspeed-zero{self.config.zero_stage}",
            "precision": self.config.precision,
            "compile": self.config.compile,
            "overlap_comm": self.config.overlaps,
            "reduce_dtype": "fp32",
            "optimizer": f"{type(self._engine.optimizer).__name__} over {type(self._client).__name__}",
            **describe_fragments(self._fragments),
        }

    def close(self) -> None:
        """Free DeepSpeed's hooks and buffers; the engine cannot be used afterwards."""
        self._engine.destroy()
        nn.functional.linear = self._linear

    def _flat_tensors(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """The fp32 tensors that the optimizer updates on this rank, with their parameter groups."""
        zero, groups = self._engine.optimizer, self._client.param_groups
        if self.config.zero_stage == 0:
            return [(p, group) for group in groups for p in group["params"]]
        if self.config.zero_stage < 3:
            return list(zip(zero.single_partition_of_fp32_groups, groups, strict=True))
        flat = zero.fp32_partitioned_groups_flat
        return [(tensor, groups[zero.sub_group_to_group_id[index]]) for index, tensor in enumerate(flat)]

    def _locate_fragments(self, tensors: list[Tensor]) -> Iterator[LocatedFragment]:
        number = {id(tensor): 0 if self.config.zero_stage == 0 else index for index, tensor in enumerate(tensors)}
        locate = {0: self._locate_whole, 1: self._locate_flat, 2: self._locate_flat, 3: self._locate_partition}
        for name, param in self._engine.module.named_parameters():
            shape, flat, offset, numel, start = locate[self.config.zero_stage](param)
            if numel <= 0:
                continue
            state = self._client.state[flat]
            local, exp_avg, exp_avg_sq = (
                None if t is None else t.detach().view(-1).narrow(0, offset, numel)
                for t in (flat, state["exp_avg"], state.get("exp_avg_sq"))
            )
            assert local is not None and exp_avg is not None
            assert local.dtype == exp_avg.dtype == torch.float32, name
            primary = self.config.zero_stage > 0 or distributed.is_main()
            yield LocatedFragment(
                Fragment(name, shape, start, local, exp_avg, exp_avg_sq, primary), flat, offset, number[id(flat)]
            )

    # Each `_locate` returns the parameter's shape, the flat tensor that contains this rank's range of it, the range's
    # offset and length in the flat tensor, and its start in the parameter.

    def _locate_whole(self, param: Any) -> tuple[tuple[int, ...], Tensor, int, int, int]:
        return tuple(param.shape), param, 0, param.numel(), 0

    def _locate_flat(self, param: Any) -> tuple[tuple[int, ...], Tensor, int, int, int]:
        """Stages 1 and 2: one flat partition per parameter group, whose bounds may cut parameters."""
        mapping = param._hp_mapping
        if mapping is None:
            return tuple(param.shape), param, 0, 0, 0
        flat = self._engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        address = mapping.hp_fragment_address
        return tuple(param.shape), flat, address.start, address.numel, mapping.lp_fragment_address.start

    def _locate_partition(self, param: Any) -> tuple[tuple[int, ...], Tensor, int, int, int]:
        """Stage 3: every parameter is split into equal partitions, with padding at the end."""
        zero = self._engine.optimizer
        group, offset, numel = zero.grad_position[zero.get_param_id(param)]
        start = distributed.rank() * numel
        return (
            tuple(param.ds_shape), zero.fp32_partitioned_groups_flat[group], offset,
            min(numel, param.ds_numel - start), start,
        )  # fmt: skip

    @torch.no_grad()
    def _restore(self, initial: dict[str, Tensor], buffers: dict[str, Tensor]) -> None:
        for fragment in self._fragments:
            fragment.param.copy_(initial[fragment.name].view(-1)[fragment.start : fragment.stop])
        self.after_load()
        module = self._engine.module
        for name, value in buffers.items():
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner)._buffers[leaf] = value.to(self.device)


def _unlink_shared_memory() -> None:
    """Unlink DeepSpeed's shared-memory buffer for all-reduce on CPUs, 66 MiB per rank, which DeepSpeed never does.

    Every rank has mapped it by now, and a mapping does not need the name. So even a killed run leaves nothing behind.
    """
    distributed.barrier()
    address, port = environment.text("MASTER_ADDR") or "", environment.text("MASTER_PORT") or ""
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{distributed.rank()}"
    Path("/dev/shm", name).unlink(missing_ok=True)


def _client_optimizer(
    model: nn.Module, optimizer: AdamWConfig | MuonConfig, config: DeepSpeedConfig, flat: FlatParameters
) -> torch.optim.Optimizer:
    if isinstance(optimizer, MuonConfig):
        if config.zero_stage:
            return Muon(model, optimizer)
        muon = _UnshardedMuon(model, optimizer)
        muon.grad_clip = config.grad_clip
        return muon
    groups = param_groups(model, optimizer, decayed=flat.is_decayed)
    options: dict[str, Any] = {"lr": optimizer.lr, "betas": optimizer.betas, "eps": optimizer.eps}
    if config.offload_optimizer:
        use_own_builds()
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # here: the import may compile it

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    if config.zero_stage == 0:
        adamw = _Unsharded(groups, fused=True, **options)
        adamw.grad_clip = config.grad_clip
        return adamw
    return torch.optim.AdamW(groups, fused=True, **options)
