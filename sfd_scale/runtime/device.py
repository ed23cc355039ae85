"""Peak throughput and bf16 support of devices; asynchronous copies to the host."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# FLOP/s in dense bf16, from the vendors' data sheets. The first entry that occurs in a device's name counts.
_PEAK_FLOPS = {
    "B200": 2.25e15,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A6000": 155e12,
    "4090": 165e12,
}


def peak_flops(device: torch.device) -> float:
    """Peak FLOP/s of a device in dense bf16; infinity for unknown devices, for which no MFU is reported."""
    if device.type != "cuda":
        return math.inf
    return peak_flops_by_name(torch.cuda.get_device_name(device))


def peak_flops_by_name(name: str) -> float:
    """Peak FLOP/s in dense bf16 by the GPU's name, as in `torch.cuda.get_device_name`; infinity if unknown."""
    return next((peak for key, peak in _PEAK_FLOPS.items() if key in name), math.inf)


class HostCopy:
    """An asynchronous copy of a scalar to the host. `item` waits for this copy only, not for later GPU work."""

    def __init__(self, value: Tensor) -> None:
        self._value, self._copied = value.detach(), None
        if value.device.type == "cuda":
            self._value = torch.empty((), dtype=value.dtype, pin_memory=True).copy_(self._value, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def item(self) -> float:
        if self._copied is not None:
            self._copied.synchronize()
        return self._value.item()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def has_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16 matmuls."""
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matmuls are at least as fast as float32 matmuls.

    They are not on a CPU that has AVX-512 bf16 instructions but no matrix unit (AMX). Measured on one core of a Xeon,
    for (2048, 384) x (384, 1152): 70 GFLOP/s in bf16, 120 in float32, 102 with `MatmulInFloat32`.
    """
    return bool(torch.cpu._is_amx_tile_supported()) if device.type == "cpu" else has_bf16(device)
