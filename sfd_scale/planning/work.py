"""The kernels of a training step: shapes of matmuls and attention, bytes of elementwise operations.

They are recorded on the real model on the meta device. So a new layer needs no formula here.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sfd_scale.engines.block_transforms import blocks_of
from sfd_scale.planning.footprint import Precision
from sfd_scale.planning.tracing import (
    FlashAttention,
    RepeatedBlocks,
    forward_and_backward,
    tensors_in,
    use_bf16_parameters,
)

Kind = Literal["matmul", "attention", "elementwise"]


@dataclass(frozen=True)
class Operation:
    """One kernel of an eager step; its shape is linear in the number of samples: fixed + samples · per_sample.

    Shapes: matmul (batch, m, n, k); attention (batch · heads, queries, keys, features of a head); elementwise (bytes
    read and written,).
    in_block: in a repeated block, which activation checkpointing recomputes and torch.compile fuses.
    """

    kind: Kind
    backward: bool
    in_block: bool
    fixed: tuple[int, ...]
    per_sample: tuple[int, ...]

    def shape(self, samples: int) -> tuple[int, ...]:
        return tuple(a + b * samples for a, b in zip(self.fixed, self.per_sample, strict=True))


@dataclass(frozen=True)
class Work:
    """The kernels of forward and backward of one micro-batch, each with its number of calls.

    blocks: the number of repeated blocks.
    precision: of the matmuls: "bf16", "fp32" or "tf32".
    """

    operations: tuple[tuple[Operation, int], ...]
    blocks: int
    precision: str

    def select(self, *, backward: bool | None = None, in_block: bool | None = None) -> Iterator[tuple[Operation, int]]:
        for operation, count in self.operations:
            if backward in (None, operation.backward) and in_block in (None, operation.in_block):
                yield operation, count

    def matmul_flops(self, samples: int) -> float:
        """FLOPs of all matmuls, without attention."""
        return sum(
            2.0 * math.prod(operation.shape(samples)) * count
            for operation, count in self.operations
            if operation.kind == "matmul"
        )

    def elementwise_bytes(self, samples: int, in_block: bool | None = None) -> float:
        return sum(
            float(operation.shape(samples)[0]) * count
            for operation, count in self.select(in_block=in_block)
            if operation.kind == "elementwise"
        )

    def launches(self, *, backward: bool | None = None, in_block: bool | None = None) -> int:
        return sum(count for _, count in self.select(backward=backward, in_block=in_block))


def trace_work(
    make: Callable[[], nn.Module],
    inputs: Callable[[int], Sequence[Tensor]],
    precision: Precision,
    fused_attention: bool = True,
) -> Work:
    """The kernels of a model.

    Args:
        make: builds the model. It is called on the meta device.
        inputs: a number of samples → the model's arguments, also made on the meta device.
        fused_attention: attention is one kernel; else matmuls with a T × T matrix.
    """
    # From two batches follows how each shape depends on the batch.
    with torch.device("meta"), FlashAttention() if fused_attention else contextlib.nullcontext():
        (two, blocks), (three, _) = (_record(make, inputs, samples, precision) for samples in (2, 3))
    assert len(two) == len(three), "the operations of a model may not depend on the batch"
    counted: Counter[Operation] = Counter()
    for (first, count), (second, _) in zip(two, three, strict=True):
        slope = tuple(b - a for a, b in zip(first.shape, second.shape, strict=True))
        fixed = tuple(a - 2 * b for a, b in zip(first.shape, slope, strict=True))
        counted[Operation(first.kind, first.backward, first.in_block, fixed, slope)] += count
    return Work(tuple(counted.items()), blocks, precision)


@dataclass(frozen=True)
class _Call:
    kind: Kind
    backward: bool
    in_block: bool
    shape: tuple[int, ...]


def _record(
    make: Callable[[], nn.Module], inputs: Callable[[int], Sequence[Tensor]], samples: int, precision: Precision
) -> tuple[list[tuple[_Call, int]], int]:
    """The kernels of one batch with the number of their calls, and the number of blocks."""
    model = make()
    if precision == "bf16":
        use_bf16_parameters(model)
    recorder = _Recorder()

    def measure(forward: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Any, tuple[int, int]]:
        start, recorder.in_block, recorder.backward = len(recorder.calls), True, False
        output = forward_and_backward(forward, arguments, recorder.start_backward)
        recorder.in_block = recorder.backward = False
        return output, (start, len(recorder.calls))

    repeated = RepeatedBlocks(model, measure)
    arguments = inputs(samples)
    with recorder:
        forward_and_backward(model, arguments, recorder.start_backward)
    repeats = Counter(repeated.repeats)
    counts = [1] * len(recorder.calls)
    for (start, end), times in repeats.items():
        for index in range(start, end):
            counts[index] += times
    return list(zip(recorder.calls, counts, strict=True)), len(blocks_of(model))


_ATEN = torch.ops.aten
_MATMULS = {_ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default, _ATEN.baddbmm.default}
_CONVOLUTIONS = {_ATEN.convolution.default, _ATEN.convolution_backward.default}
_ATTENTION = _ATEN._scaled_dot_product_flash_attention_for_cpu.default
_ATTENTION_BACKWARD = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default
# Operations without a kernel: they return a view, or memory that nothing writes.
_NO_KERNEL = ("empty", "view", "detach", "alias", "lift_fresh", "new_empty", "set_")


class _Recorder(TorchDispatchMode):
    """Records the kernels that a GPU would run for each operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[_Call] = []
        self.in_block = self.backward = False

    def start_backward(self) -> None:
        self.backward = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        output = func(*args, **(kwargs or {}))
        if func in _MATMULS:
            left, right = args[-2:]
            batch = left.shape[0] if left.ndim == 3 else 1
            self._add("matmul", (batch, left.shape[-2], right.shape[-1], left.shape[-1]))
        elif func in _CONVOLUTIONS:
            self._convolution(func, args, output)
        elif func in (_ATTENTION, _ATTENTION_BACKWARD):
            query, key = args[:2] if func == _ATTENTION else args[1:3]
            pairs = query.shape[0] * query.shape[1]
            self._add("attention", (pairs, query.shape[2], key.shape[2], query.shape[3]))
        elif not func.is_view and not any(word in func.name() for word in _NO_KERNEL):
            moved = [*tensors_in(args), *tensors_in(tuple((kwargs or {}).values())), *tensors_in(output)]
            if func == _ATEN.embedding.default:  # reads the rows of the batch, not the whole table
                moved = [output, output]
            self._add("elementwise", (sum(_moved_bytes(x) for x in moved),))
        return output

    def _add(self, kind: Kind, shape: tuple[int, ...]) -> None:
        self.calls.append(_Call(kind, self.backward, self.in_block, shape))

    def _convolution(self, func: Any, args: Any, output: Any) -> None:
        """As the matmul of the patches with the weights; backward has one for the input and one for the weights."""
        if func == _ATEN.convolution.default:
            image, weight, result = args[0], args[1], output
        else:
            result, image, weight = args[:3]
        rows, columns = result.shape[0] * math.prod(result.shape[2:]), weight.shape[0]
        inner = weight[0].numel() if not args[6 if func == _ATEN.convolution.default else 8] else image.shape[1]
        self._add("matmul", (1, rows, columns, inner))
        if func == _ATEN.convolution_backward.default:
            self._add("matmul", (1, inner, columns, rows))


def _moved_bytes(tensor: Tensor) -> int:
    """Bytes that a kernel reads or writes; a broadcast dimension is read once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or size == 0)
    return math.prod(sizes) * tensor.element_size()
