"""Networks of timm as FD-loss uses them, their short names, and that nothing is downloaded or run."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from eval.features.config import PresetConfig, TimmExtractorConfig
from eval.features.make import build_extractor, fingerprint
from eval.features.presets import PRESETS, PUBLISHED_VALIDATION_FD, timm_config
from eval.features.timm_features import TimmFeatures, network_size, pooled
from sfd_scale.tokenizers import timm_network

CPU = torch.device("cpu")


def images(count: int, size: int) -> Tensor:
    return torch.randint(256, (count, 3, size, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def random_weights(model: str, path: Path) -> Path:
    torch.manual_seed(0)
    state = timm.create_model(model, pretrained=False).state_dict()
    save_file({name: value + 0.01 * torch.randn_like(value.float()).to(value) for name, value in state.items()}, path)
    return path


def as_in_fd_loss(config: TimmExtractorConfig, pixels: Tensor, size: int) -> Tensor:
    """The features as FD-loss takes them: timm's own padding and resampling of position embeddings."""
    convolutional = "vit" not in config.model
    options: dict[str, Any] = {} if convolutional else {"dynamic_img_size": True, "dynamic_img_pad": True}
    network = timm.create_model(config.model, pretrained=False, **options).eval()
    network.load_state_dict(load_file(config.weights))
    mean, std = (torch.tensor(network.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    scaled = pixels.float() / 255
    if pixels.shape[-1] != size:
        scaled = functional.interpolate(scaled, size=(size, size), mode="bicubic", antialias=True)
    with torch.no_grad():
        found = network.forward_features((scaled - mean) / std)
        if found.ndim == 4:
            return found.mean((2, 3))
        if config.pooling == "avg":
            return found[:, network.num_prefix_tokens :].mean(1)
        return found[:, 0] if config.pooling == "token" else network.attn_pool(found)


@pytest.mark.parametrize(
    ("model", "pooling", "size"),
    [
        ("test_vit", "token", 100),  # no multiple of the patch of 16: zeros are added
        ("test_vit", "avg", 96),
        ("test_vit3", "map", 100),
        ("test_convnext", "avg", 64),
    ],
)
def test_features_are_those_of_fd_loss(tmp_path: Path, model: str, pooling: Any, size: int) -> None:
    weights = random_weights(model, tmp_path / "weights.safetensors")
    config = TimmExtractorConfig(model=model, weights=weights, pooling=pooling, input_size=size, antialias=True)
    extractor = build_extractor(config, CPU)
    for side in (size, 40):
        found = extractor(images(3, side))
        expected = as_in_fd_loss(config, images(3, side), size)
        assert found.pool.shape == expected.shape and found.spatial is None and found.logits is None
        assert (found.pool - expected).abs().max() < 1e-4 * expected.abs().max()
        assert expected.std(0).mean() > 1e-4  # the features see the images
    assert extractor.fingerprint == fingerprint(config)


def test_the_network_decides_the_size_that_is_left_open(tmp_path: Path) -> None:
    weights = random_weights("test_vit", tmp_path / "weights.safetensors")
    extractor = build_extractor(TimmExtractorConfig(model="test_vit", weights=weights, input_size=None), CPU)
    assert isinstance(extractor, TimmFeatures) and extractor.size == network_size("test_vit")[0] == 160
    # The same weights as a torch file give the same features.
    torch.save(load_file(weights), tmp_path / "weights.pth")
    same = TimmExtractorConfig(model="test_vit", weights=tmp_path / "weights.pth", input_size=None)
    assert torch.equal(build_extractor(same, CPU)(images(2, 40)).pool, extractor(images(2, 40)).pool)
    poolings = [TimmExtractorConfig(model="test_vit", weights=weights, pooling=name) for name in (None, "token", "avg")]
    assert len({fingerprint(config) for config in poolings}) == 3


# ------------------------------------------------------------------------------------------------- short names


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_short_names(name: Any) -> None:
    config = timm_config(PresetConfig(kind=name, weights=Path("weights")))
    assert config.input_size is not None and config.antialias
    patch = network_size(config.model)[1]
    padded = -(-config.input_size // patch) * patch
    options: dict[str, Any] = {} if name == "convnextv2_b" else {"img_size": padded}
    with torch.device("meta"):
        network = timm.create_model(config.model, pretrained=False, num_classes=0, **options).eval()
        rows = pooled(network, torch.empty(2, 3, padded, padded), config)
    assert rows.shape == (2, 1152 if name == "siglip2" else 1024)
    assert padded == {"dinov2_l": 266, "clip_l": 266, "dinov3_l": 256}.get(name, 224)
    assert (timm_network.statistics(network)[0] == (0.5, 0.5, 0.5)) is (name == "siglip2")
    assert network.pretrained_cfg["interpolation"] == "bicubic"
    names = network.state_dict().keys()
    marks = {
        "convnextv2_b": "stages.2.blocks.26.mlp.grn.weight", "dinov2_l": "blocks.23.ls2.gamma",
        "dinov3_l": "blocks.23.gamma_2", "mae_l": "blocks.23.mlp.fc2.bias", "siglip2": "attn_pool.latent",
        "clip_l": "norm_pre.weight",
    }  # fmt: skip
    assert marks[name] in names
    assert name in PUBLISHED_VALIDATION_FD or name == "dinov3_l"


# ------------------------------------------------------------------------------------------------- what is refused


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def test_nothing_is_downloaded_or_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: Any) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr(socket.socket, "connect", connect)
    torch.save({"state_dict": {"a": torch.ones(1)}, "hook": Hostile(tmp_path / "ran")}, tmp_path / "hostile.pth")
    for file in ("hostile.pth", "missing.pth"):
        config = TimmExtractorConfig(model="test_vit", weights=tmp_path / file)
        with pytest.raises(ValueError, match="weights"):
            build_extractor(config, CPU)
    assert not (tmp_path / "ran").exists()
    weights = random_weights("test_vit", tmp_path / "weights.safetensors")
    build_extractor(TimmExtractorConfig(model="test_vit", weights=weights), CPU)


def test_networks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    weights = random_weights("test_vit", tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"does not fit test_vit3"):
        build_extractor(TimmExtractorConfig(model="test_vit3", weights=weights), CPU)
    with pytest.raises(ValueError, match="pooling: map; test_vit has no attention pooling; allowed"):
        build_extractor(TimmExtractorConfig(model="test_vit", weights=weights, pooling="map"), CPU)
    with pytest.raises(ValueError, match="extractor.model: vit_of_nobody"):
        build_extractor(TimmExtractorConfig(model="vit_of_nobody", weights=weights), CPU)
    with pytest.raises(ValueError, match="pooling: token, with a block; allowed: avg"):
        TimmExtractorConfig(model="test_vit", weights=weights, pooling="token", block="blocks.1")
