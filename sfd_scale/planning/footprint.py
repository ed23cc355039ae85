"""The memory of one training step of a model, traced on the real model on tensors without storage.

autograd itself says which tensors it saves. So a new layer needs no formula here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from sfd_scale.engines.block_transforms import KEPT, blocks_of
from sfd_scale.engines.muon import MuonConfig, matrices_of
from sfd_scale.planning.muon_cost import NOTHING, Orthogonalization
from sfd_scale.planning.tracing import FlashAttention, use_bf16_parameters

Precision = Literal["bf16", "fp32"]
BYTES = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Activations:
    """Bytes that backward needs for one sample, at their maximum, by the mode of activation checkpointing."""

    none: int
    selective: int
    block: int


@dataclass(frozen=True)
class Footprint:
    """Parameters, buffers and activations of a model.

    blocks: shapes of the parameters of each block, in order. outside: of all other parameters.
    block_share: share of the FLOPs inside blocks, which activation checkpointing repeats.
    muon: the matrices that the optimizer orthogonalises; none with AdamW.
    """

    blocks: tuple[tuple[tuple[int, ...], ...], ...]
    outside: tuple[tuple[int, ...], ...]
    buffers: int  # bytes
    activations: Activations
    block_share: float
    muon: Orthogonalization = NOTHING

    @cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(shape for block in self.blocks for shape in block) + self.outside

    @cached_property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    @cached_property
    def largest_block(self) -> int:
        """Elements of the largest block, or of the parameters outside of blocks."""
        return max([0, *self.block_elements, sum(map(math.prod, self.outside))])

    @cached_property
    def block_elements(self) -> tuple[int, ...]:
        return tuple(sum(map(math.prod, block)) for block in self.blocks)


def trace(
    make: Callable[[], nn.Module], forward: Callable[[nn.Module, int], Any] | None, precision: Precision,
    muon: MuonConfig | None = None,
) -> Footprint:  # fmt: skip
    """The footprint of a model.

    Args:
        make: builds the model. It is called on the meta device, where tensors have no storage.
        forward: the model and a number of samples → the inputs of the loss. None leaves activations at 0, and saves the
            one or two seconds of the trace.
        muon: the optimizer, if it is Muon.
    """
    with torch.device("meta"), FlashAttention():
        model = make()
        blocks = blocks_of(model)
        inside = tuple(tuple(tuple(p.shape) for p in block.parameters()) for block in blocks)
        taken = {id(p) for block in blocks for p in block.parameters()}
        outside = tuple(tuple(p.shape) for p in model.parameters() if id(p) not in taken)
        matrices = NOTHING if muon is None else Orthogonalization(tuple(matrices_of(model, muon)), muon.iterations)
        buffers = sum(b.numel() * b.element_size() for b in model.buffers())
        if precision == "bf16":
            use_bf16_parameters(model)
        # Two batches, because a part of the memory does not grow with the batch.
        one, two = (_activations(model, forward, n) if forward else Activations(0, 0, 0) for n in (1, 2))
    per_sample = Activations(two.none - one.none, two.selective - one.selective, two.block - one.block)
    weights = sum(math.prod(shape) for block in inside for shape in block)
    share = weights / max(weights + sum(map(math.prod, outside)), 1)
    return Footprint(inside, outside, buffers, per_sample, share, matrices)


def _activations(model: nn.Module, forward: Callable[[nn.Module, int], Any], samples: int) -> Activations:
    params = {_key(p) for p in [*model.parameters(), *model.buffers()]}
    blocks = blocks_of(model)
    records: list[_Block] = []
    hooks = [h for block in blocks for h in _recorded(block, params, records)]
    outside: dict[int, int] = {}  # tensors saved inside a block go to the hooks of the block
    with _hooks(params, outside):
        alive = forward(model, samples)
    for hook in hooks:
        hook.remove()
    everything = {**outside, **_joined(record.saved for record in records)}
    working = max((sum(record.saved.values()) for record in records), default=0)
    # While one block is recomputed, all its saved tensors are in memory; of other blocks only the kept ones.
    inputs = {**outside, **_joined(record.inputs for record in records)}
    kept = {**inputs, **_joined(record.products for record in records)}
    del alive
    return Activations(sum(everything.values()), sum(kept.values()) + working, sum(inputs.values()) + working)


@dataclass
class _Block:
    """Storage → bytes. `alive` holds the storages, so that no address is used twice."""

    inputs: dict[int, int]
    products: dict[int, int]
    saved: dict[int, int]
    alive: list[Any]


def _recorded(block: nn.Module, params: set[int], records: list[_Block]) -> Iterator[Any]:
    """Hooks that record the inputs, the kept and the saved tensors of one call of the block."""
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
