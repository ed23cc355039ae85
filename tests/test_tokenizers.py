"""Tokenizers: closed forms, golden arrays of the authors' codecs, names of their weights, and the composite."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from golden_arrays import arrays, check, settings
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfd_scale.latents import LatentLayout
from sfd_scale.models.convnet import SmallConvNet, SmallConvNetConfig
from sfd_scale.tokenizers import codec, vision_encoder
from sfd_scale.tokenizers.composite import CompositeTokenizer
from sfd_scale.tokenizers.config import CompositeConfig, make_composite
from sfd_scale.tokenizers.patch_pca import PatchPCA, PatchPCAConfig, PatchPCAFitConfig, from_patches, to_patches
from sfd_scale.tokenizers.pca import FeaturePCA, FeaturePCAConfig, fit_components
from sfd_scale.tokenizers.semantic_vae import (
    SemanticVAE,
    SemanticVAECodec,
    SemanticVAECodecConfig,
    SemanticVAEConfig,
)
from sfd_scale.tokenizers.texture_vae import AutoencoderKLCodec, AutoencoderKLConfig, build, from_ldm, ldm_name
from sfd_scale.tokenizers.vision_encoder import ConvNetEncoder, ConvNetEncoderConfig, DINOv2, DINOv2Config

CPU = torch.device("cpu")


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def smooth_images(count: int, size: int = 32, seed: int = 0) -> Tensor:
    """Images with the neighbourhood of natural ones, which a PCA can compress: (N, 3, H, W) uint8."""
    coarse = draws(count, 3, size // 4, size // 4, seed=seed)
    fine = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")
    return codec.to_uint8(0.4 * fine + 0.02 * draws(count, 3, size, size, seed=seed + 1))


# ------------------------------------------------------------------------------------------------ pixels


def test_pixels_round_by_the_authors_rule() -> None:
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


def test_identities_tell_values_names_and_settings_apart() -> None:
    base = {"a": torch.ones(2), "b": torch.zeros(2)}
    same = {"b": torch.zeros(2), "a": torch.ones(2)}
    others = [{"a": torch.ones(2), "c": torch.zeros(2)}, {"a": torch.ones(2, 1), "b": torch.zeros(2)}]
    assert codec.identity("k", base) == codec.identity("k", same)
    assert len({codec.identity("k", state) for state in (base, *others)} | {codec.identity("k", base, "x")}) == 4
    assert codec.identity("k", base).startswith("k:")


# --------------------------------------------------------------------------------------------------- pca


def test_components_are_those_of_the_whole_covariance() -> None:
    """Streamed in batches and around a large mean, against NumPy's covariance of all rows."""
    rows = draws(500, 6) @ torch.diag(torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.1])) @ draws(6, 6, seed=1) + 1000
    found = fit_components(iter(rows.split(77)), 3)
    values, vectors = np.linalg.eigh(np.cov(rows.double().numpy(), rowvar=False, bias=True))
    np.testing.assert_allclose(found.variance, values[::-1][:3], rtol=1e-4)
    np.testing.assert_allclose(np.abs(found.directions.numpy() @ vectors[:, ::-1][:, :3]), np.eye(3), atol=1e-4)
    np.testing.assert_allclose(found.mean, rows.double().mean(0), rtol=1e-6)
    assert (found.directions.gather(1, found.directions.abs().argmax(1, keepdim=True)) > 0).all()


def test_too_few_rows_or_columns() -> None:
    with pytest.raises(ValueError, match="channels: 4; allowed: 1 to 3"):
        fit_components([draws(10, 3)], 4)
    with pytest.raises(ValueError, match="there are 2"):
        fit_components([draws(2, 3)], 2)
    with pytest.raises(ValueError, match="no rows"):
        fit_components([], 2)


