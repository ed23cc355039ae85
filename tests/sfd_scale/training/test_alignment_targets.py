"""Alignment features that are stored, made from images or decoded from latents; semantic VAEs on stored features."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from sfd_scale import config, train
from sfd_scale.data.dataloader import DataConfig, FeatureLoader, ImageLoader, LatentLoader
from sfd_scale.models.semantic_vae import SemanticVAE, SemanticVAEConfig
from sfd_scale.recipe import EncodeRecipe, TrainRecipe
from sfd_scale.runtime.batch_split import BatchSplit
from sfd_scale.tasks.task import check_fingerprint
from sfd_scale.tokenizers.composite import FeatureTokenizer
from sfd_scale.training.alignment_targets import DecodedFeatures, OnlineFeatures
from sfd_scale.training.semantic_vae import SemanticVAELossConfig, SemanticVAEObjective
from tests.helpers.encoded import LAYOUT, Pooled, encode_digits, tokenizer

ONE_RANK: dict[str, Any] = {"seed": 5, "split": BatchSplit(16, 1, 1), "rank": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data")
    encode_digits(out, 24, image=True, features="shards")
    return out


def batch(data: Path, **settings: Any) -> Any:
    return LatentLoader(DataConfig(path=data, **settings), **ONE_RANK).batch([(0, index) for index in range(16)])


def test_features_made_from_stored_images_are_those_that_were_stored(data: Path) -> None:
    stored, online = batch(data), batch(data, features="online")
    assert stored.images is None and online.features is None and stored.features.dtype == torch.float16
    assert torch.equal(stored.latents, online.latents)
    made = OnlineFeatures(FeatureTokenizer(Pooled()))(online)
    assert (made - stored.features).abs().max() <= 2**-11
    # Without flipping the images, half of the features would be wrong.
    unflipped = OnlineFeatures(FeatureTokenizer(Pooled()))(batch(data, features="online", flip=False))
    wrong = (unflipped - stored.features).abs().amax((1, 2, 3)) > 0.1
    assert 3 <= wrong.sum() <= 13


def test_decoded_features_are_the_codecs_reconstruction(data: Path) -> None:
    stored, decoded = batch(data), batch(data, features="decoded")
    assert decoded.features is None and decoded.images is None
    reader = LatentLoader(DataConfig(path=data), **ONE_RANK)
    semantic = tokenizer().semantic
    assert semantic is not None
    made = DecodedFeatures(semantic, LAYOUT, reader.stats)(decoded)
    best = semantic.decode(semantic.encode(stored.features.float()).mean)
    assert (made - best).abs().max() < 2e-3
    cosine = functional.cosine_similarity(made, stored.features.float(), dim=1).mean().item()
    assert 0.8 < cosine < 0.999  # three of six numbers are kept
    # Normalised latents would decode to other features.
    raw = semantic.decode(LAYOUT.split(decoded.latents)[1])
    assert (raw - best).abs().max() > 0.3


def test_the_dataloader_reads_only_the_columns_that_are_needed(data: Path, tmp_path: Path) -> None:
    assert batch(data, features="none").features is None
    encode_digits(tmp_path, 16)
    assert batch(tmp_path).features is None
    with pytest.raises(ValueError, match=r"no column 'image' \(data\.features: online; encode with store\.image=true"):
        batch(tmp_path, features="online")
    with pytest.raises(ValueError, match=r"no column 'features' \(encode with store\.features=shards, or set data"):
        FeatureLoader(DataConfig(path=tmp_path), **ONE_RANK)


def test_a_semantic_vae_learns_the_same_from_stored_features_and_from_images(data: Path, tmp_path: Path) -> None:
    manifest = encode_digits(tmp_path, 24, latents="none", features="shards")  # features alone, for a semantic VAE
    assert set(manifest.columns) == {"id", "label", "features", "features_flip"} and manifest.stats_hash is None
    assert manifest.tokenizers == {"vision": Pooled.fingerprint}
    model = SemanticVAE(SemanticVAEConfig(input_dim=6, bottleneck_dim=2, hidden_dim=8, heads=2, blocks=1))
    model.init_weights(0)
    keys = [(0, index) for index in range(16)]
    stored = FeatureLoader(DataConfig(path=tmp_path), **ONE_RANK).batch(keys)
    images = ImageLoader(DataConfig(path=data, features="online"), **ONE_RANK).batch(keys)
    losses = [
        SemanticVAEObjective(SemanticVAELossConfig(), vision, 2, seed=0)(model, own).total
        for vision, own in ((None, stored), (FeatureTokenizer(Pooled()), images))
    ]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-4) and losses[0].requires_grad
    # Without flips, the random numbers are the same, but half of the samples differ.
    plain = FeatureLoader(DataConfig(path=tmp_path, flip=False), **ONE_RANK).batch(keys)
    other = SemanticVAEObjective(SemanticVAELossConfig(), None, 2, seed=0)(model, plain).total
    assert other.item() != pytest.approx(losses[1].item(), rel=1e-4)


def semvae_recipe(folder: Path, run: Path, **changes: Any) -> TrainRecipe:
    settings: dict[str, Any] = {
        "name": "semvae", "run": str(run), "data": {"path": str(folder)},
        "model": {"kind": "semantic_vae", "input_dim": 6, "bottleneck_dim": 2, "hidden_dim": 8, "heads": 2},
        "objective": {"kind": "semantic_vae"}, "train": {"steps": 3, "global_batch": 8, "log_every": 1},
        "engine": {"kind": "fsdp", "precision": "fp32"}, "wandb": {"mode": "disabled"},
    }  # fmt: skip
    return config.from_dict(TrainRecipe, {**settings, **changes})


def test_a_semantic_vae_trains_from_shards_of_features(data: Path, tmp_path: Path) -> None:
    assert train.train(semvae_recipe(data, tmp_path / "run"), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and all(row["loss/mse"] > 0 for row in rows)
    wide = semvae_recipe(data, tmp_path, model={"kind": "semantic_vae", "input_dim": 7})
    with pytest.raises(ValueError, match=r"model\.input_dim: 7; the stored features have 6"):
        train.train(wide, tmp_path / "wide")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": "decoded"}, r"data\.features: decoded, for a semantic VAE; allowed: shards, online"),
        ({"features": "online"}, r"tokenizer\.vision: missing; data\.features is online"),
    ],
)
def test_sources_that_a_semantic_vae_cannot_have(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        semvae_recipe(tmp_path, tmp_path, data={"path": "x", **changes})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.features=none", "data.features: none, but objective.alignment_weight is above 0"),
        ("tokenizer.semantic=null", "tokenizer.semantic: null; data.features=decoded needs it"),
        ("tokenizer.vision=null", "tokenizer.vision: null; data.features=online needs it"),
    ],
)
def test_alignment_without_a_source_is_refused(override: str, message: str) -> None:
    source = "decoded" if "semantic" in override else "online"
    overrides = [override] if override.startswith("data") else [f"data.features={source}", override]
    with pytest.raises(config.ConfigError, match=message):
        config.load("train/sfd_xl", TrainRecipe, overrides)


def test_a_codec_that_is_not_the_one_of_the_data_is_refused(data: Path) -> None:
    reader = LatentLoader(DataConfig(path=data), **ONE_RANK)
    reader.manifest = replace(reader.manifest, tokenizers={"semantic": "pca:1"})
    check_fingerprint("semantic", reader, {"semantic": "pca:1"})
    with pytest.raises(ValueError, match=r"tokenizer\.semantic: pca:2, but the data was encoded with pca:1"):
        check_fingerprint("semantic", reader, {"semantic": "pca:2"})


def test_bf16_encoders_are_close_and_give_float32() -> None:
    images = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    model = torch.nn.Conv2d(3, 6, 4, stride=4)
    with torch.no_grad():
        model.weight.copy_(torch.linspace(-0.1, 0.1, model.weight.numel()).view_as(model.weight))

    class Conv(Pooled):
        def features(self, images: torch.Tensor) -> torch.Tensor:
            return model(images.float() / 255)

    exact, narrow = (FeatureTokenizer(Conv(), p).features(images) for p in ("fp32", "bf16"))  # type: ignore[arg-type]
    assert narrow.dtype == torch.float32 and 1e-5 < (narrow - exact).abs().max() < 2e-2


def test_latents_without_codecs_are_refused() -> None:
    for part in ("texture", "semantic"):
        with pytest.raises(config.ConfigError, match=rf"tokenizer\.{part}: null; name a {part} codec"):
            config.load("data/encode_imagenet256", EncodeRecipe, [f"tokenizer.{part}=null"])
    texture_alone = ["tokenizer.semantic=null", "latents.semantic_channels=0"]
    assert config.load("data/encode_imagenet256", EncodeRecipe, texture_alone).latents.channels == 32
