"""Our Triton kernels of backward: gradients beside float64, by Triton's interpreter, and when they are used."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sfd_scale.models import fused_backward
from tests.helpers import fused_backward as cases

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """The results of all cases, from a process in which Triton interprets its kernels."""
    command = [sys.executable, "-m", "tests.helpers.fused_backward"]
    surroundings = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    root = Path(__file__).parents[3]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=root, env=surroundings)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", cases.BLOCKS)
def test_every_gradient_of_a_block_is_that_of_float64(found: dict[str, Any], name: str) -> None:
    case = found["blocks"][name]
    assert case["same outputs"] and case["bits equal twice"]
    assert len(case["own"]) == 16  # tokens, condition and 14 parameters
    for gradient, error in case["own"].items():
        # Matmuls round too: as far from float64 as the plain block is, and half as much again.
        floor = 1e-6 if cases.BLOCKS[name].dtype == "float32" else 1e-3
        assert error < 1.5 * case["plain"][gradient] + floor, (gradient, error)


def test_every_gradient_of_the_kernels_alone_has_the_precision_of_float32(found: dict[str, Any]) -> None:
    assert len(found["errors"]) == 11
    assert max(found["errors"].values()) < 5e-7


@pytest.mark.parametrize("mode", cases.COMPILED)
def test_torch_compile_traces_them_without_a_graph_break(found: dict[str, Any], mode: str) -> None:
    assert found["compiled"][mode] < 5e-6


@pytest.mark.parametrize("mode", cases.ENGINES)
def test_a_step_of_fsdp_has_the_same_gradients(found: dict[str, Any], mode: str) -> None:
    error, calls = found["engines"][mode]
    assert calls == 2 * cases.DEPTH  # one for each norm of a block
    assert error < 1e-2


def test_the_comparison_of_the_first_use_passes_and_would_find_a_wrong_kernel(found: dict[str, Any]) -> None:
    assert found["unusable"] is None
    assert "own kernels gave shift an error of" in found["unusable, shift doubled"]


def test_plain_layers_are_used_on_a_cpu_and_for_conditions_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fused_backward._tried, (32, 2), True)
    x, c = torch.zeros(2, 9, 32), torch.zeros(2, 32)
    assert not fused_backward.applies(x, c, 2)
    monkeypatch.setattr(fused_backward, "sums_by_sample", lambda device: True)
    assert fused_backward.applies(x, c, 2)
    assert not fused_backward.applies(x, c[:, None].expand(2, 9, 32), 2)
    assert not fused_backward.applies(x, c, 4)
    with torch.no_grad():
        assert not fused_backward.applies(x, c, 2)


def fails(device: torch.device, *shape: object) -> dict[str, float]:
    raise RuntimeError("no kernel image\nfor this device")


@pytest.mark.parametrize(
    ("errors", "reason"),
    [
        (fails, "own kernels failed (RuntimeError: no kernel image)"),
        (lambda *a: {"x": 1e-3, "gate": 0.5}, "own kernels gave gate an error of 5.0e-01"),
        (lambda *a: {"x": math.nan, "gate": 1e-3}, "own kernels gave x an error of nan"),
        (lambda *a: {"x": 1e-3}, None),
    ],
    ids=["fails", "wrong", "nan", "right"],
)
def test_a_kernel_that_fails_or_is_wrong_is_not_used_and_warns_once(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    errors: Callable[..., dict[str, float]],
    reason: str | None,
) -> None:
    monkeypatch.setattr(fused_backward, "_tried", {})
    monkeypatch.setattr(fused_backward, "load", lambda: None)
    monkeypatch.setattr(fused_backward, "errors", errors)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            fused_backward.prepare({(64, 2)}, CPU)
    assert fused_backward._tried == {(64, 2): reason is None}
    prefix = "backward of width 64 with 2 heads uses the compiler's kernels: "
    assert [record.getMessage() for record in caplog.records] == ([] if reason is None else [prefix + reason])


def test_widths_that_no_program_can_hold_are_left_to_the_compiler() -> None:
    assert fused_backward.unusable(CPU, 4096, 32) == "own kernels take widths up to 2048 and heads up to 128"
    assert fused_backward.unusable(CPU, 512, 2) == "own kernels take widths up to 2048 and heads up to 128"
