"""LightningDiT: sizes, counts, start values, precision, attention kernels, settings."""

from __future__ import annotations

import time

import pytest
import torch
from test_models_golden import CLOCKS, golden_model, inputs
from torch.utils.flop_counter import FlopCounterMode

from sfd_scale.models import attention as kernels
from sfd_scale.models.alignment import AlignmentConfig
from sfd_scale.models.lightningdit import (
    SIZES,
    LightningDiT,
    LightningDiTConfig,
    flops_per_sample,
    parameter_count,
    without_alignment,
)

TINY = LightningDiTConfig(
    size=None, depth=3, width=64, heads=4, in_channels=12, input_size=8, num_classes=10, alignment=AlignmentConfig()
)


# The authors' counts, with the alignment head, for 48 channels on a 16 × 16 grid and 1000 classes.
@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("B", 137_632_304),
        ("L", 465_533_712),
        ("XL", 682_765_424),
        ("XXL", 1_037_191_472),
        ("1p6B", 1_639_664_480),
    ],
)
def test_parameter_counts_are_the_authors(size: str, count: int) -> None:
    start = time.monotonic()
    config = LightningDiTConfig(size=size)  # type: ignore[arg-type]
    assert parameter_count(config) == count
    head = 2048 * (config.dimensions.width + 1) + 2048 * 2049 + 768 * 2049
    assert parameter_count(without_alignment(config)) == count - head
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("size", SIZES)
def test_state_dict_keys_and_shapes(size: str) -> None:
    with torch.device("meta"):
        state = LightningDiT(LightningDiTConfig(size=size, patch_size=2)).state_dict()  # type: ignore[arg-type]
    depth, width, heads = SIZES[size]
    hidden = int(2 / 3 * 4 * width)
    assert state[f"blocks.{depth - 1}.mlp.w12.weight"].shape == (2 * hidden, width)
    assert state["blocks.0.attn.q_norm.weight"].shape == (width // heads,)
    assert state["t_embedder_sem.mlp.0.weight"].shape == (width // 2, 256)
    assert state["y_embedder.embedding_table.weight"].shape == (1001, width)
    assert state["final_layer.linear.weight"].shape == (4 * 48, width)
    assert state["feat_rope.freqs_cos"].shape == (64, width // heads)
    assert state["pos_embed"].shape == (1, 64, width)
    assert f"blocks.{depth}.norm1.weight" not in state


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        LightningDiTConfig(size=None, depth=2, width=96, heads=4, patch_size=2, input_size=8, in_channels=5,
                           two_clocks=False, mlp="gelu", modulation="scale", learn_sigma=True, alignment=None),
    ],
)  # fmt: skip
def test_flops_are_those_that_torch_counts(config: LightningDiTConfig) -> None:
    model = LightningDiT(config)
    x = torch.zeros(2, config.in_channels, config.input_size, config.input_size)
    t, y = torch.zeros(2), torch.zeros(2, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(x, t, t, y)
    assert counter.get_total_flops() == 2 * flops_per_sample(config, training=False)
    assert flops_per_sample(config, training=True) == 3 * flops_per_sample(config, training=False)


def test_start_values() -> None:
    model = LightningDiT(TINY)
    model.init_weights(0)
    state = model.state_dict()
    for name in ("blocks.0.adaLN_modulation.1.weight", "final_layer.linear.weight"):
        assert not state[name].any(), name
    assert state["t_embedder_tex.mlp.2.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert state["y_embedder.embedding_table.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    # Xavier-uniform: bounds ±√(6 / (fan in + fan out)), over the fused matrix, and over flattened patches.
    for name, fans in (("blocks.1.attn.qkv.weight", 64 + 192), ("x_embedder.proj.weight", 12 + 64)):
        bound = (6 / fans) ** 0.5
        assert 0.97 * bound < state[name].abs().max() <= bound, name
    assert all(not value.any() for name, value in state.items() if name.endswith("bias"))
    assert all(bool((value == 1).all()) for name, value in state.items() if "norm" in name)
    velocity, _ = model(torch.ones(1, 12, 8, 8), torch.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    assert not velocity.any()


def test_start_values_depend_on_seed_and_name_alone() -> None:
    first, second, other = LightningDiT(TINY), LightningDiT(without_alignment(TINY)), LightningDiT(TINY)
    with torch.device("meta"):
        meta = LightningDiT(TINY)
    late = meta.to_empty(device="cpu")
    for model, seed in ((first, 3), (second, 3), (late, 3), (other, 4)):
        model.init_weights(seed)
    for name, value in second.state_dict().items():
        assert torch.equal(value, first.state_dict()[name]), name
    for name, value in late.state_dict().items():
        assert torch.equal(value, first.state_dict()[name]), name
    assert not torch.equal(other.x_embedder.proj.weight, first.x_embedder.proj.weight)
    assert not torch.equal(first.blocks[0].attn.qkv.weight, first.blocks[1].attn.qkv.weight)


def test_bfloat16_weights() -> None:
    """Inputs stay float32 and are cast inside; times and tables keep their digits; the velocity is float32."""
    model = golden_model("main")
    exact, _ = model(inputs["fwd_x"], *CLOCKS, inputs["fwd_y"])
    table = model.pos_embed.clone()
    model.to(torch.bfloat16)
    assert model.pos_embed.dtype == torch.float32 and torch.equal(model.pos_embed, table)
    assert model.feat_rope is not None and model.feat_rope.freqs_cos.dtype == torch.float32
    assert model.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    rough, projected = model(inputs["fwd_x"], *CLOCKS, inputs["fwd_y"])
    assert rough.dtype == torch.float32 and projected is not None and projected.dtype == torch.float32
    assert 1e-4 < ((rough - exact).norm() / exact.norm()).item() < 3e-2
    # Two times that bfloat16 cannot tell apart still give different time features.
    times = torch.tensor([0.5, 0.5005])
    embedded = model.t_embedder_sem(times, torch.bfloat16)
    assert not torch.equal(embedded[0], embedded[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "B", "depth": 3}, "size: B"),
        ({"size": None, "depth": 3}, "size: null"),
        ({"size": None, "depth": 3, "width": 66, "heads": 4}, "width: 66"),
        ({"patch_size": 3}, "patch_size: 3"),
        ({"num_classes": 0}, "num_classes: 0"),
        ({"size": None, "depth": 1, "width": 64, "heads": 4}, "alignment.depth: 2"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LightningDiTConfig(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["dim", "depth", "hidden"])
def test_alignment_settings_that_cannot_be(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: 0"):
        AlignmentConfig(**{name: 0})


# --------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("backend", ["auto", "sdpa", "math"])
def test_attention_is_its_formula(backend: kernels.AttentionBackend) -> None:
    q, k, v = torch.randn(3, 2, 4, 16, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    formula = torch.softmax(q @ k.mT / 8**0.5, dim=-1) @ v
    torch.testing.assert_close(kernels.attention(q, k, v, backend), formula, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["flash2", "flash3", "flash4"])
def test_a_kernel_that_cannot_run_is_refused(backend: kernels.AttentionBackend) -> None:
    with pytest.raises(ValueError, match=f"attention: {backend}; it needs a CUDA device.*allowed here: auto"):
        kernels.prepare(backend, torch.device("cpu"), torch.bfloat16)


def test_auto_says_why_it_takes_another_kernel() -> None:
    cpu = torch.device("cpu")
    assert "flash3 not used: it needs a CUDA device" in kernels.prepare("auto", cpu, torch.bfloat16)
    assert kernels.prepare("sdpa", cpu, torch.float32) == "attention: sdpa"


def test_the_record_names_the_operator_that_ran() -> None:
    cpu = torch.device("cpu")
    fused = kernels.describe_attention("sdpa", cpu, torch.float32, 72)
    plain = kernels.describe_attention("math", cpu, torch.float32, 72)
    assert "flash_attention_for_cpu" in fused["operators"]
    assert "flash" not in plain["operators"] and "softmax" in plain["operators"]
