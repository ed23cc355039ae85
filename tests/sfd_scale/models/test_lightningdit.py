"""LightningDiT: sizes, counts, start values, precision, attention kernels, settings."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sfd_scale.models import attention, attention_speed, layers
from sfd_scale.models.alignment import AlignmentConfig
from sfd_scale.models.lightningdit import SIZES, LightningDiT, LightningDiTConfig, parameter_count
from tests.helpers.golden_arrays import arrays, golden_model

inputs = arrays("inputs")
CLOCKS = (inputs["fwd_t_tex"], inputs["fwd_t_sem"])
TINY = LightningDiTConfig(depth=3, width=64, heads=4, num_classes=10, alignment=AlignmentConfig())
SMALL = {"in_channels": 12, "input_size": 8, "two_clocks": True}


# The authors' counts, with the alignment head, for 48 channels on a 16 × 16 grid and 1000 classes.
@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("S", 39_483_824),
        ("B", 137_632_304),
        ("L", 465_533_712),
        ("XL", 682_765_424),
        ("XXL", 1_037_191_472),
        ("1p6B", 1_639_664_480),
    ],
)
def test_parameter_counts_are_the_authors(size: str, count: int) -> None:
    start = time.monotonic()
    config = LightningDiTConfig(size=size, alignment=AlignmentConfig())  # type: ignore[arg-type]
    assert parameter_count(config) == count
    body, head = counts_by_hand(*config.dimensions)
    assert body + head == count
    assert parameter_count(dataclasses.replace(config, alignment=None)) == body
    assert time.monotonic() - start < 10


def counts_by_hand(depth: int, width: int, heads: int) -> tuple[int, int]:
    """Of the model without its alignment head, and of the head; a linear layer from a to b has (a + 1) · b."""
    hidden, channels = int(8 / 3 * width), 48
    attention = (width + 1) * 3 * width + (width + 1) * width + 2 * (width // heads)
    mlp = (width + 1) * 2 * hidden + (hidden + 1) * width
    block = attention + mlp + 2 * width + (width + 1) * 6 * width
    clock = 257 * (width // 2) + (width // 2 + 1) * (width // 2)
    ends = (channels + 1) * width + 2 * clock + 1001 * width + 256 * width
    last = width + (width + 1) * channels + (width + 1) * 2 * width
    return depth * block + ends + last, (width + 1) * 2048 + 2049 * 2048 + 2049 * 768


@pytest.mark.parametrize("size", SIZES)
def test_state_dict_keys_and_shapes(size: str) -> None:
    with torch.device("meta"):
        config = LightningDiTConfig(size=size, patch_size=2)  # type: ignore[arg-type]
        state = LightningDiT(config, in_channels=48, input_size=16, two_clocks=True).state_dict()
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


def test_start_values() -> None:
    model = LightningDiT(TINY, **SMALL)
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
    first, second, other = (
        LightningDiT(TINY, **SMALL),
        LightningDiT(dataclasses.replace(TINY, alignment=None), **SMALL),
        LightningDiT(TINY, **SMALL),
    )
    with torch.device("meta"):
        meta = LightningDiT(TINY, **SMALL)
    late = meta.to_empty(device="cpu")
    for model, seed in ((first, 3), (second, 3), (late, 3), (other, 4)):
        model.init_weights(seed)
    for name, value in second.state_dict().items():
        assert torch.equal(value, first.state_dict()[name]), name
    for name, value in late.state_dict().items():
        assert torch.equal(value, first.state_dict()[name]), name
    assert not torch.equal(other.x_embedder.proj.weight, first.x_embedder.proj.weight)
    assert not torch.equal(first.blocks[0].attn.qkv.weight, first.blocks[1].attn.qkv.weight)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_patches_are_those_of_the_convolution_and_lie_token_by_token(patch_size: int) -> None:
    """Every block gets contiguous tokens: a convolution's transposed output would pass on from sum to sum."""
    model = LightningDiT(dataclasses.replace(TINY, patch_size=patch_size), **SMALL)
    model.init_weights(0)
    seen: list[Tensor] = []
    for part in (*model.blocks, model.final_layer):
        part.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.randn(2, 12, 8, 8, generator=torch.Generator().manual_seed(0))
    model(x, torch.rand(2), torch.rand(2), torch.zeros(2, dtype=torch.int64))
    assert len(seen) == 4 and all(tokens.is_contiguous() for tokens in seen)
    proj = model.x_embedder.proj
    convolved = functional.conv2d(x, proj.weight, proj.bias, stride=patch_size)
    torch.testing.assert_close(model.x_embedder(x), convolved.flatten(2).transpose(1, 2))


