"""What one training step of a model keeps in memory, traced through the real model on tensors without storage.

A planner that has formulas for the layers is wrong as soon as a layer changes. Here autograd itself says what it saves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sfd_scale.engines.block_transforms import KEPT, blocks_of

Precision = Literal["bf16", "fp32"]
BYTES = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Activations:
    """Bytes that backward needs for one sample, at the moment when there are most of them."""

    none: int
    selective: int
    block: int


@dataclass(frozen=True)
class Footprint:
    """A model, as far as the planner needs it.

    shapes: of the parameters of each block, in order, then of what stands outside of the blocks.
    block_share: the share of the FLOPs that lies inside blocks, and is done again under checkpointing.
    """

    blocks: tuple[tuple[tuple[int, ...], ...], ...]
    outside: tuple[tuple[int, ...], ...]
    buffers: int  # bytes
    activations: Activations
    block_share: float

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(shape for block in self.blocks for shape in block) + self.outside

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def largest_block(self) -> int:
        """Elements of the largest unit that FSDP and ZeRO-3 gather at once."""
        return max((sum(map(math.prod, block)) for block in (*self.blocks, self.outside)), default=0)


def trace(
    make: Callable[[], nn.Module], forward: Callable[[nn.Module, int], Any] | None, precision: Precision
) -> Footprint:
    """The footprint of a model.

    Args:
        make: builds the model; called where nothing is allocated.
        forward: the model and a number of samples → what the loss is computed from. None leaves activations at 0, and
            spares the one or two seconds that the trace takes.
    """
    with torch.device("meta"), _FlashAttention():
        model = make()
        blocks = blocks_of(model)
        inside = tuple(tuple(tuple(p.shape) for p in block.parameters()) for block in blocks)
        taken = {id(p) for block in blocks for p in block.parameters()}
        outside = tuple(tuple(p.shape) for p in model.parameters() if id(p) not in taken)
        buffers = sum(b.numel() * b.element_size() for b in model.buffers())
        if precision == "bf16":
            for module in model.modules():
                for name, param in list(module.named_parameters(recurse=False)):
                    setattr(module, name, nn.Parameter(param.detach().bfloat16()))
        # Twice, because some of it does not grow with the batch.
        one, two = (_activations(model, forward, n) if forward else Activations(0, 0, 0) for n in (1, 2))
    per_sample = Activations(two.none - one.none, two.selective - one.selective, two.block - one.block)
    weights = sum(math.prod(shape) for block in inside for shape in block)
    share = weights / max(weights + sum(map(math.prod, outside)), 1)
    return Footprint(inside, outside, buffers, per_sample, share)


def _activations(model: nn.Module, forward: Callable[[nn.Module, int], Any], samples: int) -> Activations:
    params = {_key(p) for p in [*model.parameters(), *model.buffers()]}
    blocks = blocks_of(model)
    records: list[_Block] = []
    hooks = [h for block in blocks for h in _recorded(block, params, records)]
    outside: dict[int, int] = {}  # hooks of a block hide what it saves from these
    with _hooks(params, outside):
        alive = forward(model, samples)
    for hook in hooks:
        hook.remove()
    everything = {**outside, **_joined(record.saved for record in records)}
    working = max((sum(record.saved.values()) for record in records), default=0)
    # While one block is computed again, all that it saves is there once; the rest only as far as it is kept.
    inputs = {**outside, **_joined(record.inputs for record in records)}
    kept = {**inputs, **_joined(record.products for record in records)}
    del alive
    return Activations(sum(everything.values()), sum(kept.values()) + working, sum(inputs.values()) + working)


@dataclass
class _Block:
    """Storage → bytes; `alive` keeps the storages, so that none lends its address to another one."""

    inputs: dict[int, int]
    products: dict[int, int]
    saved: dict[int, int]
    alive: list[Any]


def _recorded(block: nn.Module, params: set[int], records: list[_Block]) -> Iterator[Any]:
    """Hooks that record what one call of the block gets, keeps and saves."""
    open_: list[Any] = []

    def before(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        inputs = {_key(t): _size(t) for t in arguments if isinstance(t, Tensor) and t.requires_grad}
        record = _Block(inputs, {}, {}, [arguments])
        contexts: list[Any] = [_Products(record), _hooks(params, record.saved)]
        for context in contexts:
            context.__enter__()
        open_.append((record, contexts))

    def after(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        record, contexts = open_.pop()
        for context in reversed(contexts):
            context.__exit__(None, None, None)
        records.append(record)

    yield block.register_forward_pre_hook(before)
    yield block.register_forward_hook(after)


class _Products(TorchDispatchMode):
    """Sizes of the outputs that selective checkpointing keeps."""

    def __init__(self, record: _Block) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.record = record

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if func in KEPT:
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, Tensor) and tensor.numel():
                    self.record.alive.append(tensor)
                    self.record.products[_key(tensor)] = _size(tensor)
        return out


class _FlashAttention(TorchFunctionMode):
    """On tensors without storage PyTorch takes plain products for attention, with their T × T matrix. No GPU does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args)[0]
        return func(*args, **(kwargs or {}))


def _hooks(params: set[int], sizes: dict[int, int]) -> saved_tensors_hooks:
    def pack(tensor: Tensor) -> Tensor:
        if _key(tensor) not in params:
            sizes[_key(tensor)] = _size(tensor)
        return tensor

    return saved_tensors_hooks(pack, lambda tensor: tensor)


def _joined(parts: Any) -> dict[int, int]:
    return {key: size for part in parts for key, size in part.items()}


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _size(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()
