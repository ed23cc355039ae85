"""FLOPs of a training step, counted by torch on the real model: no formula that a new layer would make wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sfd_scale.planning.tracing import RepeatedBlocks, forward_and_backward


def training_flops(make: Callable[[], nn.Module], inputs: Callable[[], Sequence[Tensor]]) -> float:
    """FLOPs of forward and backward of one batch, two for each multiply-add of matmuls and convolutions.

    The inputs get gradients too. So backward has twice the matmuls of forward everywhere, and a training step has three
    times those of the forward pass (arXiv 2204.02311, App. B). Activation checkpointing is not counted.

    Args:
        make: builds the model. It is called on the meta device, where tensors have no storage.
        inputs: the model's arguments, also made on the meta device.
    """
    with torch.device("meta"):
        model, arguments = make(), inputs()
        with FlopCounterMode(display=False) as counter:

            def measure(forward: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Any, int]:
                before = counter.get_total_flops()
                output = forward_and_backward(forward, arguments)
                return output, counter.get_total_flops() - before

            blocks = RepeatedBlocks(model, measure)
            forward_and_backward(model, arguments)
        return float(counter.get_total_flops() + sum(blocks.repeats))
