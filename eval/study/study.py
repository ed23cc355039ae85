"""`sfd study`: a grid of small trainings, each scored at a few steps, from one recipe.

A study runs the normal commands. It prepares data and tokenizers (encode, fit, train, export). It trains each cell in
its own run folder and evaluates the checkpoints there. It sweeps guidance on trained cells.

A step needs the steps whose outputs are named in its recipe. A completed step leaves a stamp. A start does the steps
without one, and several starts share the work.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.images.outputs import GRID
from eval.recipe import KINDS, EvalRecipe
from eval.results import read_table
from eval.search.sweep import sweep
from eval.study import lead, semantics
from eval.study import report as study_report
from eval.study.recipe import LeadConfig, StudyRecipe, SweepConfig
from eval.watch import watch
from sfd_scale import config, encode, export, train
from sfd_scale.data.manifest import MANIFEST
from sfd_scale.recipe import EncodeRecipe, FitRecipe, TrainRecipe
from sfd_scale.runtime.chunks import Claims
from sfd_scale.runtime.files import file_sha256, read_json, write_atomically
from sfd_scale.runtime.limits import STEP
from sfd_scale.runtime.run_paths import RESULTS_TABLE, RunPaths

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """One piece of work.

    settings: they determine the outputs, together with the steps in `needs`.
    outputs: the file or folder that other steps need, then all others.
    work: does the step; returns False after a request to stop.
    """

    key: str
    settings: Any
    needs: frozenset[str]
    outputs: tuple[Path, ...]
    work: Callable[[], bool]


class Study:
    """The steps of a recipe in the order of work: all cells of the first seed, then of the next."""

    def __init__(self, recipe: StudyRecipe) -> None:
        self.recipe = recipe
        self.evaluation = self._load(recipe.evaluation, EvalRecipe)
        self._cells = {name: self._load(self._cell_command(name), TrainRecipe) for name in recipe.cells}
        self.steps: dict[str, Step] = {}
        prepared = {f"prepare/{name}": self._load(words) for name, words in recipe.prepare.items()}
        for key, loaded in prepared.items():
            if not isinstance(loaded, EncodeRecipe | FitRecipe | TrainRecipe):
                raise ValueError(f"{key.replace('/', '.')}: kind {loaded.kind}; allowed: encode, fit, train")
        self._makers = {str(_outputs(loaded)[0]): key for key, loaded in prepared.items()}
        for key, loaded in prepared.items():
            self._add(key, [loaded], _outputs(loaded), _preparation(loaded))
        for seed in recipe.seeds:
            for name in recipe.cells:
                cell, folder = self.cell(name, seed), self.folder(name, seed)
                work = self._cell_work(cell, folder)
                self._add(f"cells/{name}/seed{seed}", [cell, self.evaluation], (folder,), work)
        for name, settings in recipe.sweeps.items():
            key = f"cells/{settings.cell}/seed{recipe.seeds[0]}"
            work, folder = self._sweep_work(name, settings), recipe.out / "sweeps" / name
            self._add(f"sweeps/{name}", [self.evaluation, settings], (folder,), work, frozenset({key}))
        if recipe.lead_losses is not None:
            moved = _moved(config.to_dict(recipe.lead_losses), str(recipe.root), str(recipe.out))
            losses = config.from_dict(LeadConfig, moved, "lead_losses")
            for name in losses.cells:
                file, key = self.lead_file(name), f"cells/{name}/seed{recipe.seeds[0]}"
                step_work = self._lead_work(name, losses, file)
                self._add(f"lead/{name}", [self.evaluation, losses], (file,), step_work, frozenset({key}))

    def folder(self, name: str, seed: int) -> Path:
        """The run folder of a cell."""
        return self.recipe.out / "cells" / name / f"seed{seed}"

    def lead_file(self, name: str) -> Path:
        """The file of `lead.examine` for a cell of the first seed."""
        return self.recipe.out / "lead" / f"{name}.json"

    def cell(self, name: str, seed: int) -> TrainRecipe:
        """The training recipe of a cell."""
        return dataclasses.replace(self._cells[name], name=name, seed=seed, run=self.folder(name, seed))

    def _cell_command(self, name: str) -> str:
        source, *own = self.recipe.cells[name].split()
        return " ".join([source, *self.recipe.cell_settings.split(), *own])

    def _load(self, words: str, kind: type | None = None) -> Any:
        """A recipe with overrides; its paths below `root` are moved below `out`."""
        source, *overrides = words.split()
        loaded = config.load_by_kind(source, KINDS, overrides) if kind is None else config.load(source, kind, overrides)
        moved = _moved(config.to_dict(loaded), str(self.recipe.root), str(self.recipe.out))
        return config.from_dict(type(loaded), moved, source)

    def _add(
        self, key: str, recipes: Sequence[Any], outputs: tuple[Path, ...], work: Callable[[], bool],
        needs: frozenset[str] = frozenset(),
    ) -> None:  # fmt: skip
        found = {self._makers[path] for path in _strings(config.to_dict(recipes)) if path in self._makers}
        self.steps[key] = Step(
            key, config.settings_affecting_results(recipes), frozenset(found - {key}) | needs, outputs, work
        )

    def _cell_work(self, cell: TrainRecipe, run: Path) -> Callable[[], bool]:
        def work() -> bool:
            if not train.train(cell, run, source=self.recipe.name):
                return False
            watch(self.evaluation, run, once=True)
            return True

        return work

    def _sweep_work(self, name: str, settings: SweepConfig) -> Callable[[], bool]:
        def work() -> bool:
            run, out = self.folder(settings.cell, self.recipe.seeds[0]), self.recipe.out / "sweeps" / name
            chosen = f"checkpoint={export.export(run, out / 'model.safetensors')}"
            words = [chosen, *settings.grid.split()]
            if settings.guide_step is not None:
                guide = export.export(run, out / "guide.safetensors", export.WeightsChoice(step=settings.guide_step))
                words.append(f"guide={guide}")
            resolved = out / "eval.yaml"
            write_atomically(resolved, config.to_yaml(self.evaluation))
            sweep(str(resolved), words, out)
            return True

        return work

    def _lead_work(self, name: str, losses: LeadConfig, file: Path) -> Callable[[], bool]:
        def work() -> bool:
            weights = export.export(self.folder(name, self.recipe.seeds[0]), file.with_suffix(".safetensors"))
            write_atomically(file, f"{json.dumps(lead.examine(weights, losses, self.evaluation))}\n")
            return True

        return work

    # ---------------------------------------------------------------------------------------------- state

    def stamp(self, step: Step) -> Path:
        return self.recipe.out / "steps" / f"{step.key.replace('/', '.')}.json"

    def record(self, step: Step) -> dict[str, Any]:
        """The contents of a step's stamp: digests of its settings and of the records of its needs."""
        needs = {need: config.digest(self.record(self.steps[need])) for need in sorted(step.needs)}
        return {"settings": config.digest(step.settings), "needs": needs}

    def done(self, step: Step) -> bool:
        """Whether the step is completed.

        Raises:
            ValueError: if it was done with other settings, or a step that it needs was.
        """
        stamp = self.stamp(step)
        if not stamp.is_file() or not step.outputs[0].exists():
            return False
        found, now = read_json(stamp), self.record(step)
        reasons = ["with other settings"] if found.get("settings") != now["settings"] else []
        reasons += [
            f"from another {need}" for need, made in now["needs"].items() if found.get("needs", {}).get(need) != made
        ]
        if reasons:
            made = " ".join(map(str, (stamp, *step.outputs)))
            raise ValueError(f"{step.key} was made {', '.join(reasons)}; allowed: another out=, or remove {made}")
        return True

    def missing(self, steps: Sequence[Step]) -> list[Step]:
        """The steps that are not completed.

        Raises:
            ValueError: naming all steps that were done with other settings.
        """
        missing, refused = list[Step](), list[str]()
        for step in steps:
            try:
                if not self.done(step):
                    missing.append(step)
            except ValueError as error:
                refused.append(str(error))
        if refused:
            raise ValueError("\n".join(refused))
        return missing

    def select(self, only: Sequence[str]) -> list[Step]:
        """The steps that match a pattern, or all without patterns, each after the steps that it needs.

        Raises:
            ValueError: for a pattern that matches nothing.
        """
        keys = [key for key in self.steps if not key.startswith("prepare/")]
        for pattern in only:
            if not any(_matches(key, pattern) for key in self.steps):
                raise ValueError(f"--only: {pattern} matches none of {', '.join(self.steps)}")
        if only:
            keys = [key for key in self.steps if any(_matches(key, pattern) for pattern in only)]
        ordered: dict[str, Step] = {}

        def visit(key: str) -> None:
            for need in (name for name in self.steps if name in self.steps[key].needs):
                visit(need)
            ordered.setdefault(key, self.steps[key])

        for key in keys:
            visit(key)
        return list(ordered.values())


