"""The composite tokenizer, fingerprints of codecs, pixel rounding, PSNR."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sfd_scale.diffusion.latents import DETERMINISTIC_LOGVAR, LatentLayout
from sfd_scale.models.semantic_vae import SemanticVAE, SemanticVAEConfig
from sfd_scale.tokenizers import protocols as codec
from sfd_scale.tokenizers.composite import CompositeTokenizer
from sfd_scale.tokenizers.make import CompositeConfig, make_composite
from sfd_scale.tokenizers.patch_pca import PatchPCA, PatchPCAConfig, PatchPCAFitConfig
from sfd_scale.tokenizers.semantic_codec import SemanticVAECodecConfig
from tests.helpers.tokenizer_parts import CPU, convnet, smooth_images


def test_pixels_round_by_the_official_rule() -> None:
    values = torch.tensor([-2.0, -1.0, -0.5 / 127.5, 0.0, 0.49 / 127.5, 0.51 / 127.5, 1.0, 2.0])
    assert codec.to_uint8(values).tolist() == [0, 0, 127, 128, 128, 128, 255, 255]
    levels = torch.arange(256, dtype=torch.uint8)
    # 0 and 255 are −1 and 1, where the rule gives 0.5 up and the clamp.
    assert torch.equal(codec.to_uint8(codec.from_uint8(levels)), levels)


def test_psnr_is_its_formula() -> None:
    black = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    off = torch.stack([torch.full((3, 4, 4), 10), torch.full((3, 4, 4), 255)]).to(torch.uint8)
    torch.testing.assert_close(
        codec.psnr(black, off), torch.tensor([28.1308, 0.0], dtype=torch.float64), atol=1e-4, rtol=0
    )


def test_fingerprints_differ_by_values_names_and_settings() -> None:
    base = {"a": torch.ones(2), "b": torch.zeros(2)}
    same = {"b": torch.zeros(2), "a": torch.ones(2)}
    others = [{"a": torch.ones(2), "c": torch.zeros(2)}, {"a": torch.ones(2, 1), "b": torch.zeros(2)}]
    assert codec.fingerprint("k", base) == codec.fingerprint("k", same)
    assert len({codec.fingerprint("k", state) for state in (base, *others)} | {codec.fingerprint("k", base, "x")}) == 4
    assert codec.fingerprint("k", base).startswith("k:")


def composite_config(folder: Path) -> CompositeConfig:
    PatchPCA.fit([smooth_images(32)], PatchPCAFitConfig(channels=12)).save(folder / "texture.safetensors")
    vae = SemanticVAE(SemanticVAEConfig(input_dim=16, bottleneck_dim=4, hidden_dim=16, heads=2, blocks=1))
    vae.init_weights(0)
    save_file(vae.state_dict(), folder / "semvae.safetensors")
    return CompositeConfig(
        texture=PatchPCAConfig(weights=folder / "texture.safetensors"),
        vision=convnet(folder / "vision.safetensors"),
        semantic=SemanticVAECodecConfig(weights=folder / "semvae.safetensors", heads=2),
    )


def test_composite(tmp_path: Path) -> None:
    layout, images = LatentLayout(texture_channels=12, semantic_channels=4, size=8), smooth_images(3)
    tokenizer = make_composite(composite_config(tmp_path), layout, CPU)
    assert tokenizer.vision is not None and tokenizer.semantic is not None
    encoded = tokenizer.encode(images)
    assert encoded.latents.shape == (3, 16, 8, 8) and encoded.features is not None and encoded.logvar is not None
    texture, semantic = layout.split(encoded.latents)
    assert torch.equal(texture, tokenizer.texture.encode(images).mean)
    assert torch.equal(semantic, tokenizer.semantic.encode(encoded.features).mean)
    assert (layout.split(encoded.logvar)[0] == DETERMINISTIC_LOGVAR).all()
    assert (layout.split(encoded.logvar)[1] != DETERMINISTIC_LOGVAR).all()
    assert torch.equal(encoded.features, tokenizer.vision.features(images))
    # Only the texture part is decoded.
    changed = layout.join(texture, semantic + 1)
    assert torch.equal(tokenizer.decode(changed), tokenizer.decode(encoded.latents))
    assert codec.psnr(images, tokenizer.decode(encoded.latents)).mean().item() > 25
    assert set(tokenizer.fingerprints) == {"texture", "vision", "semantic"}
    with pytest.raises(ValueError, match=r"images are \(3, 16, 16\); allowed: \(3, 32, 32\)"):
        tokenizer.encode(smooth_images(1, 16))


def test_a_composite_without_semantics(tmp_path: Path) -> None:
    layout = LatentLayout(texture_channels=12, semantic_channels=0, size=8)
    texture = PatchPCA.load(PatchPCAConfig(weights=composite_config(tmp_path).texture.weights))  # type: ignore[union-attr]
    encoded = CompositeTokenizer(texture, None, None, layout).encode(smooth_images(2))
    assert encoded.latents.shape == (2, 12, 8, 8) and encoded.logvar is None and encoded.features is None


@pytest.mark.parametrize(
    ("layout", "left_out", "message"),
    [
        ({"texture_channels": 13, "semantic_channels": 4, "size": 8}, (), "latents.texture_channels: 13; allowed: 12"),
        ({"texture_channels": 12, "semantic_channels": 5, "size": 8}, (), "latents.semantic_channels: 5; allowed: 4"),
        ({"texture_channels": 12, "semantic_channels": 4, "size": 8}, ("vision",), "tokenizer.vision: none; allowed"),
        ({"texture_channels": 12, "semantic_channels": 4, "size": 8}, ("semantic",), "allowed: 0, as tokenizer.sem"),
    ],
)
def test_parts_that_do_not_fit(tmp_path: Path, layout: dict[str, int], left_out: tuple[str, ...], message: str) -> None:
    config = composite_config(tmp_path)
    parts = {n: getattr(config, n) for n in ("texture", "vision", "semantic") if n not in left_out}
    with pytest.raises(ValueError, match=message):
        make_composite(CompositeConfig(**parts), LatentLayout(**layout), CPU)
