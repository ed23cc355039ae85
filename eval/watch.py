"""Evaluate the checkpoints of a run as they appear, and keep their scores in one table."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

from eval import generate
from eval.features.extractor import make_extractor
from eval.recipe import EvalRecipe
from eval.results import FILE, TABLE, Results, ScoreRow
from eval.score import score
from sfd_scale import checkpoint, config, export
from sfd_scale.recipe import TrainRecipe
from sfd_scale.runtime import distributed
from sfd_scale.runtime.files import write_atomically, write_json
from sfd_scale.runtime.locks import in_use
from sfd_scale.training.metrics_writer import log_scores

logger = logging.getLogger(__name__)
RECIPE, SOURCE = "recipe.json", "checkpoint"


def watch(recipe: EvalRecipe, run: Path, out: Path, *, interval: float = 60.0, once: bool = False) -> None:
    """Evaluate every checkpoint of `run` that has no results yet, oldest first, until the run's last step.

    Each step has a folder in `out`, such as step-00001000, with its results.json; `out`/results.jsonl has all of them.
    A step that a run has trained again, after going back, is evaluated again.
    In the run folder's evaluations/ the scores go to the W&B run of the training too: by the training itself while it
    runs, else from here.

    Raises:
        ValueError: if `run` is no run folder, or `out` has results of other settings.
    """
    if not (run / "recipe.yaml").is_file():
        raise ValueError(f"--run: {run} is no run folder (no recipe.yaml in it)")
    training = config.load(run / "recipe.yaml", TrainRecipe)
    _check_same(recipe, out)
    while True:
        saved = distributed.broadcast_object(saved_steps(run) if distributed.is_main() else None)
        todo = distributed.broadcast_object([step for step in saved if _scored(out, step) != saved[step]])
        if todo:
            # One, then look again: the run may have removed the others meanwhile.
            _evaluate(recipe, run, out, todo[0], saved[todo[0]])
            if distributed.is_main():
                write_atomically(out / TABLE, table(out))
        if distributed.is_main() and not in_use(run):
            log_scores(run, training.wandb)
        if todo:
            continue
        if once or (saved and max(saved) >= training.train.steps):
            return
        time.sleep(interval)


def saved_steps(run: Path) -> dict[int, str]:
    """Steps of the committed checkpoints, ascending, with the identity of each."""
    found: dict[int, str] = {}
    for folder in checkpoint.committed(run / "checkpoints"):
        try:
            found[int(checkpoint.read_state(folder)["step"])] = checkpoint.checkpoint_hash(folder)
        except (ValueError, OSError):
            if (folder / "COMMIT").is_file():
                raise
    return found  # without those that a training has pruned meanwhile


def _scored(out: Path, step: int) -> str | None:
    """The identity of the checkpoint whose scores a step has."""
    folder = out / f"step-{step:08d}"
    if not (folder / FILE).is_file() or not (folder / SOURCE).is_file():
        return None
    return (folder / SOURCE).read_text(encoding="utf-8")


def _check_same(recipe: EvalRecipe, out: Path) -> None:
    """One table holds scores of one recipe: whatever changes a score, other than the checkpoint, is that of before.

    Raises:
        ValueError: naming the settings that differ.
    """
    file = out / RECIPE
    now: dict[str, Any] = config.settings_affecting_results(recipe)
    del now["checkpoint"]
    if not distributed.broadcast_object(file.is_file()):
        if distributed.is_main():
            write_json(file, now)
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    if different := config.differences(before, now):
        names = ", ".join(different)
        raise ValueError(f"{out}: its scores are of another recipe ({names} differ); choose another --out")


def _evaluate(recipe: EvalRecipe, run: Path, out: Path, step: int, identity: str) -> None:
    folder = out / f"step-{step:08d}"
    weights, source = folder / "model.safetensors", folder / SOURCE
    gone = None
    if distributed.is_main() and not (source.is_file() and source.read_text(encoding="utf-8") == identity):
        if folder.exists():
            logger.warning("%s: of a checkpoint that the run went back from, or cut off; made anew", folder)
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        write_atomically(source, identity)
    if distributed.is_main() and not weights.is_file():
        try:
            export.export(run, weights, step=step)
        except (ValueError, OSError) as error:
            if step in saved_steps(run):
                raise
            gone = str(error)  # the training has pruned it meanwhile
    gone = distributed.broadcast_object(gone)
    if gone is not None:
        logger.warning("step %d is left out, as its checkpoint was removed while it was read: %s", step, gone)
        return
    device = distributed.device()
    own = dataclasses.replace(recipe, checkpoint=weights)
    own = generate.with_kept_batch(own, folder, *sorted(out.glob("step-*")))
    extractor = make_extractor(own.extractor, device)
    generate.generate(own, folder, generate.prepare(own, device, extractor))
    results = score(own, folder, folder / FILE, extractor)
    if distributed.is_main():
        weights.unlink()  # the run has it: a series of checkpoints would fill the disk
        logger.info("%s, step %d: FID %.4g", run, step, results.scores.fid)


def table(out: Path) -> str:
    """All results below `out` as lines of JSON, by step."""
    rows = [ScoreRow.of(Results.read(file)) for file in sorted(out.glob(f"step-*/{FILE}"))]
    return "".join(f"{json.dumps(row.as_json())}\n" for row in rows)
