"""LightningDiT against the arrays of the authors' code: forward passes, intermediate states, fixed tables."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sfd_scale.models.lightningdit import LightningDiT
from tests.helpers.golden_arrays import arrays, build, check, golden_model, relative_error, settings

inputs, expected = arrays("inputs"), arrays("out_forward")
NULL = settings["main"]["num_classes"]
CLOCKS = (inputs["fwd_t_tex"], inputs["fwd_t_sem"])
VARIANTS = settings["variants"]


def variant(name: str) -> LightningDiT:
    model = build(VARIANTS[name], two_clocks=True)
    weights = arrays("weights_variants")
    model.load_state_dict({k.removeprefix(f"{name}/"): v for k, v in weights.items() if k.startswith(f"{name}/")})
    return model.eval()


@pytest.mark.parametrize(("name", "array"), [("main", "eval"), ("guide", "guide_eval"), ("sync/main", "sync_eval")])
def test_velocity_is_the_authors(name: str, array: str) -> None:
    velocity, _ = golden_model(name)(inputs["fwd_x"], *CLOCKS, inputs["fwd_y"])
    check(velocity, "out_forward", array)


def test_each_time_goes_to_its_own_embedder() -> None:
    velocity, _ = golden_model("main")(inputs["fwd_x"], *reversed(CLOCKS), inputs["fwd_y"])
    check(velocity[:1], "out_forward", "swapped_t")
    assert relative_error(velocity[:1], expected["eval"][:1]) > 1e-2


@pytest.mark.parametrize("name", VARIANTS)
def test_velocity_of_the_variants_is_the_authors(name: str) -> None:
    x = inputs[f"variant_x/{name}"]
    clocks = [clock[: len(x)] for clock in CLOCKS]
    velocity, projected = variant(name)(x, *clocks, inputs["fwd_y"][: len(x)])
    check(velocity, "out_forward", f"variant/{name}")
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
    seen["y_emb_forced_drop0"] = model.y_embedder(inputs["fwd_y"].clone().index_fill_(0, torch.tensor([0]), NULL))
    for name, value in seen.items():
        check(value, "out_forward", name)


def test_train_mode_changes_nothing() -> None:
    model = golden_model("main")
    velocity, _ = model.train()(inputs["fwd_x"], *CLOCKS, inputs["fwd_y"])
    check(velocity, "out_forward", "eval")


def test_velocity_in_training_is_the_authors() -> None:
    loss = arrays("out_loss")
    velocity, _ = golden_model("main").train()(loss["xt"], loss["t_tex"], loss["t_sem"], inputs["y"])
    check(velocity, "out_loss", "pred")


def test_fixed_tables_are_the_authors() -> None:
    """Loading replaces ours by those of the file, and init_weights makes them anew."""
    for name in ("main", "guide"):
        model = golden_model(name)
        model.init_weights(0)
        for key in ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"):
            check(model.state_dict()[key], f"weights_{name}", key, 1e-6)
