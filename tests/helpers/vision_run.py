"""A short run of quickstart/vision on the CPU, for tests of launchers: its images, its settings and its loss curve."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "quickstart/vision"
SETTINGS = [
    "train.steps=8",
    "train.global_batch=24",
    "train.log_every=1",
    "checkpoint.every=4",
    "engine.precision=fp32",
]
QUIET = ["wandb.mode=disabled", "train.timeout_s=60"]


def environment(**more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **more}


def encode_images(out: Path) -> Path:
    command = [sys.executable, "-m", "sfd_scale", "encode", "quickstart/images", "source.num_images=96", f"out={out}"]
    subprocess.run(command, cwd=ROOT, env=environment(), check=True, timeout=600)
    return out


def losses(run: Path) -> dict[int, float]:
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {row["step"]: row["loss"] for row in rows}


def alone(images: Path, run: Path, *more: str) -> dict[int, float]:
    """The same training in one process, without a launcher."""
    command = [sys.executable, "-m", "sfd_scale", "train", RECIPE, *SETTINGS, *QUIET, f"data.path={images}", *more]
    subprocess.run([*command, "--run", str(run)], cwd=ROOT, env=environment(), check=True, timeout=600)
    return losses(run)
