"""Peak dense bf16 throughput of accelerators, from their makers' data sheets, for MFU."""

from __future__ import annotations

import math

import torch

# FLOP/s, dense bf16, without sparsity. The first name that occurs in the device's name counts.
_PEAK = {
    "B200": 2.25e15,
    "H200": 989e12,
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
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in _PEAK.items() if key in name), math.inf)