def test_patches_and_back() -> None:
    image = torch.arange(2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
    patches = to_patches(image, 4)
    assert patches.shape == (2, 2, 2, 48)
    assert torch.equal(patches[1, 0, 1], image[1, :, :4, 4:].flatten())
    assert torch.equal(from_patches(patches, 4), image)
    with pytest.raises(ValueError, match="patch: 3"):
        to_patches(image, 3)


def test_patch_pca(tmp_path: Path) -> None:
    images = smooth_images(64)
    exact = PatchPCA.fit([images], PatchPCAFitConfig(channels=48))
    assert torch.equal(exact.decode(exact.encode(images).mean), images)
    pca = PatchPCA.fit(iter(images.split(10)), PatchPCAFitConfig(channels=12))
    moments = pca.encode(images)
    assert moments.mean.shape == (64, 12, 8, 8) and moments.logvar is None
    assert (pca.channels, pca.downsample) == (12, 4)
    # What is lost is the variance of the components left out (quantisation to 8 bits adds 1/12 of a level²).
    lost = exact.variance[12:].sum().item() / 48 * 127.5**2
    square = (pca.decode(moments.mean).double() - images.double()).square().mean().item()
    assert square == pytest.approx(lost + 1 / 12, rel=0.02)
    assert codec.psnr(images, pca.decode(moments.mean)).mean().item() > 25
    pca.save(tmp_path / "folder" / "pca.safetensors")
    again = PatchPCA.load(PatchPCAConfig(weights=tmp_path / "folder" / "pca.safetensors"))
    assert again.identity == pca.identity != exact.identity
    assert torch.equal(again.encode(images).mean, moments.mean)


@pytest.mark.parametrize(("field", "value"), [("patch", 0), ("channels", 49), ("channels", 0)])
def test_patch_pca_settings_that_cannot_be(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field}: {value}"):
        PatchPCAFitConfig(**{field: value})  # type: ignore[arg-type]


def test_feature_pca(tmp_path: Path) -> None:
    features = (draws(8, 3, 4, 4).transpose(1, 3) @ draws(3, 10, seed=1)).transpose(1, 3) + 2
    pca = FeaturePCA.fit(features.split(3), 3)
    moments = pca.encode(features)
    assert moments.mean.shape == (8, 3, 4, 4) and (pca.dim, pca.channels) == (10, 3)
    torch.testing.assert_close(pca.decode(moments.mean), features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moments.mean.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    pca.save(tmp_path / "pca.safetensors")
    assert FeaturePCA.load(FeaturePCAConfig(weights=tmp_path / "pca.safetensors")).identity == pca.identity
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors is no file of a feature PCA: it lacks directions"):
        FeaturePCA.load(FeaturePCAConfig(weights=tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="none.safetensors; allowed: an existing"):
        FeaturePCA.load(FeaturePCAConfig(weights=tmp_path / "none.safetensors"))
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense, not tensors")
    with pytest.raises(ValueError, match="bad.safetensors cannot be read as safetensors"):
        FeaturePCA.load(FeaturePCAConfig(weights=tmp_path / "bad.safetensors"))


# ---------------------------------------------------------------------------------------------- semantics

HEADS = settings["semvae"]["transformer_heads"]
GOLDEN_VAE = SemanticVAEConfig(
    input_dim=settings["semvae"]["input_dim"],
    bottleneck_dim=settings["semvae"]["bottleneck_dim"],
    hidden_dim=settings["semvae"]["hidden_dim"],
    heads=settings["semvae"]["transformer_heads"],
    blocks=settings["semvae"]["transformer_blocks"],
)


def golden_vae() -> SemanticVAE:
    model = SemanticVAE(GOLDEN_VAE)
    model.load_state_dict(arrays("weights_semvae"))
    return model.eval()


def test_golden_semantic_vae() -> None:
    model, tokens, expected = golden_vae(), arrays("inputs")["sv_x"], arrays("out_semvae")
    mean, logvar = model.posterior(tokens)
    decoded, *_ = model(tokens, torch.zeros_like(mean))
    found = {
        "moments": model.encoder(tokens),
        "mean": mean,
        "logvar": logvar,
        "z_seed3": mean + torch.exp(logvar / 2) * expected["eps_seed3"],
        "dec_mean": decoded,
        "kl": 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2)),
    }
    for name, value in found.items():
        check(value, "out_semvae", name)
    check(model.train().posterior(tokens)[0], "out_semvae", "mean")


def test_golden_semantic_codec_works_on_grids(tmp_path: Path) -> None:
    save_file(arrays("weights_semvae"), tmp_path / "vae.safetensors")
    loaded = SemanticVAECodec.load(SemanticVAECodecConfig(weights=tmp_path / "vae.safetensors", heads=HEADS))
    assert loaded.model.config == GOLDEN_VAE
    grid = arrays("inputs")["sv_x"].transpose(1, 2).unflatten(2, (settings["sv_grid"], settings["sv_grid"]))
    moments = loaded.encode(grid)
    assert moments.logvar is not None
    check(moments.mean.flatten(2).transpose(1, 2), "out_semvae", "mean")
    check(moments.logvar.flatten(2).transpose(1, 2), "out_semvae", "logvar")
    check(loaded.decode(moments.mean).flatten(2).transpose(1, 2), "out_semvae", "dec_mean")
    # Heads leave no trace in the weights, but change what they do.
    other = SemanticVAECodec.load(SemanticVAECodecConfig(weights=tmp_path / "vae.safetensors", heads=2 * HEADS))
    assert other.identity != loaded.identity
    torch.save(arrays("weights_semvae"), tmp_path / "vae.pt")
    assert (
        SemanticVAECodec.load(SemanticVAECodecConfig(weights=tmp_path / "vae.pt", heads=HEADS)).identity
        == loaded.identity
    )
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors: these are not the weights of a semantic VAE"):
        SemanticVAECodec.load(SemanticVAECodecConfig(weights=tmp_path / "other.safetensors"))


def test_semantic_vae_sizes_and_start() -> None:
    with torch.device("meta"):
        model = SemanticVAE(SemanticVAEConfig())
    side = sum(parameter.numel() for parameter in model.encoder.parameters())
    assert 28e6 < side < 30e6  # about 29M a side in the paper
    assert len(model.blocks) == 8
    first, second = SemanticVAE(GOLDEN_VAE), SemanticVAE(GOLDEN_VAE)
    first.init_weights(0)
    second.init_weights(0)
    assert all(torch.equal(a, second.state_dict()[name]) for name, a in first.state_dict().items())
    assert first.decoder[0].weight.abs().max().item() <= (6 / (24 + 4)) ** 0.5
    for field, value in (("heads", 7), ("blocks", 0), ("bottleneck_dim", 0)):
        with pytest.raises(ValueError, match=f"{field}: {value}"):
            SemanticVAEConfig(**{field: value})  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ texture


def ldm_shapes(config: AutoencoderKLConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """LDM's name → diffusers' name and LDM's shape."""
    with torch.device("meta"):
        state = build(config).state_dict()
    names = {name: ldm_name(name, len(config.multipliers)) for name in state}
    assert len(set(names.values())) == len(names)
    return {
        theirs: (ours, (*state[ours].shape, 1, 1) if ".attn" in theirs and state[ours].ndim == 2 else state[ours].shape)
        for ours, theirs in names.items()
    }


def golden_ldm_weights(shapes: dict[str, tuple[str, tuple[int, ...]]]) -> tuple[dict[str, Tensor], str]:
    """The recipe of tests/golden/README.md, and the SHA-256 over all weights."""
    source, digest, state = np.random.RandomState(settings["seed"] % 10000), hashlib.sha256(), {}
    for key in sorted(shapes):
        shape = shapes[key][1]
        value = source.standard_normal(shape).astype(np.float32)
        if "norm" in key and key.endswith("weight"):
            value = 1 + np.float32(0.1) * value
        elif key.endswith("bias"):
            value = np.float32(0.05) * value
        else:
            value = value * np.float32((1 / np.prod(shape[1:])) ** 0.5)
        digest.update(value.tobytes())
        state[key] = torch.from_numpy(value)
    return state, digest.hexdigest()


def test_golden_texture_vae() -> None:
    """All names and shapes at once: the hash runs over the weights in the order of LDM's names."""
    config, expected = AutoencoderKLConfig(weights=Path("none")), arrays("out_sdvae")
    state, digest = golden_ldm_weights(ldm_shapes(config))
    assert digest == expected["weights_sha256"]
    with torch.device("meta"):
        model = build(config)
    model.load_state_dict(from_ldm(state, model.state_dict()), assign=True)
    vae = AutoencoderKLCodec(model)
    assert (vae.channels, vae.downsample) == (32, 16)
    with torch.no_grad():
        decoded = model.decode(expected["z"]).sample
        posterior = model.encode(expected["image"]).latent_dist
    check(decoded, "out_sdvae", "decode")
    check(posterior.mean, "out_sdvae", "enc_mean")
    check(posterior.logvar, "out_sdvae", "enc_logvar")


SMALL_VAE: dict[str, Any] = {"width": 32, "multipliers": (1, 2), "res_blocks": 1, "latent_channels": 4}


def test_texture_vae_reads_each_kind_of_file(tmp_path: Path) -> None:
    config = AutoencoderKLConfig(weights=tmp_path / "vae.safetensors", **SMALL_VAE)
    model = build(config)
    save_file(model.state_dict(), config.weights)
    model.save_pretrained(tmp_path / "folder")
    names = ldm_shapes(config)
    ldm = {theirs: model.state_dict()[ours].reshape(shape) for theirs, (ours, shape) in names.items()}
    callbacks = {"loss.discriminator.weight": torch.zeros(2), **ldm}
    torch.save({"epoch": 3, "state_dict": callbacks, "callbacks": {Path: Path("x")}}, tmp_path / "ldm.ckpt")
    images, identities = smooth_images(2, 16), set()
    for name in ("vae.safetensors", "folder", "ldm.ckpt"):
        vae = AutoencoderKLCodec.load(AutoencoderKLConfig(weights=tmp_path / name, **SMALL_VAE))
        identities.add(vae.identity)
        moments = vae.encode(images)
        assert moments.mean.shape == (2, 4, 8, 8) and moments.logvar is not None
        assert vae.decode(moments.mean).shape == images.shape and vae.decode(moments.mean).dtype == torch.uint8
    assert len(identities) == 1 and vae.downsample == 2


def hub_cache(root: Path, repository: str, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository as the hub's own client keeps it, and the client offline."""
    folder = root / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    for name, content in files.items():
        path = folder / "snapshots" / ("0" * 40) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_texture_vae_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(AutoencoderKLConfig(weights=tmp_path, **SMALL_VAE))
    model.save_pretrained(tmp_path / "folder")
    files = {path.name: path.read_bytes() for path in (tmp_path / "folder").iterdir()}
    files["variants/ldm.safetensors"] = files["diffusion_pytorch_model.safetensors"]
    hub_cache(tmp_path / "cache", "owner/vae", files, monkeypatch)
    by_path = AutoencoderKLCodec.load(AutoencoderKLConfig(weights=tmp_path / "folder"))
    for name in ("owner/vae", "owner/vae/variants/ldm.safetensors"):
        assert AutoencoderKLCodec.load(AutoencoderKLConfig(hub=name, **SMALL_VAE)).identity == by_path.identity
    with pytest.raises(ValueError, match=r"hub: owner/absent cannot be had .* name the path"):
        AutoencoderKLCodec.load(AutoencoderKLConfig(hub="owner/absent"))
    for wrong, message in (({}, "weights: needed"), ({"hub": "vae"}, "hub: 'vae'; allowed: owner/repository")):
        with pytest.raises(ValueError, match=message):
            AutoencoderKLConfig(**wrong)  # type: ignore[arg-type]


def test_texture_vae_names_what_does_not_fit(tmp_path: Path) -> None:
    config = AutoencoderKLConfig(weights=tmp_path / "ldm.ckpt", **SMALL_VAE)
    model = build(config)
    ldm = {t: model.state_dict()[ours].reshape(shape) for t, (ours, shape) in ldm_shapes(config).items()}
    del ldm["encoder.mid.attn_1.q.weight"]
    torch.save(ldm | {"decoder.extra": torch.zeros(1)}, config.weights)
    with pytest.raises(ValueError, match=r"missing: encoder.mid.attn_1.q.weight; unexpected: decoder.extra"):
        AutoencoderKLCodec.load(config)
    pointer = tmp_path / "pointer.ckpt"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="pointer.ckpt is a Git-LFS pointer"):
        AutoencoderKLCodec.load(AutoencoderKLConfig(weights=pointer))
    with pytest.raises(ValueError, match="is no folder of a diffusers AutoencoderKL"):
        AutoencoderKLCodec.load(AutoencoderKLConfig(weights=tmp_path))


# ------------------------------------------------------------------------------------------------- vision


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
    with pytest.raises(ValueError, match="set vision.image_size"):
        wide.features(images)


def test_dinov2_reads_the_names_of_its_authors(tmp_path: Path) -> None:
    """Their files have register_tokens and mask_token, and no position for class or registers is added to these."""
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
    with pytest.raises(ValueError, match="are not those of vit_small"):
        save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
        DINOv2.load(DINOv2Config(model=name, weights=tmp_path / "other.safetensors", image_size=64))
    with pytest.raises(ValueError, match="model: vit_none"):
        DINOv2.load(DINOv2Config(model="vit_none", weights=tmp_path / "timm.safetensors"))
    with pytest.raises(ValueError, match="image_size: 20"):
        DINOv2Config(image_size=20)


def test_the_default_dinov2_has_the_authors_sizes() -> None:
    with torch.device("meta"):
        model = timm.create_model(DINOv2Config().model, img_size=224, num_classes=0)
    assert (model.embed_dim, model.num_prefix_tokens, model.patch_embed.num_patches) == (768, 5, 256)


def test_dinov2_preprocessing() -> None:
    images = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    ready = vision_encoder.preprocess(images)
    assert ready.shape == (1, 3, 56, 56)
    expected = (1 - torch.tensor(vision_encoder.IMAGENET_MEAN)) / torch.tensor(vision_encoder.IMAGENET_STD)
    torch.testing.assert_close(ready[0, :, 20, 20], expected)


def convnet(path: Path) -> ConvNetEncoderConfig:
    model = SmallConvNet(SmallConvNetConfig(widths=(8, 16)))
    model.init_weights(0)
    save_file(model.state_dict(), path)
    return ConvNetEncoderConfig(weights=path)


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


# ---------------------------------------------------------------------------------------------- composite


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
    assert (layout.split(encoded.logvar)[0] == codec.DETERMINISTIC_LOGVAR).all()
    assert (layout.split(encoded.logvar)[1] != codec.DETERMINISTIC_LOGVAR).all()
    assert torch.equal(encoded.features, tokenizer.vision.features(images))
    # Only the texture part is decoded.
    changed = layout.join(texture, semantic + 1)
    assert torch.equal(tokenizer.decode(changed), tokenizer.decode(encoded.latents))
    assert codec.psnr(images, tokenizer.decode(encoded.latents)).mean().item() > 25
    assert set(tokenizer.identities) == {"texture", "vision", "semantic"}
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
