"""Flat parameters: each block keeps its weights in one 1-D parameter per dtype, and reads them as views of it.

For every parameter an engine takes time of the host: FSDP2 sets it on its module, frees and takes its memory and wraps
its gradient; ZeRO copies its gradient into a bucket and measures it. A block of LightningDiT has 14 parameters, and two
flat ones. The price is one copy of the block's gradients per backward pass, from the views into the flat gradient. So
they are for small blocks, or for few images per GPU, where the host sets the pace of a step.

Checkpoints, EMA and messages keep the names and shapes of the model: `fragments` cuts an engine's fragments of flat
parameters into those of the model's parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sfd_scale.engines.block_transforms import blocks_of, float32_parameters
from sfd_scale.engines.engine import EngineConfig, Fragment
from sfd_scale.engines.muon import MuonConfig
from sfd_scale.engines.optim import AdamWConfig, is_decayed, require_trainable

# Every view starts at a multiple of this many elements: kernels read 16 bytes at once from aligned addresses.
_ALIGNMENT = 16
# `auto`: blocks of at most this many bytes in forward. S has 5 MB and B 21; L has 38, XL 48 and XXL 85.
FLAT_BYTES = 32 * 2**20


@dataclass(frozen=True)
class _Part:
    """The range [start, start + numel) of a flat parameter that is a parameter of the model."""

    name: str
    shape: tuple[int, ...]
    start: int
    attributes: dict[str, Any]  # of the module that reads it
    attribute: str

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape)


class FlatParameters:
    """The flat parameters of a model, and the parameters of the model that they replace.

    Attributes:
        float32: the flat parameters that forward reads in float32.
    """

    def __init__(self, model: nn.Module) -> None:
        """A layout without flat parameters; `flatten_blocks` adds them."""
        self.float32: list[nn.Parameter] = []
        self._order = {name: index for index, (name, _) in enumerate(model.named_parameters())}
        self._parts: dict[str, list[_Part]] = {}
        self._decayed: dict[str, bool] = {}

    def is_decayed(self, name: str, param: nn.Parameter) -> bool:
        """Whether weight decay is for a parameter, which may be a flat one."""
        return self._decayed.get(name, is_decayed(name, param))

    def add(self, block: nn.Module, prefix: str, params: list[tuple[str, nn.Parameter]], decayed: bool) -> nn.Parameter:
        """Replace parameters of a block, which have one dtype, by a flat one.

        Args:
            prefix: the name of the block in the model, with a dot.
            params: with their names in the block.
        """
        parts, end = [], 0
        for name, param in params:
            owner, _, attribute = name.rpartition(".")
            module = block.get_submodule(owner)
            parts.append(_Part(prefix + name, tuple(param.shape), end, module.__dict__, attribute))
            end = math.ceil(parts[-1].stop / _ALIGNMENT) * _ALIGNMENT
            del module._parameters[attribute]
        data = torch.zeros(end, dtype=params[0][1].dtype, device=params[0][1].device)
        for part, (_, param) in zip(parts, params, strict=True):
            data[part.start : part.stop] = param.detach().view(-1)
        flat, own = nn.Parameter(data), f"flat_{sum(name.startswith(prefix) for name in self._parts)}"
        block.register_parameter(own, flat)
        # Hooks run in order of registration, but those of FSDP2, which gather the flat parameter, before all others.
        block.register_forward_pre_hook(_SetViews(own, parts, end))
        self._parts[prefix + own] = parts
        self._decayed[prefix + own] = decayed
        return flat

    def fragments(self, found: Iterable[Fragment]) -> list[Fragment]:
        """Fragments of the model's parameters, in their order, from an engine's fragments: the same memory."""
        out = [part for fragment in found for part in self._cut(fragment)]
        return sorted(out, key=lambda fragment: (self._order[fragment.name], fragment.start))

    def _cut(self, whole: Fragment) -> Iterable[Fragment]:
        if whole.name not in self._parts:
            yield whole
            return
        for part in self._parts[whole.name]:
            start, stop = max(part.start, whole.start), min(part.stop, whole.stop)
            if start < stop:
                here = slice(start - whole.start, stop - whole.start)
                yield replace(
                    whole, name=part.name, shape=part.shape, start=start - part.start, param=whole.param[here],
                    exp_avg=whole.exp_avg[here],
                    exp_avg_sq=None if whole.exp_avg_sq is None else whole.exp_avg_sq[here],
                )  # fmt: skip

    def tensors(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's parameters by name, in their order, as views of whole flat parameters."""
        out = {name: param for name, param in params.items() if name not in self._parts}
        for name, parts in self._parts.items():
            if name in params:
                out |= {p.name: params[name].detach()[p.start : p.stop].view(p.shape) for p in parts}
        return dict(sorted(out.items(), key=lambda item: self._order[item[0]]))


