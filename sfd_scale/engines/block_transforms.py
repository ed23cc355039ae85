"""Activation checkpointing and torch.compile for the repeated blocks of a model, before an engine wraps it.

Both replace the `forward` of a block, not the block: parameter names stay, and the engine's hooks, which gather and
release weights, run outside the checkpointed and compiled region.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sfd_scale.runtime.matmul import inherit_matmul_mode

Checkpointing = Literal["none", "selective", "block"]
# What the selective mode keeps, because computing it again costs the most: matrix products and attention.
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


def blocks_of(model: nn.Module) -> Sequence[nn.Module]:
    """The repeated blocks, `model.blocks`; empty for a model without."""
    blocks = getattr(model, "blocks", None)
    return list(blocks) if isinstance(blocks, nn.ModuleList) else []


def prepare_blocks(model: nn.Module, checkpointing: Checkpointing, compiled: bool, check: bool = True) -> None:
    """Checkpoint the activations of every block (all, or all but `KEPT`), then compile it.

    Args:
        check: compare shape and type of what is computed again; off where the engine frees weights in between, whose
            saved shape is then 0.

    Raises:
        ValueError: where the model has no blocks to apply it to.
    """
    blocks = blocks_of(model)
    if not blocks and (compiled or checkpointing != "none"):
        raise ValueError(
            f"{type(model).__name__} has no repeated `blocks`; allowed: activation_checkpointing none, compile false"
        )
    for block in blocks:
        forward: Any = block.forward
        if checkpointing != "none":
            options: dict[str, Any] = {"use_reentrant": False, "determinism_check": "default" if check else "none"}
            if not compiled:
                options["context_fn"] = functools.partial(_contexts, checkpointing == "selective")
            elif checkpointing == "selective":
                options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
            # No dropout: every draw is keyed and happens in the objective, so no generator state needs to be kept.
            forward = functools.partial(checkpoint, forward, preserve_rng_state=False, **options)
        if compiled:
            forward = torch.compile(forward)
        object.__setattr__(block, "forward", forward)


# Products that float8 takes: those of every token. The condition's and the ends' are small, and less tolerant.
_FLOAT8 = ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3", "mlp.fc1", "mlp.fc2")


def float8_missing(device: torch.device) -> str | None:
    """Why float8 products cannot run on this device, or None."""
    if importlib.util.find_spec("torchao") is None:
        return "it needs the package torchao"
    if device.type != "cuda":
        return "it needs a CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 9):
        return "it needs a GPU of compute capability 8.9 or newer"
    return None


def use_float8(model: nn.Module, device: torch.device) -> None:
    """Replace the linear layers of attention and MLP by torchao's float8 ones, scaled by rows; their weights stay.

    Raises:
        ValueError: where float8 cannot run, with the reason.
    """
    reason = float8_missing(device)
    if reason is not None:
        raise ValueError(f"engine.float8: true, but {reason}; set it to false")
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def taken(module: nn.Module, name: str) -> bool:
        # The kernels need both sides in multiples of 16.
        return name.endswith(_FLOAT8) and isinstance(module, nn.Linear) and not any(n % 16 for n in module.weight.shape)

    for block in blocks_of(model):
        config = Float8LinearConfig.from_recipe_name("rowwise")
        convert_to_float8_training(block, config=config, module_filter_fn=taken)


def _contexts(selective: bool) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Of forward, and of computing it again, where the way that its products took would be forgotten."""
    first, again = create_selective_checkpoint_contexts(_policy) if selective else (nullcontext(), nullcontext())
    return first, _both(again, inherit_matmul_mode())


@contextmanager
def _both(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    with outer, inner:
        yield


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op in KEPT or str(op).startswith("flash_attn._flash_attn_forward")  # there where that package is imported
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
