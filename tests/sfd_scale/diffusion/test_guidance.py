"""Classifier-free guidance and AutoGuidance: formula, interval, evaluations, and refused settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sfd_scale.diffusion.conditioning import ClassLabels
from sfd_scale.diffusion.guidance import AutoGuidance, ClassifierFreeGuidance, NoGuidance, guided
from sfd_scale.diffusion.latents import LatentLayout
from sfd_scale.diffusion.schedule import Clocks

LAYOUT = LatentLayout(texture_channels=2, semantic_channels=1, size=2)
NULL = 10


class Constant:
    """A model whose velocity is one number, by label; it records its calls."""

    def __init__(self, by_label: dict[int, float]) -> None:
        self.by_label, self.calls = by_label, list[dict[str, Any]]()

    def __call__(self, x: Tensor, t_texture: Tensor, t_semantic: Tensor, y: Tensor, /) -> tuple[Tensor, None]:
        self.calls.append({"labels": y.tolist(), "t_texture": t_texture.tolist(), "t_semantic": t_semantic.tolist()})
        values = torch.tensor([self.by_label[label] for label in y.tolist()])
        return values[:, None, None, None].expand_as(x).clone(), None


def ask(velocity: Any, t_texture: list[float], t_semantic: list[float], labels: list[int]) -> Tensor:
    """(N, 2): the velocity on texture and semantic channels."""
    x = torch.zeros(len(labels), *LAYOUT.shape)
    v = velocity(x, Clocks(torch.tensor(t_texture), torch.tensor(t_semantic)), torch.tensor(labels))
    texture, semantic = LAYOUT.split(v)
    return torch.stack([texture.mean((1, 2, 3)), semantic.mean((1, 2, 3))], 1)


def test_without_guidance_the_model_is_evaluated_once() -> None:
    model = Constant({3: 5.0})
    assert ask(guided(model, NoGuidance(), LAYOUT), [0.1], [0.2], [3]).tolist() == [[5, 5]]
    assert model.calls == [{"labels": [3], "t_texture": pytest.approx([0.1]), "t_semantic": pytest.approx([0.2])}]


def test_cfg_extrapolates_from_the_null_label_with_a_scale_for_each_part() -> None:
    model = Constant({3: 5.0, 4: 1.0, NULL: 2.0})
    config = ClassifierFreeGuidance(scale_texture=1.5, scale_semantic=3.0)
    v = ask(guided(model, config, LAYOUT, conditioning=ClassLabels(NULL)), [0.1, 0.6], [0.2, 0.9], [3, 4])
    assert v.tolist() == [[2 + 1.5 * 3, 2 + 3 * 3], [2 - 1.5, 2 - 3]]
    # One doubled batch, each half at the same clocks.
    assert [call["labels"] for call in model.calls] == [[3, 4, NULL, NULL]]
    assert model.calls[0]["t_texture"] == pytest.approx([0.1, 0.6, 0.1, 0.6])
    assert model.calls[0]["t_semantic"] == pytest.approx([0.2, 0.9, 0.2, 0.9])


def test_autoguidance_extrapolates_from_the_guidance_model_at_the_same_label() -> None:
    model, guide = Constant({3: 5.0}), Constant({3: 4.0})
    config = AutoGuidance(scale_texture=1.5, scale_semantic=0.0)
    assert ask(guided(model, config, LAYOUT, guide=guide), [0.1], [0.2], [3]).tolist() == [[5.5, 4]]
    assert guide.calls == [{"labels": [3], "t_texture": pytest.approx([0.1]), "t_semantic": pytest.approx([0.2])}]


POINTS = {"mixed": (0.1, 0.4), "below": (0.1, 0.2), "above": (0.5, 0.8), "at": (0.25, 0.55)}
GUIDED = {  # which of (texture, semantic) is guided at each point, with interval_start 0.25
    "none": {"mixed": (1, 1), "below": (1, 1), "above": (1, 1), "at": (1, 1)},
    "both": {"mixed": (0, 1), "below": (0, 0), "above": (1, 1), "at": (1, 1)},
    "texture": {"mixed": (0, 1), "below": (0, 1), "above": (1, 1), "at": (1, 1)},
    "semantic": {"mixed": (1, 1), "below": (1, 0), "above": (1, 1), "at": (1, 1)},
}


@pytest.mark.parametrize("mode", GUIDED)
@pytest.mark.parametrize("kind", [ClassifierFreeGuidance, AutoGuidance])
def test_each_part_obeys_the_interval_on_its_own_clock(kind: Any, mode: Any) -> None:
    start = 0.0 if mode == "none" else 0.25
    config = kind(scale_texture=2.0, scale_semantic=3.0, interval_start=start, interval_mode=mode)
    model, guide = Constant({3: 5.0, NULL: 4.0}), Constant({3: 4.0})
    auto = kind is AutoGuidance
    velocity = guided(
        model, config, LAYOUT, guide=guide if auto else None, conditioning=None if auto else ClassLabels(NULL)
    )
    times = list(POINTS.values())
    v = ask(velocity, [t for t, _ in times], [s for _, s in times], [3] * 4)
    expected = [[6.0 if texture else 5.0, 7.0 if semantic else 5.0] for texture, semantic in GUIDED[mode].values()]
    assert v.tolist() == expected
    # The worse velocity is evaluated only for the samples whose velocity it changes.
    evaluated = len(guide.calls[0]["labels"]) if auto else model.calls[0]["labels"].count(NULL)
    assert evaluated == sum(any(parts) for parts in GUIDED[mode].values())


def test_the_guidance_model_is_not_evaluated_where_it_changes_nothing() -> None:
    model, guide = Constant({3: 5.0}), Constant({3: 4.0})
    config = AutoGuidance(scale_texture=2.0, scale_semantic=1.0, interval_start=0.25, interval_mode="both")
    velocity = guided(model, config, LAYOUT, guide=guide)
    assert ask(velocity, [0.1], [0.4], [3]).tolist() == [[5, 5]] and guide.calls == []
    assert ask(velocity, [0.3], [0.6], [3]).tolist() == [[6, 5]] and len(guide.calls) == 1


def test_extrapolation_is_in_the_dtype_of_x() -> None:
    """bfloat16 represents 1 and 1 + 2⁻⁷, but not the extrapolation between them."""

    def model(x: Tensor, t_texture: Tensor, t_semantic: Tensor, y: Tensor, /) -> tuple[Tensor, None]:
        good = torch.where(y == NULL, 1.0, 1 + 2**-7)[:, None, None, None]
        return good.expand_as(x).bfloat16(), None

    config = ClassifierFreeGuidance(scale_texture=256.5, scale_semantic=256.5)
    v = ask(guided(model, config, LAYOUT, conditioning=ClassLabels(NULL)), [0.5], [0.5], [3])
    assert v.dtype == torch.float32 and v.tolist() == [[1 + 256.5 * 2**-7] * 2]


@pytest.mark.parametrize("kind", [ClassifierFreeGuidance, AutoGuidance])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale_texture": 1.0, "scale_semantic": 1.0}, "scale_texture: 1.0, and scale_semantic too: no guidance"),
        ({"scale_texture": float("nan")}, "scale_texture: nan"),
        ({"scale_semantic": -1.0}, "scale_semantic: -1.0"),
        ({"interval_start": 0.2}, "interval_start: 0.2 has no effect with interval_mode none"),
        ({"interval_start": 1.0, "interval_mode": "both"}, "interval_start: 1.0; allowed"),
    ],
)
def test_guidance_that_would_do_nothing_is_refused(kind: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**fields)


def test_a_guidance_model_is_needed_or_refused() -> None:
    model = Constant({})
    with pytest.raises(ValueError, match="autoguidance needs a guidance model"):
        guided(model, AutoGuidance(), LAYOUT)
    for config in (NoGuidance(), ClassifierFreeGuidance()):
        with pytest.raises(ValueError, match=f"kind {config.kind} ignores the guidance model"):
            guided(model, config, LAYOUT, guide=model, conditioning=ClassLabels(NULL))
    with pytest.raises(ValueError, match="cfg needs the null condition"):
        guided(model, ClassifierFreeGuidance(), LAYOUT)