class _SetViews:
    """Before a block's forward pass: set the views of a flat parameter where modules read their weights."""

    def __init__(self, name: str, parts: list[_Part], numel: int) -> None:
        self._name, self._sizes = name, [0] * (2 * len(parts))
        ends = [*(part.start for part in parts[1:]), numel]
        for index, (part, end) in enumerate(zip(parts, ends, strict=True)):
            self._sizes[2 * index : 2 * index + 2] = part.stop - part.start, end - part.stop
        self._targets = [(part.attributes, part.attribute, part.shape) for part in parts]

    def __call__(self, block: nn.Module, inputs: object) -> None:
        # One split: its backward pass is one concatenation. Slices would each have a gradient of the whole size.
        views = torch.split_with_sizes(block._parameters[self._name], self._sizes)  # type: ignore[arg-type]
        for (attributes, attribute, shape), view in zip(self._targets, views[::2], strict=True):
            attributes[attribute] = view.view(shape)


def flatten_blocks(model: nn.Module, weight_decay: float) -> FlatParameters:
    """Replace the parameters of each block by flat ones: one for each dtype in forward and each kind of weight decay.

    Raises:
        ValueError: for a parameter with requires_grad false.
    """
    require_trainable(model)
    flat, names = FlatParameters(model), {id(module): name for name, module in model.named_modules()}
    kept = {id(param) for param in float32_parameters(model)}
    for block in blocks_of(model):
        groups: dict[tuple[bool, bool], list[tuple[str, nn.Parameter]]] = {}
        for name, param in block.named_parameters():
            groups.setdefault((id(param) in kept, weight_decay != 0 and is_decayed(name, param)), []).append(
                (name, param)
            )
        for (float32, decayed), params in groups.items():
            added = flat.add(block, f"{names[id(block)]}.", params, decayed)
            if float32:
                flat.float32.append(added)
    return flat


def is_flat(config: EngineConfig, block_elements: Sequence[int], muon: bool) -> bool:
    """Whether an engine keeps the weights of blocks of these sizes in flat parameters.

    Args:
        muon: whether the optimizer is Muon, which orthogonalises matrices.
    """
    if muon or not config.can_flatten:
        return False
    if config.flat_parameters != "auto":
        return config.flat_parameters
    return (2 if config.precision == "bf16" else 4) * max(block_elements, default=0) <= FLAT_BYTES


def arrange(model: nn.Module, optimizer: AdamWConfig | MuonConfig, config: EngineConfig) -> FlatParameters:
    """Flatten the blocks of a model where the settings of an engine want it and it can.

    Raises:
        ValueError: for `flat_parameters: true` with Muon, which orthogonalises matrices, or with a parameter that
            several modules share.
    """
    muon, reason = isinstance(optimizer, MuonConfig), None
    if muon:
        reason = "with optimizer.kind adamw: Muon needs matrices"
    elif _shares_parameters(model):
        reason = f"for models whose modules share no parameter, which {type(model).__name__} does"
    if reason is not None and config.flat_parameters is True:
        raise ValueError(f"engine.flat_parameters: true; allowed {reason}")
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks_of(model)]
    if reason is None and is_flat(config, sizes, muon):
        return flatten_blocks(model, optimizer.weight_decay)
    return FlatParameters(model)


def _shares_parameters(model: nn.Module) -> bool:
    return len(list(model.named_parameters(remove_duplicate=False))) > len(list(model.parameters()))
