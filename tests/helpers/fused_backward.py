"""The cases of test_fused_backward. As a program it prints their results; Triton has to be an interpreter there."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from benchmarks.train_step import LAYOUT, batch_of
from sfd_scale.diffusion.conditioning import ClassLabels
from sfd_scale.diffusion.schedule import SemanticFirstSchedule
from sfd_scale.engines.block_transforms import Checkpointing, prepare_blocks
from sfd_scale.engines.fsdp import FSDPConfig, make_fsdp
from sfd_scale.engines.optim import AdamWConfig
from sfd_scale.models import fused_backward
from sfd_scale.models.lightningdit import Block, LightningDiT, LightningDiTConfig
from sfd_scale.models.rope import RotaryEmbedding2D
from sfd_scale.training.semantic_first import SemanticFirstConfig, SemanticFirstObjective


@dataclass(frozen=True)
class Case:
    samples: int
    side: int
    width: int
    heads: int
    dtype: str


# Tokens that fill no program, or two of them; heads of 72 and widths of 144 and 24 are no powers of two.
BLOCKS = {
    "head 72": Case(2, 7, 144, 2, "float32"),
    "head 72, bf16": Case(2, 7, 144, 2, "bfloat16"),
    "one sample": Case(1, 3, 24, 2, "float32"),
    "two programs for a sample": Case(1, 12, 8, 1, "float32"),
}
# Few, for the time of the interpreter: selective checkpointing saves some results of forward and computes others again.
ENGINES: tuple[Checkpointing, ...] = ("block",)
COMPILED: tuple[Checkpointing, ...] = ("selective",)
DEPTH = 1
CPU = torch.device("cpu")
LIBRARIES: list[torch.library.Library] = []


@contextlib.contextmanager
def used(width: int, heads: int) -> Iterator[None]:
    """The kernels are used, as in compiled training on a GPU."""
    with (
        mock.patch.object(fused_backward, "sums_by_sample", lambda device: True),
        mock.patch.dict(fused_backward._tried, {(width, heads): True}),
    ):
        yield


def block_gradients(
    case: Case, dtype: torch.dtype, prepare: Callable[[Block], None] = lambda block: None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of a block. Its weights and inputs are rounded to the dtype of the case first."""
    generator = torch.Generator().manual_seed(0)
    block = Block(LightningDiTConfig(depth=1, width=case.width, heads=case.heads))
    rounded = getattr(torch, case.dtype)
    with torch.no_grad():
        for name, param in block.named_parameters():
            drawn = torch.randn(param.shape, generator=generator) * param.shape[-1] ** -0.5
            # Without large queries and keys attention is flat, and their gradients are rounding errors.
            param.copy_((drawn + 2 if "norm" in name else drawn).to(rounded))
    shape = case.samples, case.side**2, case.width
    x, upstream = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    c = torch.randn(case.samples, case.width, generator=generator).to(rounded)
    block.to(dtype)
    prepare(block)
    x = x.to(torch.promote_types(dtype, torch.float32)).requires_grad_()  # the residual stream
    c = c.to(dtype).requires_grad_()
    out = block(x, c, RotaryEmbedding2D(case.width // case.heads, case.side))
    out.backward(upstream.to(out.dtype))
    leaves = {"tokens": x, "condition": c, **dict(block.named_parameters())}
    return out.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def block_case(case: Case) -> dict[str, Any]:
    _, exact = block_gradients(case, torch.float64)
    dtype = getattr(torch, case.dtype)
    plain_out, plain = block_gradients(case, dtype)
    with used(case.width, case.heads):
        (out, own), (_, again) = block_gradients(case, dtype), block_gradients(case, dtype)
    return {
        "same outputs": torch.equal(out, plain_out),
        "bits equal twice": all(torch.equal(own[name], again[name]) for name in exact),
        "own": {name: error(own[name], exact[name]) for name in exact},
        "plain": {name: error(plain[name], exact[name]) for name in exact},
    }


def compiled_case(mode: Checkpointing) -> float:
    """The largest relative error of a block that torch.compile traced, with checkpointing. The graph runs as it is."""
    case = BLOCKS["one sample"]
    compile_ = torch.compile

    def prepare(block: Block) -> None:
        model = torch.nn.Module()
        model.blocks = torch.nn.ModuleList([block])
        with mock.patch.object(torch, "compile", lambda f, options: compile_(f, backend="aot_eager", fullgraph=True)):
            prepare_blocks(model, mode, compiled=True)

    torch.compiler.reset()
    _, exact = block_gradients(case, torch.float64)
    with used(case.width, case.heads), mock.patch.object(fused_backward, "_operators", opaque_operators()):
        _, own = block_gradients(case, torch.float32, prepare)
    return max(error(own[name], exact[name]) for name in exact)


def zeros(like: Tensor) -> Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype).zero_()


@functools.cache
def opaque_operators() -> Any:
    """The operators as torch.compile does not look into them: it cannot trace a kernel that is interpreted."""
    library = torch.library.Library("sfd_test", "DEF")
    for name in ("norm_backward", "gated_norm_backward", "heads_backward"):
        operator = getattr(torch.ops.sfd_scale, name).default

        def fake(*arguments: Any, operator: Any = operator) -> Any:
            with unset_fake_temporarily():
                real = operator(*(zeros(a) if isinstance(a, Tensor) else a for a in arguments))
            return tuple(torch.empty(a.shape, dtype=a.dtype) for a in real)

        library.define(str(operator._schema).removeprefix("sfd_scale::"))
        library.impl(name, lambda *arguments, operator=operator: operator(*arguments), "CPU")
        torch.library.register_fake(f"sfd_test::{name}", fake, lib=library)
    LIBRARIES.append(library)  # its end would remove the operators
    return torch.ops.sfd_test


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def engine_case(mode: Checkpointing) -> tuple[float, int]:
    """Relative difference of all gradients of one bf16 step, and the number of norms that our kernels did."""
    with mock.patch.object(torch.ops.sfd_scale, "norm_backward", wraps=torch.ops.sfd_scale.norm_backward) as first:
        gated = torch.ops.sfd_scale.gated_norm_backward
        with mock.patch.object(torch.ops.sfd_scale, "gated_norm_backward", wraps=gated) as second:
            plain = engine_gradients(mode)
            assert not first.called and not second.called
            with used(32, 2):
                own = engine_gradients(mode)
    squares = [((own[name] - plain[name]).square().sum(), plain[name].square().sum()) for name in plain]
    return math.sqrt(sum(float(a) for a, _ in squares) / sum(float(b) for _, b in squares)), (
        first.call_count + second.call_count
    )


def engine_gradients(mode: Checkpointing) -> dict[str, Tensor]:
    config = LightningDiTConfig(depth=DEPTH, width=32, heads=2, num_classes=1000)
    model = LightningDiT(config, in_channels=LAYOUT.channels, input_size=LAYOUT.size, two_clocks=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(std=0.2, generator=generator)
    engine = make_fsdp(model, AdamWConfig(), FSDPConfig(precision="bf16", activation_checkpointing=mode))
    schedule = SemanticFirstSchedule(delta_t=0.3)
    settings = SemanticFirstConfig(alignment_weight=0.0)
    objective = SemanticFirstObjective(settings, LAYOUT, schedule, ClassLabels(1000), seed=0)
    engine.backward(objective(engine.model, batch_of(1)).total, last=True)
    found = {name: param.grad.to_local().clone() for name, param in engine.model.named_parameters()}  # type: ignore
    engine.close()
    return engine.flat.tensors(found)


def main() -> None:
    fused_backward.load()
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        "blocks": {name: block_case(case) for name, case in BLOCKS.items()},
        "engines": {mode: engine_case(mode) for mode in ENGINES},
        "compiled": {mode: compiled_case(mode) for mode in COMPILED},
        "errors": fused_backward.errors(CPU, 144, 2, torch.float32, samples=1, tokens=33),
        "unusable": fused_backward.unusable(CPU, 48, 2),
    }
    right = fused_backward._of_norm

    def wrong(sums: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dweight, dshift, dscale = right(sums, weight, scale)
        return dweight, 2 * dshift, dscale

    with mock.patch.object(fused_backward, "_of_norm", wrong):
        found["unusable, shift doubled"] = fused_backward.unusable(CPU, 48, 2)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