def test_bfloat16_weights() -> None:
    """Inputs stay float32 and are cast inside; times and tables keep their digits; the velocity is float32."""
    model = golden_model("main")
    exact, _ = model(inputs["fwd_x"], *CLOCKS, inputs["fwd_y"])
    table = model.pos_embed.clone()
    model.to(torch.bfloat16)
    assert model.pos_embed.dtype == torch.float32 and torch.equal(model.pos_embed, table)
    assert model.feat_rope is not None and model.feat_rope.freqs_cos.dtype == torch.float32
    assert model.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    tokens: list[torch.dtype] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: tokens.append(args[0].dtype))
    rough, projected = model(inputs["fwd_x"], *CLOCKS, inputs["fwd_y"])
    assert set(tokens) == {torch.float32}, "what blocks add to is not rounded"
    assert rough.dtype == torch.float32 and projected is not None and projected.dtype == torch.float32
    assert 1e-4 < ((rough - exact).norm() / exact.norm()).item() < 1e-2
    # Two times that bfloat16 cannot tell apart still give different time features.
    times = torch.tensor([0.5, 0.5005])
    embedded = model.t_embedder_sem(times)
    assert not torch.equal(embedded[0], embedded[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "B", "depth": 3}, "size: B"),
        ({"size": None, "depth": 3}, "size: None"),
        ({"depth": 3, "width": 66, "heads": 4}, "width: 66"),
        ({"depth": 3, "width": 64, "heads": 4, "num_classes": 0}, "num_classes: 0"),
        ({"depth": 3, "width": 64, "heads": 4, "patch_size": 0}, "patch_size: 0"),
        ({"depth": 1, "width": 64, "heads": 4, "alignment": AlignmentConfig()}, "alignment.depth: 2"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LightningDiTConfig(**changes)


def test_a_patch_that_does_not_divide_the_grid() -> None:
    config = LightningDiTConfig(size="S", patch_size=3)
    with pytest.raises(ValueError, match="patch_size: 3"):
        LightningDiT(config, in_channels=4, input_size=16, two_clocks=True)


@pytest.mark.parametrize("name", ["dim", "depth", "hidden"])
def test_alignment_settings_that_cannot_be(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: 0"):
        AlignmentConfig(**{name: 0})


CPU = torch.device("cpu")


def test_padded_widths_change_neither_result_nor_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: an MLP of 2730 (L) computes with 2752 features, and its weights keep their shapes."""
    assert LightningDiTConfig(size="L").mlp_hidden == 2730
    assert not layers.pads_widths(CPU)  # where the official numbers are compared
    mlp = layers.SwiGLU(32, 85).double()
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    widths, results = [], []
    mlp.w3.register_forward_pre_hook(lambda module, given: widths.append(given[0].shape[-1]))
    for padded in (False, True):
        monkeypatch.setattr(layers, "pads_widths", lambda device, padded=padded: padded)
        mlp.zero_grad()
        out = mlp(x)
        out.square().sum().backward()
        results.append([out.detach(), *(param.grad for param in mlp.parameters())])
    assert widths == [85, 128]
    for plain, wide in zip(*results, strict=True):
        assert plain.shape == wide.shape
        torch.testing.assert_close(wide, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", [TINY, dataclasses.replace(TINY, norm="layernorm", mlp="gelu")], ids=["rms", "dit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradients_summed_by_sample_are_those_of_plain_layers(
    monkeypatch: pytest.MonkeyPatch, config: LightningDiTConfig, dtype: torch.dtype
) -> None:
    """As in compiled code for a GPU: the same outputs, and the same gradients but for the order of sums."""
    assert not layers.sums_by_sample(CPU) and not layers.sums_by_sample(torch.device("cuda"))  # not compiled
    model = LightningDiT(config, **SMALL)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(std=0.2, generator=generator)
    model.to(dtype)
    x, clock = torch.randn(3, 12, 8, 8, generator=generator), torch.tensor([0.2, 0.5, 0.9])
    results = []
    for by_sample in (False, True):
        monkeypatch.setattr(layers, "sums_by_sample", lambda device, by_sample=by_sample: by_sample)
        model.zero_grad()
        velocity, _ = model(x, clock, clock, torch.tensor([1, 2, 3]))
        velocity.square().mean().backward()
        grads = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
        results.append((velocity.detach(), grads))
    (plain, expected), (same, found) = results
    assert torch.equal(plain, same)
    assert found.keys() == expected.keys() and "blocks.0.norm1.weight" in found or config.norm == "layernorm"
    for name, grad in expected.items():
        error = (found[name] - grad).norm() / grad.norm()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2), (name, error)


# --------------------------------------------------------------------------------------------- attention


@pytest.fixture
def default_kernels() -> Iterator[None]:
    """The choice of a kernel holds for the process: put it back."""
    yield
    attention.activate("sdpa", CPU)


@pytest.mark.parametrize("backend", ["auto", "sdpa", "math"])
def test_attention_is_its_formula(backend: attention.AttentionBackend, default_kernels: None) -> None:
    layer = attention.Attention(32, 4, qk_norm="none")
    attention.activate(backend, CPU)
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in layer.qkv(x).chunk(3, dim=-1))
    mixed = torch.softmax(q @ k.mT / 8**0.5, dim=-1) @ v
    expected = layer.proj(mixed.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, None), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["flash2", "flash3", "flash4"])
def test_a_kernel_that_cannot_run_is_refused(backend: attention.AttentionBackend) -> None:
    with pytest.raises(ValueError, match=f"attention: {backend} cannot run here .it needs a CUDA device"):
        attention.activate(backend, CPU)
    with pytest.raises(ValueError, match="attention: 'flash9'; allowed: auto"):
        attention.assert_supported("flash9", CPU)  # type: ignore[arg-type]


ALL = ("flash2", "flash3", "flash4")


@pytest.mark.parametrize(
    ("found", "capability", "head_dims", "dtype", "expected"),
    [
        (ALL, (9, 0), (72,), torch.bfloat16, ["flash3", "sdpa"]),  # cuDNN's kernel before flash-attention 2
        (ALL, (10, 0), (64,), torch.bfloat16, ["flash4", "sdpa"]),  # no flash-attention 3 on Blackwell
        (ALL, (12, 0), (64,), torch.float16, ["flash2", "sdpa"]),
        (ALL, (8, 6), (64,), torch.bfloat16, ["flash2", "sdpa"]),
        (ALL, (7, 5), (64,), torch.float16, ["sdpa"]),
        (ALL, None, (64,), torch.bfloat16, ["sdpa"]),  # no CUDA device
        (ALL, (9, 0), (64,), torch.float32, ["sdpa"]),
        (ALL, (10, 0), (192,), torch.bfloat16, ["sdpa"]),  # too large a head for 4
        (ALL, (9, 0), (264,), torch.bfloat16, ["sdpa"]),
        (ALL, (9, 0), (20,), torch.bfloat16, ["sdpa"]),  # no multiple of 8
        (ALL, (10, 0), (64, 192), torch.bfloat16, ["sdpa"]),  # every head has to fit
        (ALL, (9, 0), (), torch.bfloat16, ["flash3", "sdpa"]),
        (("flash2",), (8, 0), (64,), torch.bfloat16, ["flash2", "sdpa"]),
        (("flash4",), (9, 0), (64,), torch.bfloat16, ["sdpa"]),
        (ALL, (13, 0), (64,), torch.bfloat16, ["sdpa"]),  # a GPU that the table does not know
        ((), (9, 0), (64,), torch.bfloat16, ["sdpa"]),
    ],
)
def test_what_auto_tries(
    found: tuple[str, ...], capability: tuple[int, int] | None, head_dims: tuple[int, ...], dtype: torch.dtype,
    expected: list[str],
) -> None:  # fmt: skip
    able, reasons = attention.candidates(found, capability, head_dims, dtype)
    assert able == expected
    assert len(able) + len(reasons) == 4  # each kernel is either tried, or said why not


def test_measured_times_overwrite_the_assumed_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "table.json"
    table.write_text(attention_speed.TABLE.read_text())
    monkeypatch.setattr(attention_speed.order, "__defaults__", (table,))

    def tried(gpu: str, *head_dims: int) -> list[attention.AttentionBackend]:
        return attention.candidates(ALL, (9, 0), head_dims, torch.bfloat16, gpu)[0]

    times = {"64": {"sdpa": 1.0, "flash2": 0.8, "flash3": 1.2}, "72": {"sdpa": 1.0, "flash2": 1.5, "flash3": 0.6}}
    attention_speed.record("NVIDIA H200", times, table)
    assert tried("NVIDIA H200", 64) == ["flash2", "sdpa"]
    assert tried("NVIDIA H200", 72) == ["flash3", "sdpa"]
    assert tried("NVIDIA H200", 64, 72) == ["flash3", "sdpa"]  # 1.8 against 2.0 and 2.3
    assert tried("NVIDIA H200", 80) == tried("NVIDIA H100", 64) == ["flash3", "sdpa"]  # not measured
    attention_speed.record("NVIDIA H200", {"64": {"sdpa": 0.1}}, table)
    assert tried("NVIDIA H200", 64) == ["sdpa"]


def test_a_namespace_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attention 4 installs `flash_attn/cute` alone: that is not flash-attention 2."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").touch()
    assert attention.installed() == {"flash4"}
    del sys.modules["flash_attn"]  # looking for its submodule imported it
    (tmp_path / "flash_attn" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert attention.installed() == {"flash2", "flash4"}
    del sys.modules["flash_attn"]


def test_the_package_is_called_in_its_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attention 2 takes (N, T, A, F) as we do, SDPA (N, A, T, F): the same function of the same tensors."""

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.einsum("ntaf,nsaf->nats", q, k).float().div(q.shape[-1] ** 0.5).softmax(-1)
        return torch.einsum("nats,nsaf->ntaf", weights, v.float()).to(q.dtype)

    q, k, v = torch.randn(3, 2, 4, 16, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    wide = (part.float().transpose(1, 2) for part in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*wide).transpose(1, 2)
    monkeypatch.setattr(attention, "_flash2", flash_attn_func)
    torch.testing.assert_close(attention.attend(q, k, v).float(), expected, rtol=2e-2, atol=2e-2)
    monkeypatch.setattr(attention, "_flash2", None)
    torch.testing.assert_close(attention.attend(q, k, v).float(), expected, rtol=2e-2, atol=2e-2)


def test_auto_says_why_it_takes_another_kernel(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert attention.activate("auto", CPU) == "sdpa"
    assert "sdpa; flash3: it needs a CUDA device; flash4" in caplog.text


def test_the_operator_that_really_ran(default_kernels: None) -> None:
    attention.activate("sdpa", CPU)
    assert "flash_attention_for_cpu" in attention.kernel_name(CPU, torch.float32, 72)
    attention.activate("math", CPU)
    assert "flash" not in attention.kernel_name(CPU, torch.float32, 72)
