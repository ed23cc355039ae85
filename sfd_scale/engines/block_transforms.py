"""Activation checkpointing, torch.compile and float8 for the repeated blocks of a model, before an engine wraps it.

Checkpointing and compilation replace the `forward` of a block and not the block. So parameter names stay, and the
engine's hooks, which gather and free weights, run outside the checkpointed and compiled region.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sfd_scale.models import attention, fused_backward
from sfd_scale.models.layers import RMSNorm
from sfd_scale.runtime.matmul import inherit_matmul_mode

Checkpointing = Literal["none", "selective", "block"]
# The selective mode saves the outputs of matmuls and attention, which cost the most to recompute.
KEPT = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten._scaled_mm.default,  # float8
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)


# inductor stores an intermediate result that several kernels read, or that many operations lead to. A block is bound by
# memory traffic, so that computing it again is cheaper: 8% fewer bytes for XXL (benchmarks/compiled.py).
_RECOMPUTE = {"realize_reads_threshold": 16, "realize_opcount_threshold": 300, "realize_acc_reads_threshold": 32}


def compile_options() -> dict[str, Any] | None:
    """Options of torch.compile on this machine: those of GPUs, or its defaults on a CPU."""
    return dict(_RECOMPUTE) if torch.cuda.is_available() else None


def blocks_of(model: nn.Module) -> Sequence[nn.Module]:
    """The repeated blocks, `model.blocks`; empty if the model has none."""
    blocks = getattr(model, "blocks", None)
    return list(blocks) if isinstance(blocks, nn.ModuleList) else []


def prepare_blocks(model: nn.Module, checkpointing: Checkpointing, compiled: bool, check: bool = True) -> None:
    """Apply activation checkpointing to every block, then torch.compile.

    Args:
        checkpointing: `block` recomputes all activations in the backward pass, `selective` all but outputs of `KEPT`.
        check: compare shapes and dtypes of recomputed tensors with the first ones. Set it to False for an engine that
            frees weights between forward and backward: their saved shape is 0.

    Raises:
        ValueError: if the model has no blocks.
    """
    blocks = blocks_of(model)
    if not blocks and (compiled or checkpointing != "none"):
        raise ValueError(
            f"{type(model).__name__} has no repeated `blocks`; set engine.activation_checkpointing to none and "
            "engine.compile to false"
        )
    if compiled and model.training and torch.cuda.is_available():
        fused_backward.prepare(attention.shapes(model), torch.device("cuda", torch.cuda.current_device()))
    for block in blocks:
        forward: Any = block.forward
        if checkpointing != "none":
            options: dict[str, Any] = {"use_reentrant": False, "determinism_check": "default" if check else "none"}
            if not compiled:
                options["context_fn"] = functools.partial(_contexts, checkpointing == "selective")
            elif checkpointing == "selective":
                options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
            # Models have no dropout; the objective draws all random numbers. So no generator state needs to be saved.
            forward = functools.partial(checkpoint, forward, preserve_rng_state=False, **options)
        if compiled:
            forward = torch.compile(forward, options=compile_options())
        object.__setattr__(block, "forward", forward)


def float32_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that autocast leaves in float32: of norms and embeddings. Rounding them gains no speed."""
    layers = (RMSNorm, nn.LayerNorm, nn.Embedding)
    return [p for module in model.modules() if isinstance(module, layers) for p in module.parameters(recurse=False)]


# Float8 is for the matmuls over all tokens. Those of the condition and of the first and last layer are small, and need
# more precision.
_TORCHAO = "0.18"
_FLOAT8 = ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3", "mlp.fc1", "mlp.fc2")


def float8_missing(device: torch.device) -> str | None:
    """Why float8 matmuls cannot run on this device, or None if they can."""
    found = importlib.metadata.version("torchao") if importlib.util.find_spec("torchao") else None
    if found is None:
        return f"it needs the package torchao, release {_TORCHAO} or newer"
    from packaging.version import (
        Version,
    )  # here: benchmarks/gpu imports this file on machines with torch and numpy alone

    if Version(found) < Version(_TORCHAO):
        # Its compiled float8 kernels of backward can give NaN or Inf.
        return f"it needs torchao {_TORCHAO} or newer, and {found} is installed"
    if device.type != "cuda":
        return "it needs a CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 9):
        return "it needs a GPU of compute capability 8.9 or newer"
    return None


def use_float8(model: nn.Module, device: torch.device) -> None:
    """Replace the linear layers of attention and MLP by torchao's float8 layers, scaled by rows. The weights stay.

    Raises:
        ValueError: if float8 cannot run on the device; the message says why.
    """
    reason = float8_missing(device)
    if reason is not None:
        raise ValueError(f"engine.float8: true, but {reason}; set it to false")
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def taken(module: nn.Module, name: str) -> bool:
        # The kernels need both dimensions to be multiples of 16.
        return name.endswith(_FLOAT8) and isinstance(module, nn.Linear) and not any(n % 16 for n in module.weight.shape)

    for block in blocks_of(model):
        config = Float8LinearConfig.from_recipe_name("rowwise")
        convert_to_float8_training(block, config=config, module_filter_fn=taken)


def _contexts(selective: bool) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts of forward and of recomputation. Recomputation must inherit the matmul mode of forward."""
    first, again = create_selective_checkpoint_contexts(_policy) if selective else (nullcontext(), nullcontext())
    return first, _both(again, inherit_matmul_mode())


@contextmanager
def _both(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    with outer, inner:
        yield


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op in KEPT or str(op).startswith("flash_attn._flash_attn_forward")  # exists once flash_attn is imported
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
