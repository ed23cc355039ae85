"""`sfd sample --over-time`: the states of the solver, and their picture."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import sfd_scale
from sfd_scale.__main__ import app
from sfd_scale.commands.over_time import semantic_colours, similarities, states
from sfd_scale.diffusion.fixed_step import FixedStepConfig
from sfd_scale.diffusion.guidance import NoGuidance
from sfd_scale.diffusion.latents import LatentLayout
from sfd_scale.diffusion.sampler import noise_of
from tests.sfd_scale.test_hub import run as run  # a fixture: the run folder of a small diffusion model
from tests.sfd_scale.test_sample import folder as folder  # a fixture: its export


def test_the_states_go_from_the_noise_to_the_image_and_semantics_lead(folder: Path) -> None:
    pipe = sfd_scale.load(folder)
    layout, schedule = pipe.loaded.layout, pipe.loaded.schedule
    sampler = pipe.sampler(NoGuidance(), FixedStepConfig(kind="euler", num_steps=6), 0, 2)
    # The velocity of the initial weights is zero; this one moves every value.
    sampler, labels = dataclasses.replace(sampler, velocity=lambda x, _clocks, _labels: 1 - x), torch.tensor([3, 7])
    found = states(sampler, labels)
    assert len(found) == 7 and torch.equal(found[0].x, noise_of(0, [0, 1], layout))
    images = pipe.loaded.decode(sampler.stats.denormalize(found[-1].x))
    assert torch.equal(images, sampler.images([0, 1], labels).images)
    for state in found[:-1]:
        g = state.semantic if state.semantic < 1 else state.texture + schedule.delta_t
        assert state.texture == pytest.approx(max(g - schedule.delta_t, 0), abs=1e-6)
    # Texture stands still until its clock starts.
    assert torch.equal(layout.split(found[1].x)[0], layout.split(found[0].x)[0])
    assert not torch.equal(layout.split(found[1].x)[1], layout.split(found[0].x)[1])
    semantic, texture = similarities(found, layout)
    assert [row[-1] for row in (*semantic, *texture)] == pytest.approx([1.0] * 4)
    assert all(row[0] < 0.999 for row in semantic)


def test_one_projection_gives_all_colours() -> None:
    layout = LatentLayout(texture_channels=2, semantic_channels=4, size=3)
    x = torch.randn(5, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    last, again = semantic_colours([x, x], layout)
    assert torch.equal(last, again) and last.shape == (5, 3, 3, 3) and last.dtype == torch.uint8
    # The middle of the range is the mean, and a change of texture changes no colour.
    assert last.float().mean((0, 2, 3)).tolist() == pytest.approx([127.5] * 3, abs=8)
    changed = x.clone()
    changed[:, :2] += 1
    assert torch.equal(semantic_colours([changed, x], layout)[0], last)


def test_the_command_writes_two_rows_per_image(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "over.png"
    words = ["sample", str(folder), "--over-time", "--count", "2", "--grid", "3", "--steps", "4", "--out", str(out)]
    done = CliRunner().invoke(app, [*words, "--guidance", "1.5,2"])
    assert done.exit_code == 0, done.output
    with Image.open(out) as picture:
        assert picture.width == 128 + 3 * 134 and picture.height > 4 * 134
    refused = CliRunner().invoke(app, [*words, "--solver", "heun2"])
    assert "allowed with --over-time: euler" in str(refused.exception)
    assert "two as in 1.5,2.5" in str(CliRunner().invoke(app, [*words, "--guidance", "much"]).exception)
