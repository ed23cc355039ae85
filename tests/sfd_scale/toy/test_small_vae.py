"""The small texture VAE: its sizes, its loss, training on digits, and the codec of its export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from sfd_scale.data.batches import ImageBatch
from sfd_scale.tokenizers.make import make_texture
from sfd_scale.tokenizers.protocols import psnr
from sfd_scale.tokenizers.small_vae import SmallVAECodecConfig
from sfd_scale.toy.digits import digit_image
from sfd_scale.toy.small_vae import SmallVAE, SmallVAEConfig, config_of
from sfd_scale.training.texture_vae import TextureVAELossConfig, TextureVAEObjective

SMALL = SmallVAEConfig(patch=2, widths=(16, 32), blocks=1, latent_channels=8, image_size=16)


def made(config: SmallVAEConfig = SMALL, seed: int = 0) -> SmallVAE:
    model = SmallVAE(config)
    model.init_weights(seed)
    return model


def digits(count: int, size: int) -> Tensor:
    return torch.stack([digit_image(0, "train", index, size)[0] for index in range(count)])


def batch_of(images: Tensor) -> ImageBatch:
    keys = torch.stack([torch.zeros(len(images), dtype=torch.int64), torch.arange(len(images))], 1)
    return ImageBatch(images, torch.zeros(len(images), dtype=torch.int64), keys)


def test_the_grid_and_the_channels_follow_the_settings() -> None:
    config = SmallVAEConfig()
    assert (config.downsample, config.grid) == (16, 4) and "1/16, 16 channels" in config.description
    reconstruction, mean, logvar = made(config)(torch.zeros(2, 3, 64, 64), torch.zeros(2, 16, 4, 4))
    assert reconstruction.shape == (2, 3, 64, 64) and mean.shape == logvar.shape == (2, 16, 4, 4)
    found = config_of(made(config).state_dict())
    assert (found.patch, found.widths, found.blocks, found.latent_channels) == (4, (64, 96, 128), 2, 16)


def test_an_image_does_not_depend_on_its_batch_and_the_noise_has_the_posterior_deviation() -> None:
    model, images = made(), digits(3, 16).float() / 127.5 - 1
    noise = torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    reconstruction, mean, logvar = model(images, noise)
    alone = model(images[1:2], noise[1:2])[0]
    torch.testing.assert_close(alone, reconstruction[1:2])
    torch.testing.assert_close(reconstruction, model.reconstruct(mean + logvar.exp().sqrt() * noise))


def test_a_latent_reaches_its_neighbours() -> None:
    """The decoder has no edges between latent positions: a change of one latent changes pixels beside its patch."""
    model = made()
    zero = torch.zeros(1, 8, 4, 4)
    one = zero.clone()
    one[..., 1, 1] = 1
    changed = (model.reconstruct(one) - model.reconstruct(zero)).abs().amax((0, 1)) > 1e-6
    assert changed[4:8, 4:8].all() and changed[4:8, 8].any() and changed[3, 4:8].any()


def test_the_loss_is_the_absolute_error_and_the_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 2, 3, 16, 16, generator=generator)
    mean, logvar = torch.randn(2, 2, 8, 4, 4, generator=generator)
    objective = TextureVAEObjective(TextureVAELossConfig(kl_weight=0.01), (8, 4, 4), 0)
    found = objective.loss(a, b, mean, logvar)
    kl = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum((1, 2, 3)).mean()
    torch.testing.assert_close(found.total, (a - b).abs().mean() + 0.01 * kl)
    torch.testing.assert_close(found.terms["kl"], kl)


def test_training_reconstructs_digits_and_the_codec_reads_its_weights(tmp_path: Path) -> None:
    images = digits(32, 16)
    model, objective = made(), TextureVAEObjective(TextureVAELossConfig(), (8, 4, 4), 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        objective(model, batch_of(images)).total.backward()
        optimizer.step()
    save_file(model.state_dict(), tmp_path / "texture.safetensors")
    codec = make_texture(SmallVAECodecConfig(weights=tmp_path / "texture.safetensors"), torch.device("cpu"))
    mean, logvar = codec.encode(images)
    assert (codec.channels, codec.downsample) == (8, 4) and logvar is not None and mean.dtype == torch.float32
    assert psnr(images, codec.decode(mean)).mean() > 19
    assert codec.fingerprint.startswith("small_vae:")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": (12,)}, "multiples of 8"),
        ({"image_size": 24, "patch": 5}, "image_size: 24"),
        ({"blocks": 0}, "blocks"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SmallVAEConfig(**changes)  # type: ignore[arg-type]


def test_other_weights_are_refused(tmp_path: Path) -> None:
    save_file({"mean": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not the weights of a small_vae"):
        make_texture(SmallVAECodecConfig(weights=tmp_path / "other.safetensors"), torch.device("cpu"))
