"""`sfd check`: a checkpoint on its own data has the losses that training recorded; on other data it has not."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sfd_scale import config, export, train
from sfd_scale.__main__ import app
from sfd_scale.check import binned, check_checkpoint
from sfd_scale.diffusion.latents import LatentStats
from sfd_scale.recipe import TrainRecipe
from tests.helpers.encoded import encode_digits


def recipe_of(root: Path, data: dict[str, Any] | None = None, steps: int = 60) -> TrainRecipe:
    settings: dict[str, Any] = {
        "name": "probe", "run": str(root / "run"), "data": {"path": str(root / "data"), **(data or {})},
        "latents": {"texture_channels": 6, "semantic_channels": 3, "size": 8},
        "model": {"kind": "lightningdit", "depth": 1, "width": 32, "heads": 2, "num_classes": 10, "patch_size": 2},
        "objective": {"kind": "semantic_first", "alignment_weight": 0.0},
        "train": {"steps": steps, "global_batch": 16, "log_every": 20}, "optimizer": {"lr": 2e-3},
        "engine": {"kind": "fsdp", "precision": "fp32"}, "wandb": {"mode": "disabled"}, "attention": "math",
    }  # fmt: skip
    return config.from_dict(TrainRecipe, settings)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a short run on it, and statistics that are not those of the data."""
    out = tmp_path_factory.mktemp("probe")
    encode_digits(out / "data", 160, chunk=80)
    assert train.train(recipe_of(out), out / "run")
    stats = LatentStats.load(out / "data" / "stats.safetensors")
    LatentStats(stats.mean + stats.std, stats.std / 2).save(out / "other.safetensors")
    return out


def test_a_checkpoint_on_its_own_data_has_the_recorded_losses(root: Path) -> None:
    found = check_checkpoint(recipe_of(root), root / "run", 320)
    assert found.belongs is True and found.samples == 320 and found.recorded_stats_hash == found.stats_hash
    known = [own for own in found.bins if own.differs is not None]
    assert len(known) >= 6 and sum(own.count for own in found.bins) == 320
    total = sum(own.mean * own.count for own in found.bins if own.count) / 320
    recorded = sum((own.recorded or 0) * own.recorded_count for own in found.bins) / sum(
        own.recorded_count for own in found.bins
    )
    assert total == pytest.approx(recorded, rel=0.1)


def test_other_statistics_are_found_by_their_hash_and_by_the_losses(root: Path) -> None:
    found = check_checkpoint(recipe_of(root, {"stats": str(root / "other.safetensors")}), root / "run", 320)
    assert found.belongs is False and found.recorded_stats_hash != found.stats_hash
    assert sum(own.differs is True for own in found.bins) >= 3  # without a recorded hash too


def test_the_command_and_an_export(root: Path) -> None:
    config_file = root / "recipe.yaml"
    config_file.write_text(config.to_yaml(recipe_of(root)))
    exported = export.export(root / "run", root / "raw.safetensors", export.WeightsChoice(weights="params"))
    right = CliRunner().invoke(app, ["check", str(config_file), "--checkpoint", str(exported), "--samples", "320"])
    assert right.exit_code == 0 and "belongs to this data" in right.output
    wrong = CliRunner().invoke(
        app,
        ["check", str(config_file), f"data.stats={root / 'other.safetensors'}", "--checkpoint", str(root / "run")],
    )
    assert wrong.exit_code == 1 and "DOES NOT BELONG" in wrong.output and "differs" in wrong.output
    with pytest.raises(ValueError, match="--checkpoint: .*allowed: a run folder, a checkpoint of one"):
        check_checkpoint(recipe_of(root), root / "data")


def test_a_resume_on_other_statistics_is_refused_unless_allowed(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    stats = str(root / "other.safetensors")
    with pytest.raises(ValueError, match=r"other latent statistics .*; set data\.stats to the statistics that"):
        train.train(recipe_of(root, {"stats": stats}, steps=61), root / "run")
    allowed = recipe_of(root, {"stats": stats, "allow_stats_mismatch": True}, steps=61)
    with caplog.at_level(logging.WARNING):
        assert train.train(allowed, root / "run")
    assert any("statistics" in record.message for record in caplog.records)


def test_bins_are_means_with_errors() -> None:
    clock = torch.cat([torch.full((100,), 0.05), torch.full((4,), 0.55), torch.tensor([1.0])])
    losses = torch.cat([torch.linspace(1, 3, 100), torch.full((4,), 9.0), torch.tensor([5.0])])
    recorded: list[tuple[float | None, int]] = [(2.0, 400), *[(None, 0)] * 4, (1.0, 50), *[(None, 0)] * 4]
    bins = binned(clock, losses, recorded)
    assert (bins[0].mean, bins[0].count, bins[0].differs) == (pytest.approx(2.0), 100, False)
    assert bins[0].error == pytest.approx(losses[:100].std().item() / 10)
    assert bins[5].differs is None  # four samples are too few to say
    assert bins[9].mean == 5.0 and math.isnan(bins[1].mean)
    far = binned(clock, losses + 0.6, recorded)
    assert far[0].differs is True  # 0.6 beyond 10% of 2 and 4 errors of 0.058
    assert binned(clock, losses + 0.4, recorded)[0].differs is False
