"""GPUs and their networks by the makers' data sheets; other GPUs come from a YAML file (`--gpu-spec`)."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One GPU and its links. Bytes, bytes/s and FLOP/s, dense.

    device: the name, as `torch.cuda.get_device_name` has it.
    processors: streaming multiprocessors, which share the tiles of a matmul.
    nvlink: of one GPU to the others of its node, each direction; PCIe where there is no NVLink.
    network: of one GPU to other nodes, each direction. The makers' systems differ: give your own by `--network`.
    pcie: between the GPU and the host's memory, each direction.
    tensor_share: reached share of the peak for large matmuls, in place of the time model's constant. An A100 reaches
        more than newer GPUs, which lower their clock under load (fitted by benchmarks/plan_check.py).
    asynchronous: the host launches kernels ahead of the device; False for a CPU.
    """

    device: str
    memory: float
    peak_bf16: float
    peak_tf32: float
    peak_fp32: float
    bandwidth: float
    processors: int
    nvlink: float
    network: float = 50e9
    pcie: float = 50e9
    tensor_share: float | None = None
    asynchronous: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not isinstance(value, bool) and not 0 < value < math.inf:
                raise ValueError(f"{field.name}: {value}; allowed: above 0")

    def peak(self, precision: str) -> float:
        """FLOP/s of matmuls in "bf16", "tf32" or "fp32"."""
        return {"bf16": self.peak_bf16, "tf32": self.peak_tf32, "fp32": self.peak_fp32}[precision]


_HOPPER: dict[str, Any] = {"peak_bf16": 989e12, "peak_tf32": 494e12, "peak_fp32": 67e12, "processors": 132}
_AMPERE: dict[str, Any] = {
    "peak_bf16": 312e12, "peak_tf32": 156e12, "peak_fp32": 19.5e12, "processors": 108, "nvlink": 300e9,
    "network": 25e9, "pcie": 25e9, "tensor_share": 0.8,
}  # fmt: skip

GPUS = {
    "a100-40g": Hardware(device="A100-SXM4-40GB", memory=40e9, bandwidth=1.555e12, **_AMPERE),
    "a100": Hardware(device="A100-SXM4-80GB", memory=80e9, bandwidth=2.039e12, **_AMPERE),
    "h100": Hardware(device="H100 80GB HBM3", memory=80e9, bandwidth=3.35e12, nvlink=450e9, **_HOPPER),
    "h800": Hardware(device="H800", memory=80e9, bandwidth=3.35e12, nvlink=200e9, **_HOPPER),
    "h200": Hardware(device="H200", memory=141e9, bandwidth=4.8e12, nvlink=450e9, **_HOPPER),
    "h20": Hardware(
        device="H20", memory=96e9, peak_bf16=148e12, peak_tf32=74e12, peak_fp32=44e12, bandwidth=4.0e12, processors=78,
        nvlink=450e9,
    ),
    "b200": Hardware(
        device="B200", memory=180e9, peak_bf16=2.25e15, peak_tf32=1.12e15, peak_fp32=75e12, bandwidth=7.7e12,
        processors=148, nvlink=900e9,
    ),
    "l40s": Hardware(
        device="L40S", memory=48e9, peak_bf16=362e12, peak_tf32=183e12, peak_fp32=91e12, bandwidth=864e9,
        processors=142, nvlink=25e9, network=12.5e9, pcie=25e9,
    ),
    "a6000": Hardware(
        device="A6000", memory=48e9, peak_bf16=155e12, peak_tf32=77e12, peak_fp32=38.7e12, bandwidth=768e9,
        processors=84, nvlink=25e9, network=12.5e9, pcie=25e9,
    ),
    "4090": Hardware(
        device="4090", memory=24e9, peak_bf16=165e12, peak_tf32=82.6e12, peak_fp32=82.6e12, bandwidth=1.008e12,
        processors=128, nvlink=16e9, network=12.5e9, pcie=25e9,
    ),
}  # fmt: skip


def find_gpu(name: str) -> Hardware:
    """Raises ValueError for an unknown name."""
    if name not in GPUS:
        raise ValueError(f"--gpu: {name!r}; allowed: {', '.join(GPUS)}, or a file by --gpu-spec")
    return GPUS[name]


def read_gpu_spec(path: Path) -> Hardware:
    """A GPU from a YAML file with the fields of `Hardware`.

    Raises:
        ValueError: for a missing file, a missing or unknown field, or a value that is no number.
    """
    from sfd_scale import config  # here: benchmarks/gpu plans memory on machines without its packages

    known = {field.name: field for field in fields(Hardware)}
    required = [name for name, field in known.items() if field.default is MISSING]
    try:
        data = config.read_mapping(path)
    except ValueError as error:
        raise ValueError(f"--gpu-spec: {error}") from error
    if set(data) - set(known) or set(required) - set(data):
        raise ValueError(
            f"--gpu-spec: {path} has {sorted(map(str, data))}; "
            f"required: {', '.join(required)}; allowed too: {', '.join(set(known) - set(required))}"
        )
    try:
        values: dict[str, Any] = {k: v if k in ("device", "asynchronous") else float(v) for k, v in data.items()}
        return Hardware(**{**values, "processors": int(values["processors"])})
    except (TypeError, ValueError) as error:
        raise ValueError(f"--gpu-spec: {path}: {error}") from error
