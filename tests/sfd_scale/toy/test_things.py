"""The pictures of things: repeatable, balanced, several drawings of one class on a ground that does not tell it."""

from __future__ import annotations

import sys

import pytest
import torch

from sfd_scale.data.sources import ThingsConfig, make_source
from sfd_scale.toy import things
from sfd_scale.toy.things import CLASSES, drawings, photographs, thing_image


def test_a_picture_is_a_function_of_seed_split_and_index() -> None:
    again = [thing_image(0, "train", index) for index in (7, 3, 7)]
    assert torch.equal(again[0][0], again[2][0]) and (again[0][1], again[1][1]) == (7, 3)
    assert again[0][0].shape == (3, 64, 64) and again[0][0].dtype == torch.uint8
    others = [thing_image(1, "train", 7), thing_image(0, "reference", 7), thing_image(0, "train", 17)]
    assert all(not torch.equal(again[0][0], other) for other, _ in others)
    state = torch.random.get_rng_state()
    thing_image(0, "train", 8)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_drawings_have_ten_classes_without_a_drawing_in_two() -> None:
    codes = [code for row in things.THINGS.values() for code in row.split()]
    assert len(set(codes)) == len(codes) == sum(map(len, drawings()))
    for own in drawings():
        assert own.shape[1:] == (4, 72, 72) and 6 <= len(own) <= 8
        assert torch.equal(own[:, :3] * (own[:, 3:] == 0), torch.zeros_like(own[:, :3])), "zero where transparent"
    assert photographs().shape == (2, 3, 427, 640) and photographs().min() >= 0 and photographs().max() <= 1


def test_a_drawing_is_placed_upright_in_its_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without mirror, turn, zoom and shift, a drawing of alpha 1 covers the square that its layout names."""
    solid = torch.ones(1, 4, 72, 72)
    solid[0, 0, :36] = 0  # red below only
    own = [[0.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]]
    (placed,) = things._placed(solid, ((0.25, 0.5, 0.5),), own, 64)
    assert placed[3].sum() == pytest.approx(32 * 32, rel=0.02)
    rows, columns = (placed[3] > 0.5).nonzero(as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (16, 47, 0, 31)
    assert placed[0, 40, 16] > 0.9 and placed[0, 24, 16] < 0.1


def test_the_ground_does_not_tell_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grounds of two classes come from the same draws: with the same random numbers they are equal."""
    first, second = (thing_image(0, "train", index)[0] for index in (0, 1))
    blank = tuple(torch.zeros_like(own) for own in drawings())
    monkeypatch.setattr(things, "drawings", lambda: blank)
    monkeypatch.setattr(things.seeding, "generator", lambda *_: torch.Generator().manual_seed(3))
    grounds = [thing_image(0, "train", index)[0] for index in (0, 1)]
    assert torch.equal(*grounds) and not torch.equal(first, second)


def test_the_source_names_its_classes() -> None:
    source = make_source(ThingsConfig(num_images=12))
    assert (source.num_classes, source.classes, len(source), source.size) == (10, CLASSES, 12, 64)
    assert [source[index][1] for index in range(12)] == [*range(10), 0, 1]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(things.importlib.util, "find_spec", lambda name: None)
    drawings.cache_clear()
    with pytest.raises(ValueError, match=r"pip install 'sfd-scale\[study\]'"):
        drawings()
    photographs.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'sfd-scale\[study\]'"):
        photographs()
    drawings.cache_clear()
    photographs.cache_clear()
