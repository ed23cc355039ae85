"""The quickstart's digits: repeatable, balanced, with splits that share no digit, and legible for a small codec."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor

from sfd_scale.tokenizers.patch_pca import PatchPCA, PatchPCAFitConfig
from sfd_scale.tokenizers.protocols import psnr
from sfd_scale.toy.digits import digit_image, handwritten


def images(split: str, count: int, seed: int = 0) -> Tensor:
    return torch.stack([digit_image(seed, split, i)[0] for i in range(count)])


def test_an_image_is_a_function_of_seed_split_and_index() -> None:
    again = [digit_image(0, "train", index) for index in (7, 3, 7)]
    assert torch.equal(again[0][0], again[2][0]) and again[0][1] == 7 and again[1][1] == 3
    assert again[0][0].shape == (3, 32, 32) and again[0][0].dtype == torch.uint8
    others = (digit_image(1, "train", 7)[0], digit_image(0, "reference", 7)[0], digit_image(0, "train", 17)[0])
    assert all(not torch.equal(again[0][0], other) for other in others)
    state = torch.random.get_rng_state()
    digit_image(0, "train", 8)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_splits_share_no_digit_and_classes_are_balanced() -> None:
    train, reference = handwritten("train"), handwritten("reference")
    assert sum(map(len, train)) + sum(map(len, reference)) == 1797
    for label in range(10):
        own = {hashlib.sha256(d.numpy().tobytes()).digest() for d in train[label]}
        assert len(reference[label]) >= 34
        assert not any(hashlib.sha256(d.numpy().tobytes()).digest() in own for d in reference[label])
    labels = [digit_image(0, "train", index)[1] for index in range(50)]
    assert [labels.count(label) for label in range(10)] == [5] * 10


@pytest.mark.parametrize(("channels", "least"), [(12, 27.5), (16, 30.5)])
def test_a_patch_codec_reconstructs_unseen_images(channels: int, least: float) -> None:
    codec = PatchPCA.fit([images("train", 400)], PatchPCAFitConfig(patch=4, channels=channels))
    unseen = images("reference", 200)
    quality = psnr(unseen, codec.decode(codec.encode(unseen).mean))
    assert quality.mean() > least and quality.min() > 24.5


def test_the_class_shows_through_colour_and_ground() -> None:
    """Nearest class mean of the edges, on digits it has not seen: far above the 10% of chance."""

    def shapes(batch: Tensor) -> Tensor:
        grey = batch.float().mean(1, keepdim=True)
        edges = (grey[..., 1:, 1:] - grey[..., :-1, 1:]).abs() + (grey[..., 1:, 1:] - grey[..., 1:, :-1]).abs()
        rows = torch.nn.functional.avg_pool2d(edges, 3, stride=2).flatten(1)
        return rows / rows.norm(dim=1, keepdim=True)

    train, unseen = shapes(images("train", 1000)), shapes(images("reference", 200))
    means = torch.stack([train[label::10].mean(0) for label in range(10)])
    guess = (unseen @ (means / means.norm(dim=1, keepdim=True)).T).argmax(1)
    assert (guess == torch.arange(200) % 10).float().mean() > 0.4
