"""A run that is too short for a setting says so: a warm-up that does not end, steps to profile that never come."""

import logging
from pathlib import Path

import pytest

from sfd_scale import config, train
from sfd_scale.planning.unused_settings import unused_settings
from sfd_scale.recipe import TrainRecipe
from tests.helpers import small_run

NAMES = [name for name in config.recipe_names() if config.kind_of(name) == "train"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, []),
        ({"lr": {"warmup_steps": 12}}, []),  # the last step has the peak
        (
            {"lr": {"warmup_steps": 13}},
            ["lr.warmup_steps: 13, but train.steps is 12; the learning rate does not reach"],
        ),
        ({"lr": {"kind": "cosine", "warmup_steps": 12}}, ["lr.kind: cosine, but train.steps is 12, and all of them"]),
        ({"lr": {"kind": "wsd", "warmup_steps": 2, "decay_steps": 9}}, []),
        (
            {"lr": {"kind": "wsd", "warmup_steps": 2, "decay_steps": 10}},
            ["lr.decay_steps: 10 after 2 steps of warm-up"],
        ),
        ({"profile": {"steps": "11..20"}}, []),
        ({"profile": {"steps": "12..20"}}, ["profile.steps: 12..20, but train.steps is 12; no step is profiled"]),
        (
            {"ema": {"lengths": [0.1], "snapshot_every": 13}},
            ["ema.snapshot_every: 13, but train.steps is 12; it never"],
        ),
        ({"checkpoint": {"keep_every": 20}}, ["checkpoint.keep_every: 20, but train.steps is 12; it never comes"]),
    ],
)
def test_a_setting_that_needs_more_steps_is_named(changed: dict[str, object], words: list[str]) -> None:
    found = unused_settings(small_run.recipe(Path("data"), **changed))
    assert len(found) == len(words)
    assert all(text.startswith(start) for text, start in zip(found, words, strict=True)), found


@pytest.mark.parametrize("name", NAMES)
def test_no_recipe_has_such_a_setting(name: str) -> None:
    assert unused_settings(config.load(name, TrainRecipe)) == []


def test_a_run_beyond_its_last_step_says_that_there_is_nothing_to_train(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, run = small_run.encode(tmp_path / "data"), tmp_path / "run"
    assert train.train(small_run.recipe(data, steps=4), run)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert train.train(small_run.recipe(data, steps=3, lr={"warmup_steps": 0}), run)
    assert "train.steps: 3, but the run is at step 4; there is nothing to train" in caplog.text
