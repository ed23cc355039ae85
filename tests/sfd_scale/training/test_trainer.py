"""A whole run beside a plain loop; portions of the global batch, stop requests, metrics that survive a kill."""

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from sfd_scale import build, train
from sfd_scale.data.batches import LatentBatch
from sfd_scale.data.dataloader import LatentLoader
from sfd_scale.runtime.batch_split import BatchSplit, split_batch
from sfd_scale.runtime.run_paths import RunPaths
from sfd_scale.runtime.signals import StopRequest
from sfd_scale.tasks import diffusion
from sfd_scale.training.metrics_writer import MetricsWriter, WandbConfig
from sfd_scale.training.trainer import TrainerConfig
from tests.helpers import small_run


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((256, None, 8), BatchSplit(32, 1, 8)),
        ((256, 16, 8), BatchSplit(16, 2, 8)),
        ((256, 64, 8), BatchSplit(32, 1, 8)),
        ((256, 32, 1), BatchSplit(32, 8, 1)),
    ],
)
def test_the_global_batch_is_divided_exactly(arguments: tuple[int, int | None, int], expected: BatchSplit) -> None:
    assert split_batch(*arguments) == expected
    assert expected.micro_batch * expected.grad_accum_steps * expected.world_size == arguments[0]


def test_what_does_not_divide_is_refused_with_what_does() -> None:
    with pytest.raises(
        ValueError, match=r"24 does not divide over 5 ranks; allowed: \[1, 2, 3, 4, 6, 8, 12, 24\] ranks"
    ):
        split_batch(24, None, 5)
    with pytest.raises(ValueError, match=r"micro_batch: 5 does not divide the 12 samples of a rank; allowed here"):
        split_batch(24, 5, 2)


@pytest.mark.parametrize("name", ["steps", "global_batch", "log_every", "micro_batch", "replica_check_every"])
def test_counts_start_at_one(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: 0; allowed: 1 and up"):
        TrainerConfig(**{"steps": 1, "global_batch": 1, name: 0})


def test_a_signal_is_remembered_until_the_step_boundary() -> None:
    with pytest.raises(KeyError), StopRequest() as stop:
        assert not stop.requested()
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)  # pdsh sends twice within a tenth of a second: not a second request
        assert stop.requested()
        raise KeyError
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "after an error too"
    with StopRequest(max_duration_s=0.0) as late:
        assert late.requested()


def test_metrics_after_the_checkpoint_are_written_anew(tmp_path: Path) -> None:
    writer = MetricsWriter(RunPaths(tmp_path), WandbConfig(mode="disabled"), {})
    for step in (1, 2, 3):
        writer.write(step, {"loss": 1.0 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line
    writer.truncate(2)
    writer.write(3, {"loss": 0.5})
    writer.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 0.5), (3, 0.5)]


class OneBadStep(LatentLoader):
    """The first sample of the second step is not a number."""

    def batch(self, keys: list[Any]) -> LatentBatch:
        batch = super().batch(keys)
        batch.latents[batch.keys[:, 1] == self.order.batch(1)[1][0]] = math.nan
        return batch


def test_a_run_is_the_plain_loop_of_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rate of each step, accumulation, clipping, AdamW and EMA, by PyTorch alone: after every step the same weights.

    A step that is skipped changes neither weights nor EMA.
    """
    monkeypatch.setattr(diffusion, "LatentLoader", OneBadStep)
    rates, decay, clip = [0.005, 0.01, 0.01, 0.005, 0.0], 0.5, 0.05
    recipe = small_run.recipe(
        small_run.encode(tmp_path / "data"), optimizer={"lr": 0.01, "betas": [0.9, 0.95]},
        lr={"kind": "linear", "warmup_steps": 2}, ema={"decay": decay}, engine={**small_run.FSDP, "grad_clip": clip},
        train={"steps": len(rates), "global_batch": small_run.BATCH, "micro_batch": 2, "log_every": 1},
        checkpoint={"every": 1, "keep_last": None},
    )  # fmt: skip
    assert train.train(recipe, tmp_path / "run")
    loader = recipe.task.make_loader(split_batch(small_run.BATCH, None, 1))
    objective, batches = recipe.task.make_objective(loader, torch.device("cpu")), loader.batches(0)
    weights = dict((model := build.make_model(recipe)).named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    average = {name: value.detach().clone() for name, value in weights.items()}
    rows = small_run.lines(tmp_path / "run" / "metrics.jsonl")
    for step, (row, rate) in enumerate(zip(rows, rates, strict=True)):
        expected = {"lr": rate, "samples": (step + 1) * small_run.BATCH, "skipped_steps": int(step >= 1)}
        loss = objective(model, next(batches)).total
        assert bool(loss.isfinite()) == (step != 1)
        if step != 1:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            average = {name: decay * old + (1 - decay) * weights[name].detach() for name, old in average.items()}
            expected |= {"loss": loss.item(), "grad_norm": norm.item()}
            assert norm > clip
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-4)
        found = small_run.weights(tmp_path / "run", step + 1)
        for name, value in weights.items():
            torch.testing.assert_close(found[f"params.{name}"], value.detach(), rtol=1e-4, atol=2e-5)
            torch.testing.assert_close(found[f"ema.{name}"], average[name], rtol=1e-4, atol=2e-5)
