"""Closed-form codecs: PCA of patches and of features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sfd_scale.tokenizers import protocols as codec
from sfd_scale.tokenizers.patch_pca import PatchPCA, PatchPCAConfig, PatchPCAFitConfig, from_patches, to_patches
from sfd_scale.tokenizers.pca import FeaturePCA, FeaturePCAConfig, fit_components
from tests.helpers.tokenizer_parts import draws, smooth_images


def test_components_are_those_of_the_whole_covariance() -> None:
    """Streamed in batches, with a large mean, against NumPy's covariance of all rows."""
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
    with pytest.raises(ValueError, match="fewer than the rows to fit, 2"):
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
    # The error is the variance of the dropped components (quantisation to 8 bits adds 1/12 of a level²).
    lost = exact.variance[12:].sum().item() / 48 * 127.5**2
    square = (pca.decode(moments.mean).double() - images.double()).square().mean().item()
    assert square == pytest.approx(lost + 1 / 12, rel=0.02)
    assert codec.psnr(images, pca.decode(moments.mean)).mean().item() > 25
    pca.save(tmp_path / "folder" / "pca.safetensors")
    again = PatchPCA.load(PatchPCAConfig(weights=tmp_path / "folder" / "pca.safetensors"))
    assert again.fingerprint == pca.fingerprint != exact.fingerprint
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
    assert FeaturePCA.load(FeaturePCAConfig(weights=tmp_path / "pca.safetensors")).fingerprint == pca.fingerprint
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors is not a feature PCA: tensors are missing: directions"):
        FeaturePCA.load(FeaturePCAConfig(weights=tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="none.safetensors; allowed: an existing"):
        FeaturePCA.load(FeaturePCAConfig(weights=tmp_path / "none.safetensors"))
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense, not tensors")
    with pytest.raises(
        ValueError,
        match="bad.safetensors is a text file .*, not a safetensors file; .*allowed: a file of a feature PCA",
    ):
        FeaturePCA.load(FeaturePCAConfig(weights=tmp_path / "bad.safetensors"))
