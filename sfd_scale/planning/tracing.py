"""Runs a model on the meta device, where tensors have no storage, for the counts of FLOPs, kernels and memory.

A deep model repeats its block. One block of each kind is run, and the others are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sfd_scale.engines.block_transforms import blocks_of

T = TypeVar("T")


class RepeatedBlocks(Generic[T]):
    """Replaces the forward of every block: the first block of each kind is measured, later ones are skipped.

    Args:
        measure: runs a forward with its arguments; returns the output and the measurement.

    Attributes:
        repeats: the measurements of the skipped blocks, equal to those of the first block of their kind.
    """

    def __init__(self, model: nn.Module, measure: Callable[[Callable[..., Any], Sequence[Any]], tuple[Any, T]]) -> None:
        self.measure, self.repeats = measure, list[T]()
        self._known: dict[Any, tuple[Any, T]] = {}
        for block in blocks_of(model):
            self._replace_forward(block)

    def _replace_forward(self, block: nn.Module) -> None:
        forward, kind = block.forward, _kind(block)

        def measured(*arguments: Any) -> Any:
            inputs = tuple(x if x.requires_grad else leaf(x) for x in tensors_in(arguments))
            key = kind, tuple((x.shape, x.dtype) for x in inputs)
            if key in self._known:
                self.repeats.append(self._known[key][1])
            else:
                self._known[key] = self.measure(forward, arguments)
            output = self._known[key][0]
            skipped = _Skipped.apply(tuple(x.detach() for x in tensors_in(output)), *inputs)  # type: ignore[no-untyped-call]
            return skipped[0] if isinstance(output, Tensor) else skipped

        object.__setattr__(block, "forward", measured)


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


def forward_and_backward(
    call: Callable[..., Any], arguments: Sequence[Any], before_backward: Callable[[], None] = lambda: None
) -> Any:
    """The output, after a backward pass from everything in it to all floating-point arguments."""
    output = call(*(leaf(x) if isinstance(x, Tensor) else x for x in arguments))
    outputs = [x for x in tensors_in(output) if x.requires_grad]
    gradients = [torch.empty_like(x) for x in outputs]
    before_backward()
    torch.autograd.backward(outputs, gradients)
    return output


def leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.is_floating_point())


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)


def use_bf16_parameters(model: nn.Module) -> None:
    """bf16 weights, as engines compute with them; buffers keep their type."""
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(param.detach().bfloat16()))


class FlashAttention(TorchFunctionMode):
    """Attention as one fused kernel.

    On the meta device PyTorch would take plain matmuls with a T × T matrix. No GPU does that.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args)[0]
        return func(*args, **(kwargs or {}))
