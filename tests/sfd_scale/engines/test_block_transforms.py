"""Activation checkpointing of blocks: what each mode recomputes, and that gradients stay the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sfd_scale.engines.block_transforms import prepare_blocks
from tests.helpers.tiny import TinyModel


class _Count(TorchDispatchMode):
    """Counts matmuls and activation functions."""

    def __init__(self) -> None:
        super().__init__()
        self.matmuls, self.activations = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.matmuls += func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
        self.activations += func is torch.ops.aten.silu.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode,matmuls,activations", [("none", 0, 0), ("block", 6, 3), ("selective", 0, 3)])
def test_activation_checkpointing_recomputes_by_its_mode(mode: Any, matmuls: int, activations: int) -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    baseline, model = TinyModel(), TinyModel()
    prepare_blocks(model, mode, compiled=False)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in baseline.named_parameters()]
    counts = []
    for net in (baseline, model):
        with _Count() as count:
            net(x).square().sum().backward()
        counts.append(count)
    assert counts[1].matmuls - counts[0].matmuls == matmuls
    assert counts[1].activations - counts[0].activations == activations
    for ours, theirs in zip(model.parameters(), baseline.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None and torch.equal(ours.grad, theirs.grad)


def test_activation_checkpointing_needs_blocks() -> None:
    with pytest.raises(ValueError, match="no repeated `blocks`"):
        prepare_blocks(nn.Linear(2, 2), "block", compiled=False)
