"""What semantics know, on latents with known answers; losses and the oracle of a lead, with a model in closed form."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from eval.study import lead, semantics
from eval.study import study as studies
from eval.study.lead import Pictures
from sfd_scale.diffusion.fixed_step import FixedStepConfig
from sfd_scale.diffusion.guidance import FlowModel
from sfd_scale.diffusion.latents import LatentLayout
from sfd_scale.diffusion.schedule import SemanticFirstSchedule

LAYOUT = LatentLayout(texture_channels=2, semantic_channels=3, size=4)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_shares_of_the_variance_are_those_of_the_construction() -> None:
    """Texture = class mean (variance 1) + linear map of semantics (variance 1) + noise (variance 2)."""
    count = 2000
    labels = torch.arange(count) % 4
    semantic, noise = drawn(count, 3, 4, 4, seed=1), drawn(count, 2, 4, 4, seed=2)
    semantic += 0.8 * torch.eye(4)[labels][:, :3, None, None]
    offsets = torch.tensor([[-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0], [1.0, 1.0]])[labels][:, :, None, None]
    seen = semantic - 0.8 * torch.eye(4)[labels][:, :3, None, None]
    texture = offsets + seen[:, :2] + 2**0.5 * noise
    known = semantics.measure(torch.cat([texture, semantic], 1), labels, LAYOUT)
    assert known.by_label == pytest.approx(0.25, abs=0.02)
    # The class moves the semantics, but not what remains of texture: that costs a little of one third.
    assert 0.27 < known.by_semantics < 1 / 3 + 0.02
    assert known.class_accuracy > 0.85 and known.features_accuracy is None
    told = semantics.measure(torch.cat([texture, semantic], 1), labels, LAYOUT, torch.eye(4)[labels])
    assert told.features_accuracy == 1 and told.class_accuracy == known.class_accuracy
    blind = semantics.measure(torch.cat([texture, drawn(count, 3, 4, 4, seed=5)], 1), labels, LAYOUT)
    assert abs(blind.by_semantics) < 0.01 and blind.class_accuracy < 0.33
    with pytest.raises(ValueError, match="3 pictures of 4 classes"):
        semantics.measure(torch.cat([texture, semantic], 1)[1:4], labels[1:4], LAYOUT)


def perfect(data: Tensor, noise: Tensor) -> FlowModel:
    """Knows the velocity of texture where the semantics that it sees are the true ones, and else says 0."""

    def model(x: Tensor, t_texture: Tensor, t_semantic: Tensor, y: Tensor) -> tuple[Tensor, None]:
        rows = y // 1000
        times = t_semantic[:, None, None, None]
        path = times * data[rows] + (1 - times) * noise[rows]
        right = torch.isclose(x[:, 2:], path[:, 2:], atol=1e-5).flatten(1).all(1)
        return (data[rows] - noise[rows]) * right[:, None, None, None], None

    return model


def test_texture_loss_is_zero_with_the_semantics_of_the_picture_alone() -> None:
    data = drawn(6, 5, 4, 4)
    pictures = Pictures.of(data, torch.arange(6) * 1000)
    model = perfect(pictures.latents, pictures.noise)
    for delta in (0.0, 0.3, 1.0):
        schedule = SemanticFirstSchedule(delta_t=delta)
        assert lead.part_loss(model, pictures, LAYOUT, schedule, "texture", 0.5) < 1e-9
        shown = Pictures(data.roll(1, 0), pictures.labels, pictures.noise)
        mixed = Pictures(LAYOUT.join(data[:, :2], shown.latents[:, 2:]), pictures.labels, pictures.noise)
        target = (data - pictures.noise)[:, :2].square().mean()
        assert lead.part_loss(model, pictures, LAYOUT, schedule, "texture", 0.5, mixed) == pytest.approx(float(target))


@pytest.mark.parametrize("delta", [0.0, 0.3, 1.0])
def test_the_loss_of_semantics_is_taken_at_their_clock_and_of_their_channels(delta: float) -> None:
    """A model that says a third of the true velocity of semantics, whose square error is 4/9 of its square."""
    data, schedule = drawn(6, 5, 4, 4), SemanticFirstSchedule(delta_t=delta)
    pictures, seen = Pictures.of(data, torch.zeros(6, dtype=torch.long)), []

    def model(x: Tensor, t_texture: Tensor, t_semantic: Tensor, y: Tensor) -> tuple[Tensor, None]:
        seen.append((round(float(t_texture[0]), 5), round(float(t_semantic[0]), 5)))
        return (data - pictures.noise) / 3, None

    found = lead.part_loss(model, pictures, LAYOUT, schedule, "semantic", 0.6)
    assert found == pytest.approx(4 / 9 * float((data - pictures.noise)[:, 2:].square().mean()))
    assert seen == [(pytest.approx(max(0.6 - delta, 0.0)), 0.6)]


def test_semantics_of_others_stay_in_the_class() -> None:
    labels = torch.tensor([0, 1, 0, 1, 0])
    data = torch.arange(5.0)[:, None, None, None].expand(5, 5, 4, 4)
    other = Pictures.of(data, labels).with_semantics_of_others(LAYOUT)
    assert other.latents[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert other.latents[:, 4, 0, 0].tolist() == [4, 3, 0, 1, 2]


@pytest.mark.parametrize("delta", [0.0, 0.3, 1.0])
def test_the_oracle_draws_the_textures_of_its_pictures(delta: float) -> None:
    """A model that is right where it sees the true semantics ends at the true texture; without the oracle it fails."""
    data = drawn(6, 5, 4, 4)
    pictures = Pictures.of(data, torch.arange(6) * 1000)
    schedule, sampler = SemanticFirstSchedule(delta_t=delta), FixedStepConfig(num_steps=400)
    model = perfect(data, pictures.noise)
    found = lead.sample_textures(model, pictures, LAYOUT, schedule, sampler, oracle=True)
    torch.testing.assert_close(found[:, :2], data[:, :2], atol=0.02, rtol=0.02)

    def wrong_semantics(*inputs: Tensor) -> tuple[Tensor, None]:
        velocity, _ = model(*inputs)
        return torch.cat([velocity[:, :2], -velocity[:, 2:]], 1), None

    assert torch.equal(lead.sample_textures(wrong_semantics, pictures, LAYOUT, schedule, sampler, oracle=True)[:, :2],
                       found[:, :2])  # fmt: skip
    missed = lead.sample_textures(wrong_semantics, pictures, LAYOUT, schedule, sampler, oracle=False)
    assert (missed[:, :2] - data[:, :2]).square().mean() > 0.3


def test_other_latents_are_measured_again_and_lost_ones_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, data = 200, tmp_path / "latents"
    data.mkdir()
    latents = {"a": drawn(count, 5, 4, 4), "b": torch.cat([drawn(count, 2, 4, 4), drawn(count, 3, 4, 4, seed=3)], 1)}
    monkeypatch.setattr(
        semantics,
        "read_latents",
        lambda folder: (latents[(folder / "manifest.json").read_text()], torch.arange(count) % 4),
    )
    monkeypatch.setattr(semantics, "read_pooled_features", lambda folder: None)
    cell = SimpleNamespace(data=SimpleNamespace(path=data), latents=LAYOUT)
    recipe = SimpleNamespace(semantics="sfd", seeds=(0,), out=tmp_path)
    study: Any = SimpleNamespace(recipe=recipe, cell=lambda name, seed: cell)
    found = []
    for name in ("a", "b"):
        (data / "manifest.json").write_text(name)
        found.append(cast(semantics.Knowledge, studies.knowledge(study)))
    assert found[0] != found[1]
    (data / "manifest.json").unlink()
    assert studies.knowledge(study) == found[1]
