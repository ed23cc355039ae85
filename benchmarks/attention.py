"""Self-attention of one block, forward and backward, with head dims 64 and 72: ours and the baseline, both eager."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks import peer as baseline
from benchmarks.harness import Figure, Options
from benchmarks.peer import SIDE
from sfd_scale.models.attention import Attention
from sfd_scale.models.rope import RotaryEmbedding2D

HEADS = 4


def run(options: Options) -> list[Figure]:
    """Self-attention throughput: fp32, batch 8, 256 tokens, 4 heads."""
    count = 1 if options.quick else 8
    figures = []
    for head_dim in (64, 72):
        width = HEADS * head_dim
        ours, theirs = Attention(width, HEADS, qk_norm="rmsnorm"), baseline.attention(width, HEADS)
        theirs.load_state_dict(ours.state_dict())
        rope = RotaryEmbedding2D(head_dim, SIDE)
        generator = torch.Generator().manual_seed(0)
        x, upstream = (torch.randn(count, SIDE**2, width, generator=generator) for _ in range(2))
        contenders = {
            "ours": lambda m=ours, r=rope, x=x, up=upstream: _both(m, (r,), x, up),
            "peer": lambda m=theirs, r=rope, x=x, up=upstream: _both(m, (r.freqs_cos, r.freqs_sin), x, up),
        }
        seconds = harness.race(contenders, options.repeats or (2 if options.quick else 15), warmup=2)  # type: ignore[arg-type]
        figures.append(
            harness.compare(
                f"attention, head dim {head_dim}, batch {count}",
                seconds,
                against="official arithmetic",
                work=count,
                unit="samples/s",
                target=None,
            )  # fmt: skip
        )
    return figures


def _both(module: nn.Module, tables: tuple[object, ...], x: Tensor, upstream: Tensor) -> None:
    module.zero_grad()
    x = x.detach().requires_grad_()
    module(x, *tables).backward(upstream)


if __name__ == "__main__":
    harness.main("attention", run)
