"""LightningDiT against the arrays of the authors' code: forward passes, intermediate states, fixed tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_arrays import arrays, relative_error, settings
from torch import Tensor

from sfd_scale.models.alignment import AlignmentConfig
from sfd_scale.models.lightningdit import LightningDiT, LightningDiTConfig

inputs, expected = arrays("inputs"), arrays("out_forward")
CLOCKS = (inputs["fwd_t_tex"], inputs["fwd_t_sem"])
VARIANTS: dict[str, dict[str, Any]] = {
    "patch2_layernorm_gelu_woshift": {
        "norm": "layer",
        "mlp": "gelu",
        "rotary": False,
        "qk_norm": False,
        "modulation": "scale",
    },
    "layernorm_qknorm_rope": {"norm": "layer"},
    "learn_sigma": {"learn_sigma": True},
}


def golden_config(authors: dict[str, Any], **changes: Any) -> LightningDiTConfig:
    alignment = None
    if "use_repa" in authors:
        alignment = AlignmentConfig(depth=authors["repa_depth"], hidden=authors["repa_projector_dim"], dim=384)
    return LightningDiTConfig(
        size=None,
        depth=authors["depth"],
        width=authors["hidden_size"],
        heads=authors["num_heads"],
        patch_size=authors["patch_size"],
        in_channels=authors["in_channels"],
        input_size=authors["input_size"],
        num_classes=authors["num_classes"],
        alignment=alignment,
        **changes,
    )


def golden_model(name: str) -> LightningDiT:
    """`main`, `guide`, `sync/main`, `sync/guide` or `variant/…`, with its golden weights, loaded strictly."""
    if name.startswith("variant/"):
        key = name.removeprefix("variant/")
        state = {k.split("/", 1)[1]: v for k, v in arrays("weights_variants").items() if k.startswith(f"{key}/")}
        model = LightningDiT(golden_config(settings["variants"][key], **VARIANTS[key]))
    elif name.startswith("sync/"):
        base = name.removeprefix("sync/")
        state = {k: v for k, v in arrays(f"weights_{base}").items() if not k.startswith("t_embedder")}
        state |= {k.split("/", 1)[1]: v for k, v in arrays("weights_sync").items() if k.startswith(f"{base}/")}
        model = LightningDiT(golden_config(settings[base], two_clocks=False))
    else:
        state = arrays(f"weights_{name}")
        model = LightningDiT(golden_config(settings[name]))
    model.load_state_dict(state)
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
    velocity, projected = golden_model(f"variant/{name}")(inputs[f"variant_x/{name}"], *clocks, inputs["fwd_y"][:2])
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
    seen["t_emb"] = model._time(*CLOCKS, torch.float32)
    seen["y_emb"] = model.y_embedder(inputs["fwd_y"])
    seen["y_emb_forced_drop0"] = model.y_embedder(inputs["fwd_y"].clone().index_fill_(0, torch.tensor([0]), 10))
    for name, value in seen.items():
        assert relative_error(value, expected[name]) < 1e-5, name


def test_train_mode_changes_nothing() -> None:
    model = golden_model("main")
    velocity, _ = model.train()(inputs["fwd_x"], *CLOCKS, inputs["fwd_y"])
    assert relative_error(velocity, expected["eval"]) < 1e-5


def test_fixed_tables_are_the_authors() -> None:
    """Those in the golden weights replace ours on loading, so the ones that init_weights makes are compared apart."""
    for name in ("main", "guide"):
        model = LightningDiT(golden_config(settings[name]))
        for key in ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"):
            assert relative_error(model.state_dict()[key], arrays(f"weights_{name}")[key]) < 1e-6, key