def _matches(key: str, pattern: str) -> bool:
    """Whether a pattern, perhaps with wildcards, matches a key such as cells/sfd/seed0, or its sfd/seed0 or sfd."""
    parts = key.split("/")
    return any(fnmatch.fnmatchcase(name, pattern) for name in (key, "/".join(parts[1:]), parts[1]))


def _moved(value: Any, root: str, out: str) -> Any:
    """Plain data in which paths below `root` are moved below `out`."""
    if isinstance(value, Mapping):
        return {key: _moved(item, root, out) for key, item in value.items()}
    if isinstance(value, list):
        return [_moved(item, root, out) for item in value]
    below = isinstance(value, str) and (value == root or value.startswith(f"{root}/"))
    return f"{out}{value.removeprefix(root)}" if below else value


def _strings(value: Any) -> Iterator[str]:
    """All strings in plain data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(item)


def _outputs(recipe: EncodeRecipe | FitRecipe | TrainRecipe) -> tuple[Path, ...]:
    """The outputs of a preparation: its `out`; of a training, the exported weights and the run folder."""
    if isinstance(recipe, TrainRecipe):
        return recipe.run.with_name(f"{recipe.run.name}.safetensors"), recipe.run
    return (recipe.out,)


def _preparation(recipe: EncodeRecipe | FitRecipe | TrainRecipe) -> Callable[[], bool]:
    def work() -> bool:
        match recipe:
            case EncodeRecipe():
                encode.encode(recipe)
            case FitRecipe():
                encode.fit(recipe)
            case TrainRecipe():
                if not train.train(recipe, recipe.run):
                    return False
                export.export(recipe.run, _outputs(recipe)[0])
        return True

    return work


# ------------------------------------------------------------------------------------------------- running


def run(study: Study, only: Sequence[str] = ()) -> bool:
    """Do the missing steps one by one. Other processes may do the same. Returns False if asked to stop.

    Raises:
        TimeoutError: if another process does not finish its step within SFD_STEP_TIMEOUT.
    """
    todo = study.select(only)
    with Claims(study.recipe.out / "claims", STEP) as claims:
        while missing := study.missing(todo):
            open_needs = {step.key for step in missing}
            ready = (step for step in missing if not step.needs & open_needs)
            step = next((step for step in ready if claims.take(step.key.replace("/", "."))), None)
            if step is None:
                claims.wait()  # other processes do all steps that can be done now
            elif not study.done(step) and not _run_step(study, step, len(todo) - len(missing) + 1, len(todo)):
                return False
    return True


def _run_step(study: Study, step: Step, number: int, total: int) -> bool:
    """Do a step and leave its stamp. Returns False after a request to stop."""
    logger.info("step %d of %d: %s", number, total, step.key)
    started = time.monotonic()
    if not step.work():
        return False
    seconds = round(time.monotonic() - started, 1)
    record = {**study.record(step), "seconds": seconds}
    write_atomically(study.stamp(step), f"{json.dumps(record)}\n")
    logger.info("%s: done in %.1f s", step.key, seconds)
    if step.key.startswith("cells/"):
        report(study)
    return True


# ------------------------------------------------------------------------------------------------- results


def results(study: Study) -> tuple[list[study_report.Row], list[str]]:
    """A row per scored step of each cell, read from the run folders; and the cells that are not completed."""
    rows, missing = list[study_report.Row](), list[str]()
    for seed in study.recipe.seeds:
        for name in study.recipe.cells:
            step = study.steps[f"cells/{name}/seed{seed}"]
            cell, table = study.cell(name, seed), RunPaths(study.folder(name, seed)).evaluations.table
            try:
                if not study.done(step):
                    missing.append(f"{name}/seed{seed}")
            except ValueError:
                missing.append(f"{name}/seed{seed} (made with other settings)")
                continue
            lead = cell.schedule.delta_t
            rows += [study_report.Row(name, seed, lead, scored) for scored in read_table(table)]
    return rows, missing


def report(study: Study) -> list[str]:
    """Write results.jsonl, and figures and tables into report/. Returns the cells that are not completed."""
    recipe = study.recipe
    rows, missing = results(study)
    lines = "".join(f"{json.dumps(row.as_json())}\n" for row in rows)
    write_atomically(recipe.out / RESULTS_TABLE, lines)
    study_report.write(recipe, rows, missing, knowledge(study), _examined(study), _samples(study))
    return missing


def _samples(study: Study) -> dict[str, Path]:
    """The grids of samples of the last step, of the first seed of the cells of the convergence figure that have one."""
    found = {}
    for name in study.recipe.convergence:
        cell, seed = study.cell(name, study.recipe.seeds[0]), study.recipe.seeds[0]
        grid = RunPaths(study.folder(name, seed)).evaluations.step(cell.train.steps) / GRID
        if grid.is_file():
            found[name] = grid
    return found


def _examined(study: Study) -> dict[str, Any]:
    """The results of `lead.examine` that are done with the settings of now, by cell."""
    found = {}
    for key, step in study.steps.items():
        kind, name = key.split("/")[:2]
        try:
            if kind == "lead" and study.done(step):
                found[name] = read_json(step.outputs[0])
        except ValueError:
            logger.warning("%s was made with other settings: the report leaves it out", key)
    return found


def knowledge(study: Study) -> semantics.Knowledge | None:
    """What the semantics of the study's latents know, measured once for the latents; None without such latents.

    If the latents are gone, what was measured on them stands.
    """
    if study.recipe.semantics is None:
        return None
    cell = study.cell(study.recipe.semantics, study.recipe.seeds[0])
    folder, file = cell.data.path, study.recipe.out / "knowledge.json"
    manifest = folder / MANIFEST
    latents_hash = file_sha256(manifest) if manifest.is_file() else None
    stored = read_json(file) if file.is_file() else {}
    if "of" in stored and latents_hash in (None, stored["latents"]):
        return semantics.Knowledge(**stored["of"])
    if latents_hash is None:
        return None
    latents, labels = semantics.read_latents(folder)
    found = semantics.measure(latents, labels, cell.latents, semantics.read_pooled_features(folder))
    write_atomically(file, f"{json.dumps({'latents': latents_hash, 'of': dataclasses.asdict(found)})}\n")
    return found
