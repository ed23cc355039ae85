"""The GPU benchmark: what it needs, what its checks catch, and a tiny run of all of it on the CPU."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from benchmarks import gpu, gpu_attention, harness
from benchmarks.train_step import our_step
from sfd_scale.engines import block_transforms
from sfd_scale.engines.block_transforms import use_float8
from sfd_scale.engines.fsdp import FSDPConfig

CPU = torch.device("cpu")
# Packages that a machine with only torch and numpy lacks.
MISSING = (
    "deepspeed", "streaming", "omegaconf", "rich", "typer", "wandb", "safetensors", "timm", "diffusers", "torchvision",
    "scipy", "PIL", "psutil", "torch_fidelity",
)  # fmt: skip


def test_it_needs_torch_and_numpy_alone() -> None:
    program = f"import sys; sys.modules.update(dict.fromkeys({MISSING})); import benchmarks.gpu"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("head_dim", [64, 72])
def test_attention_in_bf16_is_within_its_tolerance(head_dim: int) -> None:
    assert gpu_attention.attention_error(CPU, head_dim) < gpu.TOLERANCE


def test_attention_of_another_scale_is_beyond_it(monkeypatch: pytest.MonkeyPatch) -> None:
    right = functional.scaled_dot_product_attention
    # A kernel that pads heads of 72 to 80 and scales by the padded width.
    monkeypatch.setattr(
        functional, "scaled_dot_product_attention", lambda q, k, v: right(q, k, v, scale=1 / math.sqrt(80))
    )
    assert gpu_attention.attention_error(CPU, 72) > gpu.TOLERANCE


def test_float8_is_refused_where_it_cannot_run() -> None:
    with pytest.raises(ValueError, match="engine.float8: true, but it needs"):
        use_float8(torch.nn.Module(), CPU)
    with pytest.raises(ValueError, match="float8: true; allowed with precision bf16 and compile true"):
        FSDPConfig(float8=True)


@pytest.mark.parametrize(("installed", "refused"), [("0.17.9", True), ("0.18.0", False), ("0.19.1", False)])
def test_a_torchao_that_can_give_nan_is_refused(installed: str, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_transforms.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(block_transforms.importlib.metadata, "version", lambda name: installed)
    reason = block_transforms.float8_missing(CPU)
    assert reason == (f"it needs torchao 0.18 or newer, and {installed} is installed" if refused else
                      "it needs a CUDA device")  # fmt: skip


@pytest.mark.gpu
def test_float8_follows_the_loss_of_bf16() -> None:
    losses = {}
    for float8 in (False, True):
        settings = FSDPConfig(sharding="replicate", compile=True, float8=float8)
        step = our_step("S", 8, settings, depth=2)
        losses[float8] = [float(step()) for _ in range(30)]  # type: ignore[arg-type]
    assert losses[False][-1] < losses[False][0]
    assert losses[True] == pytest.approx(losses[False], rel=2e-2)


def test_every_kernel_is_timed_and_one_that_fails_ends_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[object] = []
    monkeypatch.setattr(gpu_attention.attention_speed, "record", lambda *given: recorded.append(given))
    found = gpu_attention.measure(CPU, batch=1, repeats=1)
    assert {(timed.backend, timed.head_dim) for timed in found} == {(b, d) for b in ("sdpa", "math") for d in (64, 72)}
    assert all(timed.milliseconds > 0 and timed.error <= gpu_attention.TOLERANCE for timed in found)
    assert not recorded  # times of a CPU order nothing


def test_what_fails_is_a_figure_and_ends_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that does not compile, say; the file has the figures so far after each of them."""

    def broken(*args: object) -> Callable[[], object]:
        raise RuntimeError("Triton Error")

    monkeypatch.setattr(gpu, "our_step", broken)
    words = ["bench", "--device", "cpu", "--quick", "--part", "training", "--out", str(tmp_path)]
    assert gpu.main(words) == 0
    text = (tmp_path / "gpu_training.json").read_text()
    figures = json.loads(text, parse_constant=pytest.fail)["figures"]
    assert len(figures) == 4 and all(", failed: RuntimeError" in figure["what"] for figure in figures)
    assert all(figure["ours"] is None and figure["peer"] > 0 for figure in figures)
    assert math.isnan(harness.figures_of({"figures": figures})[0].ours)
    gpu.main([*words, "--seconds", "0"])
    assert len(json.loads((tmp_path / "gpu_training.json").read_text())["figures"]) == 1


@pytest.mark.full
def test_all_of_it_runs_on_the_cpu(tmp_path: Path) -> None:
    assert gpu.main(["check", "--device", "cpu"]) == 0
    assert gpu.main(["bench", "--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / "gpu.json").read_text())["figures"]
    names = " ".join(figure["what"] for figure in figures)
    assert all(
        words in names for words in ("training", "activation checkpointing block", "AutoGuidance", "eager", "Inception")
    )
    assert all(figure["ours"] > 0 for figure in figures)
