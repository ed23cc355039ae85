"""FLOPs of a training step, counted by torch on the real model: no formula that a new layer would make wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sfd_scale.engines.block_transforms import blocks_of


def training_flops(make: Callable[[], nn.Module], inputs: Callable[[], Sequence[Tensor]]) -> float:
    """FLOPs of forward and backward of one batch, two for each multiply-add of matrix products and convolutions.

    The inputs get gradients too, so backward has twice the products of forward everywhere and a training step has three
    times those of the forward pass (arXiv 2204.02311, App. B). Activation checkpointing is not counted.

    Args:
        make: builds the model; called on the meta device, where tensors have no storage.
        inputs: the model's arguments, likewise.
    """
    with torch.device("meta"):
        model, arguments = make(), inputs()
        with FlopCounterMode(display=False) as counter:
            repeats = _Repeats(counter)
            for block in blocks_of(model):
                repeats.shorten(block)
            _forward_and_backward(model, arguments)
        return float(counter.get_total_flops() + repeats.flops)


class _Repeats:
    """Runs one block of each kind and skips the others, which cost the same: a deep model is counted in a second.

    flops: of the skipped blocks.
    """

    def __init__(self, counter: FlopCounterMode) -> None:
        self.counter, self.flops = counter, 0
        self.known: dict[Any, tuple[Any, int]] = {}  # kind of block → its output, its FLOPs

    def shorten(self, block: nn.Module) -> None:
        forward, kind = block.forward, _kind(block)

        def counted(*arguments: Any) -> Any:
            inputs = tuple(x if x.requires_grad else _leaf(x) for x in _tensors(arguments))
            key = kind, tuple((x.shape, x.dtype) for x in inputs)
            if key in self.known:
                self.flops += self.known[key][1]
            else:
                before = self.counter.get_total_flops()
                output = _forward_and_backward(forward, arguments)
                self.known[key] = output, self.counter.get_total_flops() - before
            output = self.known[key][0]
            skipped = _Skipped.apply(tuple(x.detach() for x in _tensors(output)), *inputs)  # type: ignore[no-untyped-call]
            return skipped[0] if isinstance(output, Tensor) else skipped

        object.__setattr__(block, "forward", counted)


class _Skipped(torch.autograd.Function):
    """Outputs of the right shapes that depend on all inputs."""

    @staticmethod
    def forward(ctx: Any, outputs: tuple[Tensor, ...], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.inputs = inputs
        return tuple(torch.empty_like(x) for x in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(torch.empty_like(x) if x.is_floating_point() else None for x in ctx.inputs)


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """Equal for blocks of equal structure: classes, settings and parameter shapes of all their modules."""
    plain = (int, float, str, type(None))
    return tuple(
        (
            type(module),
            tuple((k, v) for k, v in vars(module).items() if isinstance(v, plain)),
            tuple(p.shape for p in module.parameters(recurse=False)),
        )
        for module in block.modules()
    )


def _forward_and_backward(call: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """The output, after a backward pass from everything in it to all floating-point arguments."""
    output = call(*(_leaf(x) if isinstance(x, Tensor) else x for x in arguments))
    outputs = [x for x in _tensors(output) if x.requires_grad]
    torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])
    return output


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.is_floating_point())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
