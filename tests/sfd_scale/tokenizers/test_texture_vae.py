"""The texture VAE (AutoencoderKL): golden arrays of the official code, all file formats, and the hub."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sfd_scale.tokenizers.texture_vae import AutoencoderKLCodec, AutoencoderKLConfig, build, from_ldm, ldm_name
from tests.helpers.golden_arrays import arrays, check, settings
from tests.helpers.tokenizer_parts import smooth_images


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
    images, fingerprints = smooth_images(2, 16), set()
    for name in ("vae.safetensors", "folder", "ldm.ckpt"):
        vae = AutoencoderKLCodec.load(AutoencoderKLConfig(weights=tmp_path / name, **SMALL_VAE))
        fingerprints.add(vae.fingerprint)
        moments = vae.encode(images)
        assert moments.mean.shape == (2, 4, 8, 8) and moments.logvar is not None
        assert vae.decode(moments.mean).shape == images.shape and vae.decode(moments.mean).dtype == torch.uint8
    assert len(fingerprints) == 1 and vae.downsample == 2


def hub_cache(root: Path, repository: str, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository in the cache of the hub's client, with the client offline."""
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
        assert AutoencoderKLCodec.load(AutoencoderKLConfig(hub=name, **SMALL_VAE)).fingerprint == by_path.fingerprint
    with pytest.raises(ValueError, match=r"hub: owner/absent cannot be downloaded .* set weights to a local copy"):
        AutoencoderKLCodec.load(AutoencoderKLConfig(hub="owner/absent"))
    for wrong, message in (({}, "weights: set either"), ({"hub": "vae"}, "hub: 'vae'; allowed: owner/repository")):
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
    with pytest.raises(ValueError, match="is not a folder of a diffusers AutoencoderKL"):
        AutoencoderKLCodec.load(AutoencoderKLConfig(weights=tmp_path))
