"""W&B's own variables: they win over defaults and lose to a value of the recipe or the command line."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import wandb

from sfd_scale import config
from sfd_scale.recipe import TrainRecipe
from sfd_scale.runtime import environment
from sfd_scale.runtime.run_paths import RunPaths
from sfd_scale.training.metrics_writer import MetricsWriter, WandbConfig
from tests.sfd_scale.training.test_metrics import read_by_wandb

VARIABLES = ("MODE", "DISABLED", "PROJECT", "ENTITY", "NAME", "DIR", "RUN_ID", "SILENT", "CONSOLE", "INIT_TIMEOUT")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(f"WANDB_{name}", raising=False)


def settings(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], overrides: list[str]
) -> tuple[WandbConfig, str]:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = config.load("quickstart/sfd", TrainRecipe, overrides).wandb
    return found, found.describe()


@pytest.mark.parametrize(
    ("variables", "overrides", "found", "words"),
    [
        ({}, [], ("offline", "sfd-scale", None), "mode offline, project sfd-scale"),
        ({"WANDB_MODE": "disabled"}, [], ("disabled", "sfd-scale", None), "disabled (WANDB_MODE)"),
        ({"WANDB_MODE": "dryrun"}, [], ("offline", "sfd-scale", None), "mode offline (WANDB_MODE), project sfd-scale"),
        ({"WANDB_DISABLED": "true"}, [], ("disabled", "sfd-scale", None), "disabled (WANDB_DISABLED)"),
        (
            {"WANDB_DISABLED": "false", "WANDB_MODE": "", "WANDB_PROJECT": "mine", "WANDB_ENTITY": "me"},
            [],
            ("offline", "mine", "me"),
            "mode offline, project mine (WANDB_PROJECT), entity me (WANDB_ENTITY)",
        ),
        (
            {"WANDB_MODE": "disabled", "WANDB_PROJECT": "mine"},
            ["wandb.mode=offline", "wandb.project=exp"],
            ("offline", "exp", None),
            "mode offline (the recipe's, not WANDB_MODE), project exp (the recipe's, not WANDB_PROJECT)",
        ),
        (
            {"WANDB_MODE": "online"},
            ["wandb.mode=null"],
            ("online", "sfd-scale", None),
            "mode online (WANDB_MODE), project ",
        ),
    ],
)
def test_the_environment_wins_over_defaults_and_loses_to_the_recipe(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], overrides: list[str], found: tuple[Any, ...], words: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settled = config.load("quickstart/sfd", TrainRecipe, overrides).wandb
    assert (settled.mode, settled.project, settled.entity) == found
    assert settled.describe().startswith(words)


def test_the_recipe_of_a_run_folder_has_the_values_that_were_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    (tmp_path / "recipe.yaml").write_text(config.to_yaml(config.load("quickstart/sfd", TrainRecipe)))
    monkeypatch.setenv("WANDB_PROJECT", "another")
    assert config.load(tmp_path / "recipe.yaml", TrainRecipe).wandb == WandbConfig(mode="offline", project="mine")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("WANDB_MODE", "off", "WANDB_MODE: 'off'; allowed: online, offline, disabled"),
        ("WANDB_MODE", "shared", "WANDB_MODE: 'shared'; allowed: online, offline, disabled"),
        ("WANDB_DISABLED", "maybe", "WANDB_DISABLED: 'maybe'; allowed: 1 or 0"),
    ],
)
def test_another_value_is_one_sentence_before_anything_starts(name: str, value: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        environment.check({name: value})


def test_wandb_itself_takes_the_users_name_folder_and_project(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = {"PROJECT": "mine", "ENTITY": "me", "NAME": "third try", "DIR": str(tmp_path / "records"), "RUN_ID": "own"}
    for name, value in given.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    (tmp_path / "records").mkdir()
    wandb.teardown()  # W&B reads its variables once per process
    try:
        for run in ("a", "b"):
            (tmp_path / run).mkdir()
            recipe = WandbConfig() if run == "a" else WandbConfig(project="exp")
            writer = MetricsWriter(RunPaths(tmp_path / run), recipe, {})
            writer.write(1, {"loss": 0.5})
            writer.close()
    finally:
        monkeypatch.undo()
        wandb.teardown()
    records = [[r["run"] for r in read_by_wandb(file) if r["type"] == "run"][0] for file in tmp_path.rglob("*.wandb")]
    found = sorted((r["project"], r["entity"], r["display_name"], r["run_id"]) for r in records)
    assert found == [("exp", "me", "third try", "own"), ("mine", "me", "third try", "own")], json.dumps(records)
    assert not list(tmp_path.glob("?/wandb")) and len(list((tmp_path / "records").rglob("*.wandb"))) == 2


def test_a_setting_that_wandb_refuses_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "group/project")
    with pytest.raises(ValueError, match=r"wandb: Invalid project name 'group/project': cannot contain .*; allowed: "):
        MetricsWriter(RunPaths(tmp_path), WandbConfig(), {})
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "soon")
    wandb.teardown()
    try:
        with pytest.raises(ValueError, match=r"^wandb: 1 validation error .*init_timeout.*; allowed: "):
            MetricsWriter(RunPaths(tmp_path), WandbConfig(), {})
    finally:
        monkeypatch.undo()
        wandb.teardown()


def test_a_wandb_process_that_hangs_does_not_hold_the_end_of_a_run(tmp_path: Path) -> None:
    """W&B's own process is stopped. The run ends after the limit, and the exit of Python does not wait either."""
    code = """
import os, signal, sys, time
from pathlib import Path
import psutil
from sfd_scale.runtime.run_paths import RunPaths
from sfd_scale.training import metrics_writer
metrics_writer.SERVICE_WAIT_S = 0.5
run = RunPaths(Path(sys.argv[1]))
writer = metrics_writer.MetricsWriter(run, metrics_writer.WandbConfig(mode="offline", finish_timeout_s=1), {})
writer.write(1, {"loss": 1.0})
(service,) = [p for p in psutil.Process().children(recursive=True) if p.name().startswith(metrics_writer.SERVICE)]
service.send_signal(signal.SIGSTOP)
began = time.monotonic()
writer.close()
print(time.monotonic() - began)
"""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[3], capture_output=True, text=True,
        timeout=200, env={name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 1.4 < float(done.stdout) < 60
    assert "W&B is given up (its process wandb-core does not answer (after 2 s))" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 1.0
    assert time.monotonic() - began < 180


@pytest.mark.parametrize("ends", ["SIGKILL", "SIGSTOP"])
def test_a_wandb_process_that_dies_or_stops_does_not_end_or_hold_the_run(tmp_path: Path, ends: str) -> None:
    """As by the killer of the kernel. All rows are in metrics.jsonl, and the process ends well."""
    code = """
import signal, sys
from pathlib import Path
import psutil
from sfd_scale.runtime.run_paths import RunPaths
from sfd_scale.training import metrics_writer
metrics_writer.SERVICE_WAIT_S = metrics_writer.LOG_WAIT_S = 1.0
run = RunPaths(Path(sys.argv[1]))
writer = metrics_writer.MetricsWriter(run, metrics_writer.WandbConfig(mode="offline", finish_timeout_s=1), {})
writer.write(1, {"loss": 1.0})
(service,) = [p for p in psutil.Process().children(recursive=True) if p.name().startswith(metrics_writer.SERVICE)]
service.send_signal(getattr(signal, sys.argv[2]))
for step in range(2, 50):  # more than the socket holds
    writer.write(step, {"loss": 1.0, **{f"value {n}": 0.1 for n in range(2000)}})
writer.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), ends], cwd=Path(__file__).parents[3], capture_output=True,
        text=True, timeout=200, env={name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"},
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("W&B is given up (") == 1
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 50))


@pytest.mark.parametrize("content", [b"", b"a b/c:", bytes(range(256))])
def test_a_damaged_wandb_run_id_begins_a_new_wandb_run(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "wandb_run_id").write_bytes(content)
    writer = MetricsWriter(RunPaths(tmp_path), WandbConfig(mode="offline"), {})
    writer.write(1, {"loss": 0.5})
    writer.close()
    assert "is not the id of a W&B run; a new W&B run begins" in caplog.text
    assert (tmp_path / "wandb_run_id").read_text().strip() == writer.wandb_id
