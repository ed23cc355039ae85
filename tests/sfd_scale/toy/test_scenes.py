"""Scenes of the study: their draws, their splits, their classes."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest
import torch

from sfd_scale.toy import scenes
from sfd_scale.toy.scenes import SceneSplit, scene_digits, scene_image

SPLITS: tuple[SceneSplit, ...] = ("train", "reference", "classifier")


def test_a_scene_is_a_function_of_seed_split_and_index() -> None:
    again = [scene_image(0, "train", index) for index in (7, 3, 7)]
    assert torch.equal(again[0][0], again[2][0]) and (again[0][1], again[1][1]) == (7, 3)
    assert again[0][0].shape == (3, 64, 64) and again[0][0].dtype == torch.uint8
    others = [scene_image(1, "train", 7), scene_image(0, "reference", 7), scene_image(0, "train", 17)]
    assert all(not torch.equal(again[0][0], other) for other, _ in others)
    head = hashlib.sha256(again[0][0].numpy().tobytes()).hexdigest()
    state = torch.random.get_rng_state()
    assert hashlib.sha256(scene_image(0, "train", 7)[0].numpy().tobytes()).hexdigest() == head
    assert torch.equal(torch.random.get_rng_state(), state)


def test_splits_of_scenes_share_no_digit() -> None:
    def digests(split: SceneSplit) -> set[bytes]:
        return {hashlib.sha256(d.numpy().tobytes()).digest() for own in scene_digits(split) for d in own}

    train, reference, classifier = map(digests, SPLITS)
    assert not train & reference and not train & classifier and not reference & classifier
    assert sum(len(own) for split in SPLITS for own in scene_digits(split)) == 1797


def test_the_class_is_the_digit_that_stands_there_most_often(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    inner = scenes._placed
    monkeypatch.setattr(scenes, "_placed", lambda split, shown, *rest: seen.append(shown) or inner(split, shown, *rest))
    labels = [scene_image(0, "train", index)[1] for index in range(60)]
    for label, shown in zip(labels, seen, strict=True):
        (first, most), *rest = Counter(shown).most_common()
        assert first == label and most > max(count for _, count in rest) and 3 <= len(shown) <= 5
    assert Counter(labels) == dict.fromkeys(range(10), 6)
    scene_image(0, "classifier", 3)
    assert set(seen[-1]) == {3}


# ------------------------------------------------------------------------------------------ pretext task
