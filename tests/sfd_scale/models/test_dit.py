"""DiT as a variant of LightningDiT: the public names and sizes, and the velocity of diffusers' own DiT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

from sfd_scale import config
from sfd_scale.checkpoint.official_checkpoint import infer_architecture, load_lightningdit
from sfd_scale.models.lightningdit import LightningDiT, LightningDiTConfig, parameter_count
from sfd_scale.recipe import TrainRecipe

# The names of facebookresearch/DiT's files, for a block N.
ENDS = {
    "pos_embed", "y_embedder.embedding_table.weight", "final_layer.linear.weight", "final_layer.linear.bias",
    "final_layer.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.bias", "x_embedder.proj.weight",
    "x_embedder.proj.bias", "t_embedder.mlp.0.weight", "t_embedder.mlp.0.bias", "t_embedder.mlp.2.weight",
    "t_embedder.mlp.2.bias",
}  # fmt: skip
BLOCK = {
    f"{layer}.{end}"
    for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    for end in ("weight", "bias")
}
SMALL = LightningDiTConfig(
    depth=2, width=32, heads=2, patch_size=2, norm="layernorm", mlp="gelu", rope=False, qk_norm=False, learn_sigma=True
)


def dit(settings: LightningDiTConfig, size: int) -> LightningDiT:
    return LightningDiT(settings, in_channels=4, input_size=size, two_clocks=False)


def test_the_recipe_is_dit_xl_2() -> None:
    recipe = config.load("train/ablation/dit_xl", TrainRecipe)
    assert isinstance(recipe.model, LightningDiTConfig)
    with torch.device("meta"):
        names = recipe.task.make_model().state_dict().keys()
    assert set(names) == {*ENDS, *(f"blocks.{n}.{name}" for n in range(28) for name in BLOCK)}
    # The count that DiT prints for DiT-XL/2, which learns the variance too.
    published = config.load("train/ablation/dit_xl", TrainRecipe, ["model.learn_sigma=true"]).model
    assert isinstance(published, LightningDiTConfig)
    assert parameter_count(published, in_channels=4, input_size=32, two_clocks=False) == 675_129_632


def random_state(model: LightningDiT) -> dict[str, Tensor]:
    """About the gain of trained layers: with more, twelve blocks would magnify how a sum was rounded."""
    draw = torch.Generator().manual_seed(0)
    state = {n: 0.05 * torch.randn(v.shape, generator=draw) for n, v in model.named_parameters()}
    return {"pos_embed": model.pos_embed, **state}


def diffusers_names(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The same weights as diffusers has them: the embedders stand in each block, and its last layer in two parts."""
    out = {f"pos_embed.proj.{end}": state[f"x_embedder.proj.{end}"] for end in ("weight", "bias")}
    for n in range(depth):
        ours, theirs = f"blocks.{n}.", f"transformer_blocks.{n}."
        for end in ("weight", "bias"):
            q, k, v = state[f"{ours}attn.qkv.{end}"].chunk(3)
            out |= {f"{theirs}attn1.to_{name}.{end}": value for name, value in (("q", q), ("k", k), ("v", v))}
            for name, other in (
                ("attn1.to_out.0", "attn.proj"), ("ff.net.0.proj", "mlp.fc1"), ("ff.net.2", "mlp.fc2"),
                ("norm1.linear", "adaLN_modulation.1"),
            ):  # fmt: skip
                out[f"{theirs}{name}.{end}"] = state[f"{ours}{other}.{end}"]
            for name, other in (("linear_1", "0"), ("linear_2", "2")):
                out[f"{theirs}norm1.emb.timestep_embedder.{name}.{end}"] = state[f"t_embedder.mlp.{other}.{end}"]
        out[f"{theirs}norm1.emb.class_embedder.embedding_table.weight"] = state["y_embedder.embedding_table.weight"]
    for end in ("weight", "bias"):
        out[f"proj_out_1.{end}"] = state[f"final_layer.adaLN_modulation.1.{end}"]
        out[f"proj_out_2.{end}"] = state[f"final_layer.linear.{end}"]
    return out


@pytest.mark.parametrize("name", ["DiT.pt", "DiT.safetensors"])
def test_a_public_file_loads_and_gives_what_diffusers_gives(name: str, tmp_path: Path) -> None:
    """Twelve blocks of width 384 are DiT-S, whose heads no weight tells: the known size does."""
    from safetensors.torch import save_file

    settings = LightningDiTConfig(**{**vars(SMALL), "size": "S", "depth": None, "width": None, "heads": None})
    state = random_state(dit(settings, 8))
    save = save_file if name.endswith("safetensors") else torch.save
    save(state, tmp_path / name)
    model = load_lightningdit(tmp_path / name).eval()
    assert model.config == settings and not model.two_clocks

    peer = DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=12, sample_size=8,
        norm_eps=1e-6,
    ).eval()  # fmt: skip
    missing, unexpected = peer.load_state_dict(diffusers_names(state, 12), strict=False)
    assert missing == ["pos_embed.pos_embed"] or not missing
    assert not unexpected
    for block in peer.transformer_blocks:
        # DiT spaces its frequencies by 1/128; diffusers' default is 1/127.
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    t, y = torch.tensor([3.0, 500.0, 999.0]), torch.tensor([0, 7, 1000])
    with torch.no_grad():
        expected = peer(x, timestep=t.long(), class_labels=y).sample[:, :4]
        found, _ = model(x, t, t, y)
    assert ((found - expected).abs().max() / expected.abs().max()).item() < 1e-5


def test_heads_can_be_given_where_nothing_tells_them() -> None:
    state = dit(SMALL, 8).state_dict()
    with pytest.raises(ValueError, match="number of heads cannot be told"):
        infer_architecture(state)
    assert infer_architecture(state, heads=2).config == SMALL
