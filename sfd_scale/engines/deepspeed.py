"""DeepSpeed's ZeRO, stages 0 to 3, without its scheduler, loader, accumulation and checkpoints.

Where ZeRO keeps its fp32 state is not part of DeepSpeed's interface. All use of it is in this file, pinned to the
0.19 series in pyproject.toml and checked at start-up by `check_fragments`.
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
from sfd_scale.engines.build_ops import use_own_builds
from sfd_scale.engines.engine import (
    EngineConfig,
    Fragment,
    StepResult,
    check_fragments,
    check_same_weights,
    describe_fragments,
    ensure_group,
)
from sfd_scale.engines.optim import AdamWConfig, create_state, param_groups, set_lr, set_step
from sfd_scale.engines.replica_check import Replicas
from sfd_scale.runtime import distributed
from sfd_scale.runtime.device import HostCopy


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig(EngineConfig):
    """ZeRO settings: stage 1 shards the optimizer, 2 the gradients too, 3 the weights too; 0 shards nothing."""

    kind: Literal["deepspeed"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload_optimizer: bool = False  # master weights and moments in host memory, updated by the CPU (stages 1 to 3)
    offload_params: bool = False  # the weights too (stage 3)
    overlap_comm: bool = False  # reduce gradients during backward (stages 2 and 3)
    reduce_bucket_elements: int = 100_000_000
    allgather_bucket_elements: int = 100_000_000
    persistent_elements: int = 100_000  # stage 3 keeps parameters up to this size whole on every rank
    hpz_partition_size: int = 1  # ZeRO++: a second copy of the weights, sharded over so many ranks of a node (stage 3)

    def __post_init__(self) -> None:
        super().__post_init__()
        stage = self.zero_stage
        if stage == 0 and self.precision == "bf16":
            raise ValueError(
                "zero_stage: 0; allowed with precision bf16: 1, 2, 3. Stage 0 in bf16 starts Adam with an empty step, "
                "which makes the first update a quarter too small; stage 1 on one rank does the same work rightly"
            )
        if self.offload_optimizer and stage == 0:
            raise ValueError("offload_optimizer: true; allowed with zero_stage 1, 2, 3")
        if self.offload_params and not (stage == 3 and self.offload_optimizer):
            raise ValueError("offload_params: true; allowed with zero_stage 3 and offload_optimizer true")
        if self.overlap_comm and stage < 2:
            raise ValueError("overlap_comm: true; allowed with zero_stage 2, 3: stage 1 reduces once, after backward")
        if self.hpz_partition_size != 1 and (stage != 3 or self.hpz_partition_size < 1):
            raise ValueError(f"hpz_partition_size: {self.hpz_partition_size}; allowed: 1, or more with zero_stage 3")
        # Stage 3 gathers weights by hooks inside the blocks: other ones when a block is computed again, and none in a
        # compiled block.
        if self.compile and stage == 3:
            raise ValueError("compile: true; allowed with zero_stage 0, 1, 2, or with the fsdp engine")
        if self.activation_checkpointing == "selective" and stage == 3:
            raise ValueError(
                "activation_checkpointing: selective; allowed with zero_stage 3: none, block; or use the fsdp engine"
            )


def make_deepspeed(model: nn.Module, optimizer: AdamWConfig, config: DeepSpeedConfig) -> DeepSpeedEngine:
    """Hand an initialised fp32 model to DeepSpeed.

    Raises:
        ValueError: where the ranks bring different weights.
    """
    return DeepSpeedEngine(model, optimizer, config)


def deepspeed_json(config: DeepSpeedConfig) -> dict[str, Any]:
    """The dictionary that `deepspeed.initialize` reads. Every key whose default is not ours is given."""
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "overlap_comm": config.overlap_comm,
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
        # Only DeepSpeed's own sample counter reads these two; the trainer accumulates and steps.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        # Stage 0 clips in `_WholeAdamW`; DeepSpeed's own default is 1.0.
        "gradient_clipping": 0.0 if config.zero_stage == 0 else config.grad_clip or 0.0,
        "steps_per_print": 1_000_000_000,
        "zero_optimization": zero,
        "communication_data_type": "fp32",
    }
    if config.precision == "bf16":
        out["bf16"] = {"enabled": True}
        if config.zero_stage >= 2:
            # Stage 1 with this key runs on another optimizer class, whose memory this file does not know.
            out["data_types"] = {"grad_accum_dtype": "fp32"}
    return out


class _WholeAdamW(torch.optim.AdamW):
    """AdamW for stage 0, which neither measures the norm nor drops a step that is not finite: done here.

    DeepSpeed calls `step` after it has averaged the gradients over the ranks.
    """

    def __init__(self, groups: list[dict[str, Any]], grad_clip: float | None, **options: Any) -> None:
        super().__init__(groups, **options)
        self.grad_clip, self.result = grad_clip, StepResult(0.0, False)

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = get_total_norm([p.grad for p in params if p.grad is not None])
        fetched = HostCopy(norm)
        if self.grad_clip is not None:
            clip_grads_with_norm_(params, self.grad_clip, norm)
        self.found_inf = (~norm.isfinite()).float()  # as optim.step_if_finite
        super().step(closure)
        value = fetched.item()
        self.result = StepResult(value, math.isfinite(value))


class DeepSpeedEngine:
    """One model under ZeRO with torch's AdamW, or DeepSpeed's CPU Adam when the optimizer is offloaded."""

    def __init__(self, model: nn.Module, optimizer: AdamWConfig, config: DeepSpeedConfig) -> None:
        ensure_group()
        check_same_weights(model)
        use_own_builds()
        import deepspeed  # slow, and it probes the machine: only when it is used

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed refuses to start without it
        self.config, self.device, self.optimizer_steps = config, distributed.device(), 0
        shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
        # bf16: DeepSpeed takes its fp32 master weights from the rounded ones and rounds the buffers; both are put back.
        initial = {name: param.detach().cpu().clone() for name, param in model.named_parameters()}
        buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        prepare_blocks(model, config.activation_checkpointing, config.compile, check=config.zero_stage < 3)
        # Stage 3 replaces this function for the whole process and leaves it so; other models here must not meet that.
        self._linear = nn.functional.linear
        self._client = _client_optimizer(model, optimizer, config)
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=self._client, config=deepspeed_json(config), dist_init_required=False
        )
        _unlink_shared_memory()
        create_state(self._client, self._flat_tensors())
        self._fragments = list(self._make_fragments())
        check_fragments(self._fragments, shapes)
        self._restore(initial, buffers)

    @property
    def model(self) -> nn.Module:
        return self._engine

    def backward(self, loss: Tensor, last: bool) -> None:
        # `last` is not needed: `step` is the boundary (managed_gradient_accumulation is off).
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float) -> StepResult:
        set_lr(self._client, lr)
        self._engine.step()
        if isinstance(self._client, _WholeAdamW):
            result = self._client.result
        else:
            applied = bool(self._engine.was_step_applied())
            norm = float(self._engine.get_global_grad_norm())
            result = StepResult(norm if applied else math.inf, applied)
        if not result.applied and self.config.zero_stage == 2 and self.config.offload_optimizer:
            # DeepSpeed keeps the sums of a dropped step and would add the next steps' gradients to them.
            sums = self._engine.optimizer.averaged_gradients
            sums.update(dict.fromkeys(sums))
        self.optimizer_steps += result.applied
        return result

    def fragments(self) -> list[Fragment]:
        return self._fragments

    def replicas(self) -> Replicas:
        params = dict(self._engine.module.named_parameters())
        if self.config.zero_stage == 3:
            kept = {id(param) for param in self._engine.optimizer.persistent_parameters}
            params = {name: param for name, param in params.items() if id(param) in kept}
        return Replicas(params)

    def set_optimizer_steps(self, steps: int) -> None:
        self.optimizer_steps = steps
        set_step(self._client, steps)

    def after_load(self) -> None:
        """Copy the master weights to the weights that forward uses, and gather those: what the end of a step does."""
        zero = self._engine.optimizer
        if self.config.zero_stage in (1, 2):
            zero.update_lp_params()
        elif self.config.zero_stage == 3:
            zero._partition_all_parameters()
            for index in range(len(zero.fp32_partitioned_groups_flat)):
                zero._reassign_or_swap_out_partitioned_parameters(index)
            if zero.persistent_parameters:
                # Partitioning again would write the stale whole weights back over the loaded shards.
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
            zero.invalidate_secondary_tensor()

    def describe(self) -> dict[str, Any]:
        return {
            "engine": f"deepspeed-zero{self.config.zero_stage}",
            "precision": self.config.precision,
            "reduce_dtype": "fp32",
            "optimizer": f"{type(self._engine.optimizer).__name__} over {type(self._client).__name__}",
            **describe_fragments(self._fragments),
        }

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers; the engine cannot be used after it."""
        self._engine.destroy()
        nn.functional.linear = self._linear

    def _flat_tensors(self) -> list[Tensor]:
        """The fp32 tensors that the optimizer updates on this rank."""
        zero = self._engine.optimizer
        if self.config.zero_stage == 0:
            return [p for group in self._client.param_groups for p in group["params"]]
        flat = zero.single_partition_of_fp32_groups if self.config.zero_stage < 3 else zero.fp32_partitioned_groups_flat
        return list(flat)

    def _make_fragments(self) -> Iterator[Fragment]:
        locate = {0: self._locate_whole, 1: self._locate_flat, 2: self._locate_flat, 3: self._locate_partition}
        for name, param in self._engine.module.named_parameters():
            shape, flat, offset, numel, start = locate[self.config.zero_stage](param)
            if numel <= 0:
                continue
            state = self._client.state[flat]
            local, exp_avg, exp_avg_sq = (
                t.detach().view(-1).narrow(0, offset, numel) for t in (flat, state["exp_avg"], state["exp_avg_sq"])
            )
            assert local.dtype == exp_avg.dtype == exp_avg_sq.dtype == torch.float32, name
            primary = self.config.zero_stage > 0 or distributed.is_main()
            yield Fragment(name, shape, start, local, exp_avg, exp_avg_sq, primary)

    # Each returns: shape of the parameter, the tensor its local part lies in, offset and count there, first element.

    def _locate_whole(self, param: Any) -> tuple[tuple[int, ...], Tensor, int, int, int]:
        return tuple(param.shape), param, 0, param.numel(), 0

    def _locate_flat(self, param: Any) -> tuple[tuple[int, ...], Tensor, int, int, int]:
        """Stages 1 and 2: one flat partition a group, cut without regard to parameters."""
        mapping = param._hp_mapping
        if mapping is None:
            return tuple(param.shape), param, 0, 0, 0
        flat = self._engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        address = mapping.hp_fragment_address
        return tuple(param.shape), flat, address.start, address.numel, mapping.lp_fragment_address.start

    def _locate_partition(self, param: Any) -> tuple[tuple[int, ...], Tensor, int, int, int]:
        """Stage 3: every parameter cut into equal parts, the last ones padded."""
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
    """Remove the name of DeepSpeed's CPU all-reduce buffer, 66 MiB a rank, which it never does itself.

    Every rank has mapped it by now, and the mapping lives without the name: so nothing is left even by a killed run.
    """
    distributed.barrier()
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{distributed.rank()}"
    Path("/dev/shm", name).unlink(missing_ok=True)


def _client_optimizer(model: nn.Module, optimizer: AdamWConfig, config: DeepSpeedConfig) -> torch.optim.Optimizer:
    groups = param_groups(model, optimizer)
    options: dict[str, Any] = {"lr": optimizer.lr, "betas": optimizer.betas, "eps": optimizer.eps}
    if config.offload_optimizer:
        use_own_builds()
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiles on first use

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    if config.zero_stage == 0:
        return _WholeAdamW(groups, config.grad_clip, fused=True, **options)
    return torch.optim.AdamW(groups, fused=True, **options)
