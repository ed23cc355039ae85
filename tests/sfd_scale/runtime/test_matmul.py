"""bf16 matmuls on CPUs without bf16 instructions: the rounded float32 result, in value and gradient."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sfd_scale.engines.block_transforms import prepare_blocks
from sfd_scale.runtime.matmul import MatmulInFloat32

torch.manual_seed(0)
A, B, BIAS = torch.randn(7, 33), torch.randn(5, 33), torch.randn(5)
IMAGE, KERNEL = torch.randn(2, 3, 9, 9), torch.randn(4, 3, 3, 3)
QKV = torch.randn(3, 2, 4, 6, 8)

CASES = {
    "linear": (lambda a, b, c: functional.linear(a, b, c), (A, B, BIAS)),
    "keyword": (lambda a, b, c: functional.linear(a, weight=b, bias=c), (A, B, BIAS)),
    "matmul": (lambda a, b: a @ b.T, (A, B)),
    "conv": (lambda x, w: functional.conv2d(x, w, padding=1), (IMAGE, KERNEL)),
    "attention": (functional.scaled_dot_product_attention, tuple(QKV)),
}


def _value_and_gradients(function, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    (out.float() ** 2).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("name", CASES)
def test_a_bf16_matmul_equals_the_rounded_float32_matmul(name: str) -> None:
    function, inputs = CASES[name]
    rounded = tuple(x.bfloat16() for x in inputs)
    with MatmulInFloat32():
        ours = _value_and_gradients(function, rounded)
    wide = [x.float() for x in rounded]
    exact = _value_and_gradients(lambda *xs: function(*xs).bfloat16(), tuple(wide))
    for own, want in zip(ours, exact, strict=True):
        assert own.dtype == torch.bfloat16
        torch.testing.assert_close(own, want.bfloat16(), rtol=0, atol=0)


def test_matmuls_of_other_dtypes_stay_unchanged() -> None:
    with MatmulInFloat32():
        assert torch.equal(functional.linear(A, B), A @ B.T)
        assert (A.double() @ B.double().T).dtype == torch.float64
    assert (A.bfloat16() @ B.bfloat16().T).dtype == torch.bfloat16


@pytest.mark.parametrize("mode", ["block", "selective"])
def test_recomputation_uses_the_same_matmuls(mode: Literal["block", "selective"]) -> None:
    """With activation checkpointing autograd calls the block again, outside the mode."""
    gradients = {}
    for checkpointing in ("none", mode):
        model = nn.Module()
        model.blocks = nn.ModuleList([nn.Sequential(nn.Linear(33, 33), nn.Tanh()).bfloat16()])
        for parameter in model.parameters():
            parameter.data.copy_(torch.linspace(-0.3, 0.3, parameter.numel()).view_as(parameter))
        prepare_blocks(model, checkpointing, compiled=False)
        with MatmulInFloat32():
            model.blocks[0](A.bfloat16()).float().square().sum().backward()
        gradients[checkpointing] = [parameter.grad for parameter in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(*gradients.values(), strict=True))  # type: ignore[arg-type]
