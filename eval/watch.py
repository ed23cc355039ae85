"""`eval watch`: evaluate the checkpoints of a run as they appear, and collect their scores in one table."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval import generate
from eval.features.make import make_extractor
from eval.recipe import EvalRecipe
from eval.reference import load_judges
from eval.results import Results, ScoreRow, read_table
from eval.score import score
from sfd_scale import config, export
from sfd_scale.data.manifest import Manifest
from sfd_scale.diffusion.guidance import NoGuidance
from sfd_scale.export import WeightsChoice
from sfd_scale.recipe import TrainRecipe
from sfd_scale.runs import RunFolder
from sfd_scale.runtime import distributed
from sfd_scale.runtime.files import read_json, write_atomically, write_json
from sfd_scale.runtime.leftovers import make_way, remove
from sfd_scale.runtime.limits import WATCH, limit_s
from sfd_scale.runtime.run_paths import RESULTS, EvaluationPaths
from sfd_scale.training.metrics_writer import log_scores

logger = logging.getLogger(__name__)
RECIPE, SOURCE, EPOCHS = "recipe.json", "checkpoint", "epochs_to_fid.json"


def watch(
    recipe: EvalRecipe,
    folder: Path,
    out: Path | None = None,
    *,
    interval: float = 60.0,
    once: bool = False,
    fid_targets: Sequence[float] = (),
) -> None:
    """Evaluate every checkpoint of a run folder that has no results yet, oldest first, until the run's last step.

    `out` is evaluations/ in the run folder by default. In it, each step has a folder such as step-00001000 with its
    results.json; results.jsonl has all of them. A step that was trained again after a rollback is evaluated again.
    Scores in the default folder also go to the W&B run of the training: the training sends them while it runs,
    otherwise this command does.

    Args:
        fid_targets: values k of EP_FID@k, the epochs until the unguided FID is k or less. They are logged after each
            evaluation and written to epochs_to_fid.json.

    Raises:
        ValueError: if `folder` is not a run folder, or `out` has results of other settings; for `fid_targets` with
            guidance.
        TimeoutError: if the run saves no checkpoint for SFD_WATCH_TIMEOUT.
    """
    run = RunFolder(folder)
    training, scores = run.recipe, run.evaluations if out is None else EvaluationPaths(out)
    if fid_targets and not isinstance(recipe.guidance, NoGuidance):
        raise ValueError(f"--ep-fid: of unguided samples, but guidance.kind is {recipe.guidance.kind}; allowed: none")
    _check_recipe(recipe, scores)
    limit, idle_since = limit_s(WATCH), time.monotonic()
    while True:
        saved = distributed.broadcast_object(saved_steps(run) if distributed.is_main() else None)
        todo = distributed.broadcast_object([step for step in saved if _scored(scores, step) != saved[step]])
        if todo:
            # One at a time: the run may delete the others meanwhile.
            _evaluate(recipe, run, scores, todo[0], saved[todo[0]])
            if distributed.is_main():
                write_atomically(scores.table, table(scores))
        if distributed.is_main() and fid_targets:
            _report_epochs(training, scores, fid_targets)
        if distributed.is_main() and not run.in_use:
            log_scores(run, training.wandb)
        if todo:
            idle_since = time.monotonic()
            continue
        if once or (saved and max(saved) >= training.train.steps):
            return
        if distributed.any_rank(time.monotonic() - idle_since > limit)[0]:
            state = "a process trains in it" if run.in_use else "no process trains in it; start the training again"
            raise TimeoutError(f"{folder}: no new checkpoint for {limit} s, and {state}, or raise {WATCH}")
        time.sleep(interval)


def saved_steps(run: RunFolder) -> dict[int, str]:
    """The steps of the whole checkpoints, ascending, with the hash of each."""
    found: dict[int, str] = {}
    for checkpoint in run.checkpoints:
        try:
            found[int(checkpoint.state["step"])] = checkpoint.hash
        except (ValueError, OSError):
            if checkpoint.is_whole:
                raise  # otherwise the training has deleted it since
    return found


def _scored(out: EvaluationPaths, step: int) -> str | None:
    """The hash of the checkpoint that the scores of a step belong to."""
    folder = out.step(step)
    if not (folder / RESULTS).is_file() or not (folder / SOURCE).is_file():
        return None
    return (folder / SOURCE).read_text(encoding="utf-8")


def _check_recipe(recipe: EvalRecipe, out: EvaluationPaths) -> None:
    """A table holds the scores of one recipe. Only the checkpoint and settings without effect on scores may change.

    Raises:
        ValueError: naming the settings that differ.
    """
    file = out.path / RECIPE
    now: dict[str, Any] = config.settings_affecting_results(recipe)
    del now["checkpoint"]
    if not distributed.broadcast_object(file.is_file()):
        if distributed.is_main():
            write_json(file, now)
        return
    # An earlier release did not know all settings: what it left out has its default.
    before, now = (config.with_defaults(EvalRecipe, settings) for settings in (read_json(file), now))
    if different := config.differences(before, now):
        names = ", ".join(different)
        raise ValueError(f"{out.path}: its scores are of another recipe ({names} differ); allowed: another --out")


def _evaluate(recipe: EvalRecipe, run: RunFolder, out: EvaluationPaths, step: int, checkpoint_hash: str) -> None:
    """Export, generate and score one step. It is left out if the training deletes the checkpoint meanwhile."""
    folder = out.step(step)
    weights, source = folder / "model.safetensors", folder / SOURCE
    gone = None
    if distributed.is_main() and not (source.is_file() and source.read_text(encoding="utf-8") == checkpoint_hash):
        if folder.exists():
            logger.warning("%s: belongs to another checkpoint of this step, or is incomplete; evaluated again", folder)
            make_way(folder)
        folder.mkdir(parents=True)
        write_atomically(source, checkpoint_hash)
    if distributed.is_main() and not weights.is_file():
        try:
            export.export(run.path, weights, WeightsChoice(step=step))
        except (ValueError, OSError) as error:
            if step in saved_steps(run):
                raise
            gone = str(error)  # the training has deleted the checkpoint meanwhile
    gone = distributed.broadcast_object(gone)
    if gone is not None:
        logger.warning("step %d is left out, because its checkpoint was deleted while it was read: %s", step, gone)
        return
    device = distributed.device()
    own = dataclasses.replace(recipe, checkpoint=weights)
    own = generate.with_recorded_batch(own, folder, *out.step_folders())
    extractor = make_extractor(own.extractor, device)
    judges = load_judges(own, device)
    further = {name: judge.extractor for name, judge in judges.items()}
    generate.generate(own, folder, generate.prepare(own, device, extractor, further=further))
    results = score(own, folder, folder / RESULTS, extractor, judges=judges)
    if distributed.is_main():
        remove(weights)  # the run has the checkpoint, and the exports of all steps would fill the disk
        logger.info("%s, step %d: FID %.4g", run.path, step, results.scores.fid)


@dataclass(frozen=True)
class EpochsToFID:
    """EP_FID@k (arXiv 2605.18324): the epochs of the first evaluated checkpoint whose unguided FID is k or less.

    target: k. epochs, step, fid: of that checkpoint; None if no checkpoint reached k yet.
    after: the epochs of the checkpoint before it. The true number lies between the two.
    """

    target: float
    epochs: float | None
    step: int | None
    fid: float | None
    after: float


def epochs_to_fid(rows: Sequence[ScoreRow], target: float, steps_per_epoch: float) -> EpochsToFID:
    """EP_FID@`target` of the scored checkpoints of a run (arXiv 2605.18324)."""
    after = 0.0
    for row in sorted(rows, key=lambda row: row.step):
        if row.scores.fid is not None and row.scores.fid <= target:
            return EpochsToFID(target, row.step / steps_per_epoch, row.step, row.scores.fid, after)
        after = row.step / steps_per_epoch
    return EpochsToFID(target, None, None, None, after)


def _report_epochs(training: TrainRecipe, out: EvaluationPaths, targets: Sequence[float]) -> None:
    images = Manifest.read(training.data.path).num_samples
    rows = read_table(out.table)
    found = [epochs_to_fid(rows, target, images / training.train.global_batch) for target in targets]
    write_json(out.path / EPOCHS, [dataclasses.asdict(value) for value in found])
    for value in found:
        if value.epochs is None:
            logger.info("EP_FID@%g: not reached after %.4g epochs", value.target, value.after)
        else:
            logger.info(
                "EP_FID@%g: %.4g epochs (step %d, FID %.4g); the checkpoint before has %.4g epochs",
                value.target, value.epochs, value.step, value.fid, value.after,
            )  # fmt: skip


def table(out: EvaluationPaths) -> str:
    """One line of JSON for each results.json below `out`, in the order of the steps."""
    rows = [ScoreRow.of(Results.read(file)) for file in out.results_files()]
    return "".join(f"{json.dumps(row.as_json())}\n" for row in rows)


if __name__ == "__main__":
    from eval.__main__ import main

    main("watch")
