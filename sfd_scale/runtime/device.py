"""What a device can do: its peak throughput, bf16 where a CPU is slow at it; values on their way back."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# FLOP/s, dense bf16 without sparsity, from the makers' data sheets. The first name in the device's own counts.
_PEAK = {
    "B200": 2.25e15,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A6000": 155e12,
    "4090": 165e12,
}


def peak_flops(device: torch.device) -> float:
    """FLOP/s of a device in dense bf16; infinite where the table does not know it, so that no MFU is made up."""
    if device.type != "cuda":
        return math.inf
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float:
    """FLOP/s by the name that a GPU gives itself; infinite for one that the table does not know."""
    return next((peak for key, peak in _PEAK.items() if key in name), math.inf)


class HostCopy:
    """A scalar on its way to the host: `item` waits for this copy, not for what the device was given after it."""

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
    """Whether the device has instructions for bf16 products."""
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def fast_bf16(device: torch.device) -> bool:
    """Whether bf16 products run at least as fast as float32 ones.

    On a CPU with AVX-512's bf16 instructions and no matrix unit they do not: 70 GFLOP/s on a core where float32 has 120
    and `Float32Products` 102 (measured on a Xeon by (2048, 384) x (384, 1152)).
    """
    return bool(torch.cpu._is_amx_tile_supported()) if device.type == "cpu" else has_bf16(device)
