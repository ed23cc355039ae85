"""A long run stays small: memory, descriptors, logs. Secrets stay where they are; torn lines are dropped."""

from __future__ import annotations

import json
import logging
import os
import resource
import statistics
from pathlib import Path

import pytest

from sfd_scale import train
from sfd_scale.config import ConfigError
from sfd_scale.runtime.run_paths import RunPaths
from sfd_scale.training.metrics_writer import MetricsWriter, WandbConfig
from sfd_scale.training.trainer import Trainer
from tests.helpers import small_run
from tests.helpers.ranks import run_alone

SECRETS = {
    "WANDB_API_KEY": "5ec4e7" * 6 + "abcd", "AWS_SECRET_ACCESS_KEY": "planted-aws-secret-1234567890",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTED123456789", "HF_TOKEN": "hf_planted0123456789",
    "GOOGLE_APPLICATION_CREDENTIALS": "/planted/google.json",
}  # fmt: skip


def test_metrics_are_valid_after_a_kill_at_any_byte(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "loss": 1.0 / step, "näme": None}, ensure_ascii=False) for step in (1, 2, 3)]
    data = "".join(f"{line}\n" for line in lines).encode()
    path = tmp_path / "metrics.jsonl"
    # A line is whole without its line break too.
    ends = [len("\n".join(lines[:count]).encode()) for count in (1, 2)]
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        resumed = MetricsWriter(RunPaths(tmp_path), WandbConfig(mode="disabled"), {})
        resumed.truncate(2)
        resumed.write(3, {"loss": 0.5})
        resumed.close()
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert [row["step"] for row in rows] == [*(step for step in (1, 2) if cut >= ends[step - 1]), 3], cut


# --------------------------------------------------------------------------------------------- long runs


def _shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


def long_run(root: str, steps: int) -> dict[str, list[int]]:
    """Memory in KiB and open descriptors, as the steps go by."""
    logging.disable(logging.INFO)
    seen: dict[str, list[int]] = {"memory": [], "descriptors": []}
    inner = Trainer.train_step

    def watched(self: Trainer, step: int, batches: object) -> object:
        if step % 20 == 0:
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024
            seen["memory"].append(resident)
            seen["descriptors"].append(len(os.listdir("/proc/self/fd")))
        return inner(self, step, batches)  # type: ignore[arg-type]

    Trainer.train_step = watched  # type: ignore[method-assign,assignment]
    settings = small_run.recipe(Path(root, "data"), steps=steps, every=steps // 4)
    train.train(settings, Path(root, "run"))
    return seen


def check_long_run(root: Path, steps: int, per_step: float) -> None:
    small_run.encode(root / "data")
    before = _shared_memory()
    seen = run_alone(long_run, str(root), steps, timeout=1800)
    later = seen["memory"][len(seen["memory"]) // 2 :]
    slope = statistics.linear_regression(range(0, 20 * len(later), 20), later).slope
    assert slope < per_step, f"{slope:.2f} KiB a step: {seen['memory']}"
    assert max(seen["descriptors"][2:]) - seen["descriptors"][2] <= 4, seen["descriptors"]
    assert not {name for name in _shared_memory() - before if "sfd" in name or "deepspeed" in name}
    files = {path.name: path.stat().st_size for path in (root / "run").glob("*") if path.is_file()}
    assert files.pop("metrics.jsonl") < 2000 * steps
    assert sum(files.values()) < 64_000, files
    assert sum(path.stat().st_size for path in (root / "run/logs").glob("*")) < 64_000


@pytest.mark.full
def test_two_thousand_steps_leak_nothing(tmp_path: Path) -> None:
    check_long_run(tmp_path, 2000, per_step=2.0)


# ---------------------------------------------------------------------------------------------- secrets


def secretive(root: str, data: str) -> str:
    """A run with W&B offline, and errors, with secrets in the environment; returns the errors."""
    os.environ |= SECRETS
    train.train(small_run.recipe(Path(data), steps=2, wandb={"mode": "offline"}), Path(root, "run"))
    errors = []
    for changed in ({"seed": 5}, {"data": {"path": "/nowhere"}}, {"train": {"steps": 2, "global_batch": 7}}):
        try:
            train.train(small_run.recipe(Path(data), **changed), Path(root, "run"))
        except ValueError as error:
            errors.append(repr(error))
    try:
        small_run.recipe(Path(data), unknown={"key": 1})
    except ConfigError as error:
        errors.append(repr(error))
    return "\n".join(errors)


def test_secrets_are_nowhere_in_a_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    small_run.encode(tmp_path / "data")
    errors = run_alone(secretive, str(tmp_path), str(tmp_path / "data"), timeout=300)
    assert errors.count("\n") == 3
    captured = capfd.readouterr()
    places = {"errors": errors.encode(), "output": (captured.out + captured.err).encode()}
    places |= {str(f.relative_to(tmp_path)): f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    assert any("wandb" in place for place in places)
    for place, content in places.items():
        found = [name for name, secret in SECRETS.items() if secret.encode() in content]
        assert not found, f"{found} in {place}"
