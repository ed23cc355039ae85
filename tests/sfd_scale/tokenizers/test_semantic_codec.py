"""The semantic VAE (SemVAE): golden arrays of the official code, its codec on grids, sizes, initial weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sfd_scale.models.semantic_vae import SemanticVAE, SemanticVAEConfig
from sfd_scale.tokenizers.semantic_codec import SemanticVAECodec, SemanticVAECodecConfig
from tests.helpers.golden_arrays import arrays, check, settings

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
    # The official code keeps log-variances between −30 and 20.
    model.encoder[-1].bias.data += torch.tensor([0.0, 1000.0]).repeat_interleave(GOLDEN_VAE.bottleneck_dim)
    high = model.posterior(tokens)[1]
    model.encoder[-1].bias.data -= torch.tensor([0.0, 2000.0]).repeat_interleave(GOLDEN_VAE.bottleneck_dim)
    low = model.posterior(tokens)[1]
    assert (high == 20).all() and (low == -30).all()


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
    # The official training code writes more than weights (tokenizer/semvae/train.py).
    more = {"iteration": 3, "optimizer_state_dict": {"state": {0: {"step": torch.tensor(3.0)}}}, "config": "a: 1\n"}
    torch.save({**more, "model_state_dict": arrays("weights_semvae")}, tmp_path / "semantic_ae_final.pt")
    theirs = SemanticVAECodec.load(SemanticVAECodecConfig(weights=tmp_path / "semantic_ae_final.pt", heads=HEADS))
    assert theirs.fingerprint == loaded.fingerprint
    # The weights do not show the number of heads, but their meaning depends on it.
    other = SemanticVAECodec.load(SemanticVAECodecConfig(weights=tmp_path / "vae.safetensors", heads=2 * HEADS))
    assert other.fingerprint != loaded.fingerprint
    torch.save(arrays("weights_semvae"), tmp_path / "vae.pt")
    assert (
        SemanticVAECodec.load(SemanticVAECodecConfig(weights=tmp_path / "vae.pt", heads=HEADS)).fingerprint
        == loaded.fingerprint
    )
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors: not the weights of a semantic VAE"):
        SemanticVAECodec.load(SemanticVAECodecConfig(weights=tmp_path / "other.safetensors"))


def test_semantic_vae_sizes_and_start() -> None:
    with torch.device("meta"):
        model = SemanticVAE(SemanticVAEConfig())
    side = sum(parameter.numel() for parameter in model.encoder.parameters())
    assert 28e6 < side < 30e6  # about 29M per side in the paper
    assert len(model.blocks) == 8
    first, second = SemanticVAE(GOLDEN_VAE), SemanticVAE(GOLDEN_VAE)
    first.init_weights(0)
    second.init_weights(0)
    assert all(torch.equal(a, second.state_dict()[name]) for name, a in first.state_dict().items())
    # Xavier: uniform between ±(6 / (in + out))^½.
    assert 0.95 < first.decoder[0].weight.abs().max().item() / (6 / (24 + 4)) ** 0.5 <= 1
    vectors = {name: value for name, value in first.named_parameters() if value.ndim == 1}
    assert all((value == (0 if name.endswith("bias") else 1)).all() for name, value in vectors.items())
    for field, value in (("heads", 7), ("blocks", 0), ("bottleneck_dim", 0)):
        with pytest.raises(ValueError, match=f"{field}: {value}"):
            SemanticVAEConfig(**{field: value})  # type: ignore[arg-type]
