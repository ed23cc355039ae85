"""Vision encoders: DINOv2 weights of timm and of the official code, preprocessing, and the small convnet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from sfd_scale.tokenizers import vision_encoder
from sfd_scale.tokenizers.vision_encoder import ConvNetEncoder, ConvNetEncoderConfig, DINOv2, DINOv2Config
from tests.helpers.tokenizer_parts import convnet, smooth_images


def test_dinov2_gives_normed_patch_tokens(tmp_path: Path) -> None:
    """timm's own model with random weights, a small grid: resampled positions, prefix tokens left out, row order."""
    torch.manual_seed(0)
    name = "vit_small_patch14_reg4_dinov2"
    weights = timm.create_model(name, img_size=56, num_classes=0).state_dict()
    save_file(weights, tmp_path / "dino.safetensors")
    encoder = DINOv2.load(DINOv2Config(model=name, weights=tmp_path / "dino.safetensors", image_size=64))
    assert (encoder.dim, encoder.grid(64)) == (384, 4)
    images = smooth_images(2, 64)
    features = encoder.features(images)
    assert features.shape == (2, 384, 4, 4)
    tokens = encoder.model.forward_features(vision_encoder.preprocess(images))
    assert tokens.shape == (2, 1 + 4 + 16, 384)
    torch.testing.assert_close(features[:, :, 1, 2], tokens[:, 5 + 1 * 4 + 2])
    torch.testing.assert_close(features.mean(1), torch.zeros(2, 4, 4), atol=1e-4, rtol=0)
    wide = DINOv2.load(DINOv2Config(model=name, weights=tmp_path / "dino.safetensors", image_size=128))
    assert wide.features(smooth_images(1, 128)).shape == (1, 384, 8, 8)
    with pytest.raises(ValueError, match=r"as tokenizer\.vision\.image_size says"):
        wide.features(images)


def test_dinov2_reads_official_weights(tmp_path: Path) -> None:
    """Official files have register_tokens and mask_token, and no position embedding for class and register tokens."""
    name = "vit_small_patch14_reg4_dinov2"
    state = timm.create_model(name, img_size=56, num_classes=0).state_dict()
    theirs = dict(state)
    theirs["register_tokens"] = theirs.pop("reg_token")
    theirs["mask_token"] = torch.zeros(1, 384)
    theirs["cls_token"] = state["cls_token"] - 0.25
    theirs["pos_embed"] = torch.cat([torch.full((1, 1, 384), 0.25), state["pos_embed"]], 1)
    torch.save(theirs, tmp_path / "dinov2.pth")
    save_file(state, tmp_path / "timm.safetensors")
    paths = (tmp_path / "dinov2.pth", tmp_path / "timm.safetensors")
    first, second = (DINOv2.load(DINOv2Config(model=name, weights=path, image_size=64)) for path in paths)
    torch.testing.assert_close(first.features(smooth_images(1, 64)), second.features(smooth_images(1, 64)))
    with pytest.raises(ValueError, match="does not fit vit_small"):
        save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
        DINOv2.load(DINOv2Config(model=name, weights=tmp_path / "other.safetensors", image_size=64))
    with pytest.raises(ValueError, match="model: vit_none"):
        DINOv2.load(DINOv2Config(model="vit_none", weights=tmp_path / "timm.safetensors"))
    with pytest.raises(ValueError, match="image_size: 20"):
        DINOv2Config(image_size=20)


def test_the_default_dinov2_has_the_official_sizes() -> None:
    with torch.device("meta"):
        model = timm.create_model(DINOv2Config().model, img_size=224, num_classes=0)
    assert (model.embed_dim, model.num_prefix_tokens, model.patch_embed.num_patches) == (768, 5, 256)


def cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -0.75, as in PyTorch's bicubic interpolation."""
    x, a = np.abs(distance), -0.75
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def shrunk(count: int, to: int) -> np.ndarray:
    """(to, count): bicubic weights at pixel centres, edges repeated, the kernel not widened (no anti-aliasing)."""
    out = np.zeros((to, count))
    for row, centre in enumerate((np.arange(to) + 0.5) * count / to - 0.5):
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            out[row, min(max(tap, 0), count - 1)] += cubic(np.array(centre - tap))
    return out


def test_dinov2_preprocessing_by_its_formula() -> None:
    """ImageNet's numbers as they stand in the literature, then 14/16 of the size (the official order)."""
    images = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    mean, std = (np.array(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    scaled = (images.numpy() / 255.0 - mean) / std
    expected = shrunk(32, 28) @ scaled @ shrunk(32, 28).T
    found = vision_encoder.preprocess(images)
    torch.testing.assert_close(found, torch.from_numpy(expected).float(), atol=2e-5, rtol=0)


def test_convnet_encoder(tmp_path: Path) -> None:
    encoder = ConvNetEncoder.load(convnet(tmp_path / "net.safetensors"))
    images = smooth_images(2)
    assert (encoder.dim, encoder.grid(32)) == (16, 8)
    assert torch.equal(encoder.features(images), encoder.model(images).grid)
    assert not encoder.features(images).requires_grad
    damaged = load_file(tmp_path / "net.safetensors") | {"extra": torch.zeros(1)}
    save_file(damaged, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"(?s)other.safetensors: .*extra"):
        ConvNetEncoder.load(ConvNetEncoderConfig(weights=tmp_path / "other.safetensors"))
