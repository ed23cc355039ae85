"""The process group, ranks and collectives.

Without a launcher (no WORLD_SIZE in the environment) there is no process group, and every collective returns its input.
So a single process needs no special case elsewhere.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sfd_scale.runtime import environment, network
from sfd_scale.runtime.environment import launched as launched


def init(timeout_s: float = 600.0) -> None:
    """Start the default process group, if a launcher set RANK and WORLD_SIZE: NCCL on CUDA, gloo on the CPU.

    Both use the network interface that reaches MASTER_ADDR, unless GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME are set.
    LOCAL_WORLD_SIZE is set from the deepspeed launcher's LOCAL_SIZE, which MosaicML streaming does not read
    (mosaicml/streaming#717).

    Args:
        timeout_s: of a collective.

    Raises:
        ValueError: if the variables of the ranks do not belong together.
    """
    if dist.is_initialized():
        return
    environment.check_rank()
    if not launched():
        return
    variables = environment.variables()
    environment.set_default("LOCAL_WORLD_SIZE", environment.text("LOCAL_SIZE") or variables["WORLD_SIZE"])
    environment.set_default("LOCAL_RANK", variables["RANK"])
    network.set_interfaces(variables)
    backend, own = "gloo", None
    if torch.cuda.is_available():
        # Without the device, NCCL guesses it from the rank, and connects at the first collective instead of here. It
        # cannot connect MIG instances; the evaluation, which has no collectives of GPU tensors, does not need that.
        backend = "cpu:gloo,cuda:nccl"
        own = None if any(map(environment.is_mig, environment.visible_devices() or [])) else device()
        torch.cuda.set_device(device())
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), device_id=own)


def shutdown() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    return environment.whole_number("LOCAL_RANK") or 0


def local_world_size() -> int:
    own = environment.whole_number("LOCAL_WORLD_SIZE", least=1) if dist.is_initialized() else None
    return world_size() if own is None else own


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    """The device of this rank: its GPU, or the CPU. A rank that sees one GPU uses it, whatever its local rank."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", 0 if torch.cuda.device_count() == 1 else local_rank())


def barrier() -> None:
    """Wait for all ranks: on the host, by gloo. With a GPU in the process group, dist.barrier would take NCCL."""
    if dist.is_initialized() and torch.cuda.is_available():
        dist.all_reduce(torch.zeros(()))
    elif dist.is_initialized():
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place; returns the tensor."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Maximum over ranks, in place; returns the tensor."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def any_rank(*flags: bool) -> list[bool]:
    """For each flag, whether any rank has set it. Uses one collective."""
    if not dist.is_initialized():
        return list(flags)
    return [bool(flag) for flag in all_reduce_max(torch.tensor(flags, dtype=torch.int32)).tolist()]


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Mean over ranks, in place; returns the tensor."""
    return all_reduce_sum(tensor).div_(world_size())


def all_gather_object(value: Any) -> list[Any]:
    """The values of all ranks, in the order of ranks."""
    if not dist.is_initialized():
        return [value]
    out: list[Any] = [None] * world_size()
    dist.all_gather_object(out, value)
    return out


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
