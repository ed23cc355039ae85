"""The two clocks of semantic-first diffusion: closed forms, and the official time grids and training times."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sfd_scale.diffusion.schedule import SemanticFirstSchedule, logit_normal
from tests.helpers.golden_arrays import arrays, check, settings

LEAD = SemanticFirstSchedule(delta_t=0.3)
SYNC = SemanticFirstSchedule(delta_t=0.0)
GOLDEN = SemanticFirstSchedule(delta_t=settings["delta"])


def test_semantics_lead_and_texture_follows() -> None:
    texture, semantic = LEAD.clocks(torch.tensor([0.0, 0.2, 0.5, 1.0, 1.1, 1.3]))
    torch.testing.assert_close(texture, torch.tensor([0, 0, 0.2, 0.7, 0.8, 1.0]))
    torch.testing.assert_close(semantic, torch.tensor([0, 0.2, 0.5, 1, 1, 1]))
    assert pytest.approx(1.3) == LEAD.end


def test_parts_move_in_three_phases() -> None:
    texture, semantic = LEAD.active_mask(torch.tensor([0.0, 0.29, 0.3, 1.0, 1.01, 1.3, 1.4]))
    assert texture.tolist() == [False, False, True, True, True, True, True]
    assert semantic.tolist() == [True, True, True, True, False, False, False]


def test_beyond_the_end_the_texture_clock_continues_and_semantics_stay() -> None:
    clocks = LEAD.clocks(torch.tensor([1.5]))
    assert clocks.texture.item() == pytest.approx(1.2) and clocks.semantic.item() == 1


def test_without_lead_there_is_one_clock() -> None:
    g = torch.tensor([0.0, 0.4, 1.0, 1.2])
    assert SYNC.synchronous and not LEAD.synchronous
    assert torch.equal(SYNC.clocks(g).texture, g) and torch.equal(SYNC.clocks(g).semantic, g)
    assert SYNC.active_mask(g).texture.all() and SYNC.active_mask(g).semantic.all()
    assert SYNC.discontinuities() == () and SYNC.end == 1


def test_discontinuities_are_where_the_active_mask_changes() -> None:
    assert LEAD.discontinuities() == (0.3, 1.0)
    assert SemanticFirstSchedule(delta_t=1.0).discontinuities() == (1.0,)
    for kink in LEAD.discontinuities():
        before, after = (torch.stack(LEAD.active_mask(torch.tensor(kink + shift))) for shift in (-1e-3, 1e-3))
        assert not torch.equal(before, after)


def test_inverse_clock_inverts_the_clocks() -> None:
    semantic, texture = LEAD.inverse_clock(0.25)
    assert LEAD.clocks(torch.tensor(semantic)).semantic.item() == pytest.approx(0.25)
    assert LEAD.clocks(torch.tensor(texture)).texture.item() == pytest.approx(0.25)


def test_training_times_cover_the_whole_path() -> None:
    u = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(LEAD.time_from_uniform(u), torch.tensor([0, 0.65, 1.3]))
    torch.testing.assert_close(LEAD.progress(LEAD.time_from_uniform(u)), u)


def test_logit_normal_has_its_median_and_quartiles() -> None:
    assert logit_normal(torch.zeros(1)).item() == 0.5
    z = 0.6744898  # the upper quartile of the normal distribution
    assert logit_normal(torch.tensor(z)).item() == pytest.approx(1 / (1 + math.exp(-z)))


@pytest.mark.parametrize("name", [name for name in arrays("out_sample") if name.startswith("grid/")])
def test_golden_time_grids(name: str) -> None:
    which, points, shift = name.removeprefix("grid/").replace("_n", "_").replace("shift", "").split("_")
    schedule = GOLDEN if which == "semfirst" else SYNC
    check(schedule.grid(int(points) - 1, float(shift)), "out_sample", name, 1e-6)


def test_golden_training_clocks() -> None:
    clocks = GOLDEN.clocks(GOLDEN.time_from_uniform(arrays("inputs")["t"]))
    check(clocks.texture, "out_loss", "t_tex", 1e-6)
    check(clocks.semantic, "out_loss", "t_sem", 1e-6)


def test_golden_training_times_are_logit_normal() -> None:
    """The official code draws from numpy's global generator; the array was made with this seed."""
    normal = torch.from_numpy(np.random.RandomState(11).standard_normal(len(arrays("out_loss")["draw/t"])))
    check(logit_normal(normal).float(), "out_loss", "draw/t", 1e-6)


def test_shift_below_one_makes_the_first_steps_small() -> None:
    grid = LEAD.grid(10, 0.3)
    assert grid[0] == 0 and grid[-1].item() == pytest.approx(1.3) and (grid.diff() > 0).all()
    assert grid[1] < 0.5 * LEAD.grid(10)[1]
    torch.testing.assert_close(LEAD.grid(10, 1.0), LEAD.grid(10))


@pytest.mark.parametrize("delta_t", [-0.1, 1.5, float("nan")])
def test_impossible_leads_are_refused(delta_t: float) -> None:
    with pytest.raises(ValueError, match="delta_t: .*allowed"):
        SemanticFirstSchedule(delta_t=delta_t)
