"""LightningDiT against the arrays of the authors' code: forward passes, intermediate states, fixed tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_arrays import arrays, golden_model, relative_error, settings
from torch import Tensor

from sfd_scale.models.lightningdit import LightningDiT, LightningDiTConfig

inputs, expected = arrays("inputs"), arrays("out_forward")
CLOCKS = (inputs["fwd_t_tex"], inputs["fwd_t_sem"])
VARIANTS: dict[str, dict[str, Any]] = {
    "patch2_layernorm_gelu_woshift": {
        "norm": "layernorm",
        "mlp": "gelu",
        "rope": False,
        "qk_norm": False,
        "shift": False,
    },
    "layernorm_qknorm_rope": {"norm": "layernorm"},
    "learn_sigma": {"learn_sigma": True},
}


def variant(name: str) -> LightningDiT:
    authors = settings["variants"][name]
    config = LightningDiTConfig(
        depth=authors["depth"],
        width=authors["hidden_size"],
        heads=authors["num_heads"],
        patch_size=authors["patch_size"],
        num_classes=authors["num_classes"],
        **VARIANTS[name],
    )
    model = LightningDiT(config, in_channels=authors["in_channels"], input_size=authors["input_size"], two_clocks=True)
    weights = arrays("weights_variants")
    model.load_state_dict({k.removeprefix(f"{name}/"): v for k, v in weights.items() if k.startswith(f"{name}/")})
    return model.eval()


@pytest.mark.parametrize(("name", "array"), [("main", "eval"), ("guide", "guide_eval"), ("sync/main", "sync_eval")])
def test_velocity_is_the_authors(name: str, array: str) -> None:
    velocity, _ = golden_model(name)(inputs["fwd_x"], *CLOCKS, inputs["fwd_y"])
    assert relative_error(velocity, expected[array]) < 1e-5


def test_each_time_goes_to_its_own_embedder() -> None:
    velocity, _ = golden_model("main")(inputs["fwd_x"], *reversed(CLOCKS), inputs["fwd_y"])
    assert relative_error(velocity[:1], expected["swapped_t"]) < 1e-5
    assert relative_error(velocity[:1], expected["eval"][:1]) > 1e-2


@pytest.mark.parametrize("name", VARIANTS)
def test_velocity_of_the_variants_is_the_authors(name: str) -> None:
    clocks = [clock[:2] for clock in CLOCKS]
    velocity, projected = variant(name)(inputs[f"variant_x/{name}"], *clocks, inputs["fwd_y"][:2])
    assert relative_error(velocity, expected[f"variant/{name}"]) < 1e-5
    assert projected is None


def test_intermediate_states_are_the_authors() -> None:
    model = golden_model("main")
    seen: dict[str, Tensor] = {}
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _, __, out, n=number: seen.__setitem__(f"block{n}_sample0", out[0]))
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.__setitem__("x_embed_sample0", args[0][0]))
    _, projected = model(inputs["fwd_x"], *CLOCKS, inputs["fwd_y"])
    assert projected is not None
    seen["repa_proj_sample0"] = projected[0, ::4]
    seen["t_emb"] = model.embed_time(*CLOCKS)
    seen["y_emb"] = model.y_embedder(inputs["fwd_y"])
    seen["y_emb_forced_drop0"] = model.y_embedder(inputs["fwd_y"].clone().index_fill_(0, torch.tensor([0]), 10))
    for name, value in seen.items():
        assert relative_error(value, expected[name]) < 1e-5, name


def test_train_mode_changes_nothing() -> None:
    model = golden_model("main")
    velocity, _ = model.train()(inputs["fwd_x"], *CLOCKS, inputs["fwd_y"])
    assert relative_error(velocity, expected["eval"]) < 1e-5


def test_fixed_tables_are_the_authors() -> None:
    """Loading replaces ours by those of the file, and init_weights makes them anew."""
    for name in ("main", "guide"):
        model = golden_model(name)
        model.init_weights(0)
        for key in ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"):
            assert relative_error(model.state_dict()[key], arrays(f"weights_{name}")[key]) < 1e-6, key
