"""PCA codecs fitted on several ranks: the same bits for any world size, and as one pass over all rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sfd_scale import config, encode
from sfd_scale.recipe import FitRecipe
from sfd_scale.tokenizers.patch_pca import PatchPCA, PatchPCAFitConfig
from sfd_scale.tokenizers.pca import FeaturePCA, FeaturePCAConfig, fit_components, fit_in_order
from sfd_scale.tokenizers.vision_encoder import ConvNetEncoder, ConvNetEncoderConfig
from sfd_scale.toy.convnet import SmallConvNet, SmallConvNetConfig
from tests.helpers.encoded import digits
from tests.helpers.ranks import run_ranks

COUNT, BATCH = 35, 8  # five batches for two ranks, the last of three images


def recipe(root: Path, codec: dict[str, object], name: str, **changes: object) -> FitRecipe:
    return config.from_dict(
        FitRecipe,
        {
            "name": name, "source": {"kind": "digits", "num_images": COUNT, "seed": 3}, "codec": codec,
            "tokenizer": {"vision": {"kind": "convnet", "weights": str(root / "vision.safetensors")}},
            "out": str(root / f"{name}.safetensors"), "batch": BATCH, **changes,
        },
    )  # fmt: skip


def fit_both(root: Path, name: str) -> None:
    encode.fit(recipe(root, {"kind": "pca", "channels": 5}, f"features-{name}"))
    encode.fit(recipe(root, {"kind": "patch_pca", "patch": 4, "channels": 6}, f"patches-{name}"))


def test_the_bits_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    model = SmallConvNet(SmallConvNetConfig(widths=(8, 16, 24)))
    model.init_weights(0)
    save_file(model.state_dict(), tmp_path / "vision.safetensors")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks have
    fit_both(tmp_path, "one")
    torch.set_num_threads(threads)
    run_ranks(fit_both, 2, tmp_path, "two", timeout=400)
    for name in ("features", "patches"):
        assert (tmp_path / f"{name}-one.safetensors").read_bytes() == (
            tmp_path / f"{name}-two.safetensors"
        ).read_bytes()
    images = torch.stack([digits(COUNT)[i][0] for i in range(COUNT)])
    vision = ConvNetEncoder.load(ConvNetEncoderConfig(weights=tmp_path / "vision.safetensors"))
    whole = FeaturePCA.fit([vision.features(images)], 5).state_dict()
    found = load_file(tmp_path / "features-one.safetensors")
    for part in whole:
        torch.testing.assert_close(found[part], whole[part], atol=1e-4, rtol=1e-4)
    plain = PatchPCA.fit([images], PatchPCAFitConfig(patch=4, channels=6)).state_dict()
    assert (load_file(tmp_path / "patches-one.safetensors")["directions"] - plain["directions"]).abs().max() < 1e-4
    codec = FeaturePCA.load(FeaturePCAConfig(weights=tmp_path / "features-one.safetensors"))
    assert (codec.channels, codec.dim) == (5, 24)


def test_a_stream_is_merged_as_one_pass_would() -> None:
    rows = torch.randn(300, 5, generator=torch.Generator().manual_seed(0)) + 100
    streamed, once = fit_in_order(rows.split(70), 5, 2), fit_components([rows], 2)
    assert (streamed.directions - once.directions).abs().max() < 1e-5
    assert (streamed.variance - once.variance).abs().max() < 1e-4


def test_settings_of_a_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.vision: null; a PCA of features needs a vision encoder"):
        recipe(tmp_path, {"kind": "pca"}, "x", tokenizer={})
    with pytest.raises(ValueError, match="batch: 0; allowed: 1 and up"):
        recipe(tmp_path, {"kind": "patch_pca"}, "x", batch=0)
    assert config.load("tokenizer/fit_dinov2_pca8", FitRecipe).codec.channels == 8
