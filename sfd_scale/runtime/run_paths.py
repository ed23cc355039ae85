"""Names of the files and folders of a training run. This module alone spells them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

RECIPE, LOGS = "recipe.yaml", "logs"
RESULTS, RESULTS_TABLE = "results.json", "results.jsonl"
_STEP = re.compile(r"step-(\d{8,})")


def step_name(step: int) -> str:
    """The name of the folder of one step: of its checkpoint, snapshot or evaluation."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """The inverse of `step_name`; None for any other name, such as that of an unfinished save."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class EvaluationPaths:
    """The folder in which `python -m eval watch` keeps the scores of a run: one folder per step, and one table."""

    path: Path

    @property
    def table(self) -> Path:
        """One JSON object per evaluated step."""
        return self.path / RESULTS_TABLE

    def step(self, step: int) -> Path:
        return self.path / step_name(step)

    def step_folders(self) -> list[Path]:
        return sorted(self.path.glob("step-*"))

    def results_files(self) -> list[Path]:
        """The results.json of every evaluated step, in the order of the steps."""
        return sorted(self.path.glob(f"step-*/{RESULTS}"))


@dataclass(frozen=True)
class RunPaths:
    """The paths in a run folder. `sfd_scale.runs.RunFolder` adds what the files contain."""

    path: Path

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe."""
        return self.path / RECIPE

    @property
    def environment_file(self) -> Path:
        """Versions and machine of the last start."""
        return self.path / "environment.json"

    @property
    def data_file(self) -> Path:
        """What sampling needs of the training data: latent statistics and fingerprints of the tokenizers."""
        return self.path / "data.json"

    @property
    def texture_file(self) -> Path:
        """A copy of the texture codec, if it is small."""
        return self.path / "texture.safetensors"

    @property
    def metrics_file(self) -> Path:
        """One JSON object per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def divergence_file(self) -> Path:
        """One JSON object per step that was not finite or a loss spike."""
        return self.path / "divergence.jsonl"

    @property
    def checkpoints_folder(self) -> Path:
        return self.path / "checkpoints"

    @property
    def snapshots_folder(self) -> Path:
        """Power-function averages, for post-hoc EMA."""
        return self.path / "snapshots"

    @property
    def evaluations(self) -> EvaluationPaths:
        return EvaluationPaths(self.path / "evaluations")

    @property
    def logs_folder(self) -> Path:
        """Logs of the launcher and of each rank, and stack dumps of a hang."""
        return self.path / LOGS

    @property
    def profile_folder(self) -> Path:
        return self.path / "profile"

    @property
    def tensorboard_folder(self) -> Path:
        return self.path / "tensorboard"

    @property
    def wandb_id_file(self) -> Path:
        """The id of the W&B run, which a resumed run continues."""
        return self.path / "wandb_run_id"

    @property
    def wandb_scores_file(self) -> Path:
        """The ids of the results that W&B has already."""
        return self.path / "wandb_scores.json"
