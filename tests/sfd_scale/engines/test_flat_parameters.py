"""Flat parameters: fewer parameters for the engines, and the same gradients, names and shapes for everyone else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfd_scale.engines.deepspeed import DeepSpeedConfig
from sfd_scale.engines.engine import Fragment
from sfd_scale.engines.flat_parameters import FlatParameters, arrange, flatten_blocks
from sfd_scale.engines.fsdp import FSDPConfig
from sfd_scale.engines.muon import MuonConfig
from sfd_scale.engines.optim import AdamWConfig, param_groups
from sfd_scale.models.lightningdit import LightningDiT, LightningDiTConfig
from tests.helpers.ranks import run_alone
from tests.helpers.tiny import Spec, TinyModel, batch, make_engine

SHAPES = {name: tuple(param.shape) for name, param in TinyModel().named_parameters()}


def lightningdit() -> LightningDiT:
    config = LightningDiTConfig(depth=2, width=48, heads=2)
    model = LightningDiT(config, in_channels=4, input_size=4, two_clocks=True)
    model.init_weights(0)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for param in model.parameters():
            param.add_(0.05 * torch.randn(param.shape, generator=generator))
    return model


def outputs_and_gradients(model: nn.Module, flat: FlatParameters, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    out = model(*inputs)
    out = out if isinstance(out, Tensor) else out[0]
    (out * torch.linspace(0, 1, out.numel()).view(out.shape)).sum().backward()
    gradients = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    return {"output": out.detach(), **flat.tensors(gradients)}


LATENTS = (torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(2)), torch.tensor([0.2, 0.9]))
MODELS: dict[str, Any] = {
    "tiny": (TinyModel, batch(0)[:1]),
    "lightningdit": (lightningdit, (*LATENTS, torch.tensor([0.4, 1.0]), torch.tensor([1, 3]))),
}


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("kind", MODELS)
def test_output_and_every_gradient_are_those_of_the_model(kind: str, decay: float) -> None:
    make, inputs = MODELS[kind]
    whole, flattened = make(), make()
    expected = outputs_and_gradients(whole, FlatParameters(whole), inputs)
    flat = flatten_blocks(flattened, decay)
    found = outputs_and_gradients(flattened, flat, inputs)
    assert list(found) == list(expected) and len(found) > 10
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    # Again, after an update in place, without gradients: the views follow their flat parameters.
    with torch.no_grad():
        for param in (*whole.parameters(), *flattened.parameters()):
            param.mul_(0.5)
        one, other = whole(*inputs), flattened(*inputs)
    assert torch.equal(one if isinstance(one, Tensor) else one[0], other if isinstance(other, Tensor) else other[0])


def test_a_block_has_one_parameter_for_each_dtype_and_kind_of_decay() -> None:
    for decay, count in ((0.0, 1), (0.1, 2)):
        model = TinyModel()
        flatten_blocks(model, decay)
        assert [len(list(block.parameters())) for block in model.blocks] == [count] * 3
    model, before = lightningdit(), lightningdit()
    flat = flatten_blocks(model, 0.0)
    assert [len(list(block.parameters())) for block in (model.blocks[0], before.blocks[0])] == [2, 14]
    norms = [p for name, p in before.blocks[0].named_parameters() if "norm" in name]
    assert [param.numel() for param in flat.float32] == [sum(math.ceil(p.numel() / 16) * 16 for p in norms)] * 2


def test_views_start_at_aligned_addresses() -> None:
    model = TinyModel()
    flatten_blocks(model, 0.0)
    model(batch(0)[0])
    block: Any = model.blocks[1]
    weights = [block.up.weight, block.up.bias, block.down.weight, block.down.bias, block.gate]
    assert [w.storage_offset() % 16 for w in weights] == [0] * 5
    assert len({w.untyped_storage().data_ptr() for w in weights}) == 1


def test_weight_decay_is_for_the_same_weights() -> None:
    model = TinyModel()
    flat = flatten_blocks(model, 0.1)
    values = {id(param): name for name, param in model.named_parameters()}
    groups = param_groups(model, AdamWConfig(weight_decay=0.1), decayed=flat.is_decayed)
    names = [flat.tensors({values[id(p)]: p for p in group["params"]}) for group in groups]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert list(names[0]) == [name for name, shape in SHAPES.items() if len(shape) >= 2]
    assert list(names[1]) == [name for name, shape in SHAPES.items() if len(shape) < 2]


@pytest.mark.parametrize("ranks", [1, 3, 50])
def test_fragments_of_flat_parameters_are_fragments_of_the_model(ranks: int) -> None:
    """Cut each flat parameter into equal ranges, as FSDP2 does, with the moments in the same places."""
    model = TinyModel()
    weights = {name: param.detach().clone() for name, param in model.named_parameters()}
    flat = flatten_blocks(model, 0.1)
    found: list[Fragment] = []
    for rank in range(ranks):
        cut = []
        for name, param in model.named_parameters():
            values, size = param.detach().view(-1), math.ceil(param.numel() / ranks)
            start = min(rank * size, param.numel())
            local = values[start : start + size]
            if local.numel():
                cut.append(Fragment(name, tuple(param.shape), start, local, 2 * local, 3 * local, rank == 0))
        mine = flat.fragments(cut)
        assert [f.name for f in mine] == sorted((f.name for f in mine), key=list(SHAPES).index)
        assert all(f.primary == (rank == 0) and f.param.numel() for f in mine)
        found += mine
    out = {name: torch.full((math.prod(shape),), math.nan) for name, shape in SHAPES.items()}
    for f in found:
        assert f.shape == SHAPES[f.name] and out[f.name][f.start : f.stop].isnan().all()
        out[f.name][f.start : f.stop] = f.param
        assert f.exp_avg_sq is not None
        assert torch.equal(f.exp_avg, 2 * f.param) and torch.equal(f.exp_avg_sq, 3 * f.param)
        f.param.fill_(7.0)
    assert all(torch.equal(out[name].view(SHAPES[name]), value) for name, value in weights.items())
    assert all(value.eq(7.0).all() for value in flat.tensors(dict(model.named_parameters())).values()), "same memory"


def test_a_frozen_parameter_is_refused() -> None:
    model = TinyModel()
    model.blocks[1].gate.requires_grad_(False)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"requires_grad false: blocks\.1\.gate; register constants as buffers"):
        flatten_blocks(model, 0.0)


ENGINES = {
    "fsdp": (Spec("fsdp", {"precision": "bf16"}), {"flat_0", "flat_1"}),
    "zero1": (Spec("deepspeed", {"zero_stage": 1}), {"flat_0", "flat_1"}),
    "zero3": (Spec("deepspeed", {"zero_stage": 3}), set()),
    "muon": (Spec("fsdp", {"precision": "bf16"}), set()),
}


def names() -> dict[str, Any]:
    out = {}
    for kind, (spec, _) in ENGINES.items():
        engine = make_engine(spec, **({"optimizer": MuonConfig()} if kind == "muon" else {}))
        flat = {name.rpartition(".")[2] for name, _ in engine.model.named_parameters() if "flat" in name}
        out[kind] = flat, [fragment.name for fragment in engine.fragments()], list(engine.replicas().tensors)
        engine.close()
    return out


def test_engines_take_flat_parameters_and_name_those_of_the_model() -> None:
    found = run_alone(names)
    for kind, (_, flat) in ENGINES.items():
        assert found[kind][0] == flat, kind
        assert found[kind][1] == list(SHAPES), kind
    assert found["zero1"][2] == list(SHAPES)


@pytest.mark.parametrize(("size", "flat"), [("S", True), ("B", True), ("L", False), ("XXL", False)])
def test_auto_is_for_small_blocks(size: Any, flat: bool) -> None:
    with torch.device("meta"):
        model = LightningDiT(LightningDiTConfig(size=size), in_channels=48, input_size=16, two_clocks=True)
    arrange(model, AdamWConfig(), FSDPConfig())
    assert len(list(model.blocks[0].parameters())) == (2 if flat else 14)


def test_flat_parameters_are_refused_where_they_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"flat_parameters: true; allowed with zero_stage 0, 1, 2, or with the fsdp"):
        DeepSpeedConfig(zero_stage=3, flat_parameters=True)
    with pytest.raises(ValueError, match=r"flat_parameters: true; allowed with float8 false"):
        FSDPConfig(float8=True, compile=True, flat_parameters=True)
    with pytest.raises(ValueError, match=r"engine\.flat_parameters: true; allowed with optimizer\.kind adamw"):
        arrange(TinyModel(), MuonConfig(), FSDPConfig(flat_parameters=True))


def test_shared_parameters_stay_shared() -> None:
    model: Any = TinyModel()
    model.blocks[2].gate = model.blocks[0].gate
    with pytest.raises(ValueError, match=r"flat_parameters: true; allowed for models whose modules share no parameter"):
        arrange(model, AdamWConfig(), FSDPConfig(flat_parameters=True))
    arrange(model, AdamWConfig(), FSDPConfig())
    assert model.blocks[2].gate is model.blocks[0].gate and len(list(model.parameters())) == len(SHAPES) - 1
