"""`eval score`: compare features of samples with a reference, and write results.json."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import platform
import statistics
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from eval.features.extract import extract_all, open_features, read_rows
from eval.features.extractor import LazyExtractor
from eval.features.make import make_extractor
from eval.features.presets import short_name
from eval.generate import CHECKPOINT_FILE, further_features
from eval.images import outputs
from eval.images.npz import STATISTICS, keys
from eval.images.proof import read_proofs
from eval.images.sources import NpzSource, open_images, source_for
from eval.metrics.compute import ScoreInputs
from eval.metrics.config import MetricsConfig
from eval.metrics.reference import Reference
from eval.metrics.sample_warnings import repeat_warnings, sample_warnings
from eval.metrics.scores import SCORES, Scores
from eval.recipe import EvalRecipe
from eval.reference import Judge, load_judges, load_reference
from eval.results import Representation, Results, ScoringRun, ValidationFD
from eval.validation import validation_fd
from eval.work.chunks import ChunkFolder
from sfd_scale import config
from sfd_scale.runtime import distributed
from sfd_scale.runtime.files import file_sha256, read_json, require_output
from sfd_scale.runtime.progress import progress
from sfd_scale.runtime.run_paths import RESULTS

logger = logging.getLogger(__name__)


def score(
    recipe: EvalRecipe,
    samples: Path,
    out: Path,
    extractor: LazyExtractor | None = None,
    reference: Reference | None = None,
    judges: Mapping[str, Judge] | None = None,
) -> Results:
    """Score a folder of `generate`, an .npz or images against the recipe's reference, and write `out`.

    All ranks have to call this. The scores are the same for any number of ranks.

    Args:
        extractor, reference, judges: in place of the recipe's, for a sweep that reuses them.

    Raises:
        ValueError: for features of another extractor than the recipe's, samples that cannot be scored, or an `out` that
            cannot be written, or holds the results of other samples.
    """
    started = time.monotonic()
    if distributed.is_main():
        require_output(out)
    if extractor is None:
        extractor = make_extractor(recipe.extractor, distributed.device())
    judges = load_judges(recipe, distributed.device()) if judges is None else judges
    folder, *further = features_of(recipe, samples, extractor, judges)
    _check_replaceable(out, folder)
    if reference is None:
        reference = load_reference(recipe, extractor)
    scores, warnings = score_features(recipe.metrics, folder, reference)
    found = {
        name: _representation(recipe.metrics, own, judge)
        for (name, judge), own in zip(judges.items(), further, strict=True)
    }
    validation = validation_fd(recipe, reference, judges)
    reference_grid = None if reference.grid is None else _reference_grid(out)
    grid = folder.path / outputs.GRID
    run = ScoringRun(
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - started, 3),
        world_size=distributed.world_size(),
        made_on=tuple(folder.made_on()),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        samples=str(samples),
        features=str(folder.path),
        reference=str(reference.file),
        checkpoint=checkpoint_of(folder, recipe),
        reference_grid=None if reference_grid is None else str(reference_grid),
        grid=str(grid) if grid.is_file() else None,
    )
    results = _results(recipe, folder, reference, scores, warnings, run, found, validation)
    if distributed.is_main():
        if reference_grid is not None:
            assert reference.grid is not None
            reference_grid.parent.mkdir(parents=True, exist_ok=True)
            outputs.to_image(reference.grid).save(reference_grid)
        results.write(out)
        logger.info("%s", out)
        for warning in warnings:
            logger.warning("%s", warning)
    distributed.barrier()
    return results


def checkpoint_of(folder: ChunkFolder, recipe: EvalRecipe) -> str | None:
    """The path of the weights that drew the images; None if no file that is known has their hash."""
    if not (folder.path / "config.json").is_file():
        return None
    drawn_with = read_json(folder.path / "config.json").get("checkpoint")
    noted = folder.path / CHECKPOINT_FILE
    recorded = read_json(noted)["checkpoint"] if noted.is_file() else None
    if drawn_with is None or recorded is not None:
        return recorded
    path = recipe.checkpoint  # a folder of an earlier release
    same = path is not None and path.is_file() and file_sha256(path) == drawn_with["sha256"]
    return str(path) if same else None


def default_out(samples: Path) -> Path:
    """The file for the results of `samples`: in a folder of `generate`; beside given images, with their whole name."""
    if (samples / "config.json").is_file():
        return samples / RESULTS
    given = samples.resolve()
    return given.with_name(f"{given.name}.{RESULTS}")


def _reference_grid(out: Path) -> Path:
    """The picture of real images that belongs to a file of results."""
    return out.with_name("reference.png" if out.name == RESULTS else f"{out.name.removesuffix('.json')}.reference.png")


def _check_replaceable(out: Path, folder: ChunkFolder) -> None:
    """Scores of the same samples may be replaced: a score of another reference, or with other settings.

    Raises:
        ValueError: if `out` holds anything else.
    """
    message = None
    if distributed.is_main() and out.exists():
        try:
            before = Results.read(out).samples
        except ValueError as error:
            message = f"--out: {out} exists and holds no results ({error}); allowed: a new file, or results to replace"
        else:
            differing = config.differences(_identity(before), _identity(_settings(folder)))
            if differing:
                message = (
                    f"--out: {out} holds the results of other samples ({', '.join(differing)} differ); allowed: "
                    "another file, or remove this one"
                )
    message = distributed.broadcast_object(message)
    if message is not None:
        raise ValueError(message)


def _identity(samples: Mapping[str, Any]) -> Mapping[str, Any]:
    """What says whether samples are the same: how they were generated, or the hash of given images."""
    return samples if samples["kind"] == "generated" else {"images": samples["images"]}


def features_of(
    recipe: EvalRecipe, samples: Path, extractor: LazyExtractor, judges: Mapping[str, Judge]
) -> list[ChunkFolder]:
    """The features of `samples`: the folders of `generate`, or extracted from images. The main extractor is the first.

    Raises:
        ValueError: for features of another extractor, images of several sizes, or an .npz with statistics, which ADM's
            evaluator would score.
    """
    if (samples / "config.json").is_file():
        further = [_generated(further_features(samples, name), judge.extractor) for name, judge in judges.items()]
        return [_generated(samples, extractor), *further]
    source = source_for(samples)
    if isinstance(source, NpzSource):
        stored = sorted(keys(samples) & set(STATISTICS))
        if stored:
            raise ValueError(
                f"{samples}: holds {', '.join(stored)} beside the images; ADM's evaluator would score these statistics "
                "and ignore the images. Remove them, or give the file as the reference"
            )
    extractors = [extractor, *(judge.extractor for judge in judges.values())]
    images = open_images(source, recipe.cache, one_size=True)
    if images.jpeg and distributed.is_main():
        logger.warning(
            "%s: %d of %d samples are JPEG files, whose compression moves every score (arXiv 2104.11222); store "
            "samples as PNG or .npz", samples, images.jpeg, images.count,
        )  # fmt: skip
    return extract_all(images, extractors, recipe.extractor_batch, recipe.cache)


def _generated(folder: Path, extractor: LazyExtractor) -> ChunkFolder:
    """A folder of features that `generate` filled. Raises ValueError for features of another extractor."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no features of this extractor yet; `eval generate` with this recipe adds them")
    opened = open_features(folder)
    made_with = read_json(folder / "config.json")["extractor"]
    if made_with != extractor.fingerprint:
        raise ValueError(
            f"{folder}: its features are of {made_with}, the recipe's extractor is {extractor.fingerprint}; "
            "score them with their own recipe, or generate them again"
        )
    return opened


def _representation(settings: MetricsConfig, folder: ChunkFolder, judge: Judge) -> Representation:
    """The scores of a further extractor. All ranks have to call this."""
    scores, warnings = score_features(settings, folder, judge.reference, further=True)
    return Representation(
        extractor=judge.extractor.fingerprint,
        scores=scores,
        warnings=warnings,
        reference=judge.reference.provenance,
        features=str(folder.path),
    )


def score_features(
    settings: MetricsConfig, folder: ChunkFolder, reference: Reference, *, further: bool = False
) -> tuple[Scores, tuple[str, ...]]:
    """All scores of a finished folder of features, the same on every rank, and warnings about them.

    The ranks share the rows of precision, recall, density and coverage. One rank computes each of the other scores.

    Args:
        further: whether the features are of a further extractor, from which nobody expects sFID and IS.
    """
    _check_dimensions(folder, reference)
    inputs = ScoreInputs(folder, reference, settings, distributed.device())
    prepared = [score.compute(inputs) for score in SCORES if score.compute is not None]
    tasks = [task for task in prepared if task is not None][distributed.rank() :: distributed.world_size()]
    mine: dict[str, float] = {}
    with progress(len(tasks), "scores", "scores") as bar:
        for task in tasks:
            found = task()
            mine.update(found)
            bar.advance(1, {"last": ", ".join(found)})
    values: dict[str, float] = {}
    for share in distributed.all_gather_object(mine):
        values.update(share)
    scores: Scores = distributed.broadcast_object(Scores(**values))
    warnings = _warnings(settings, folder, reference, scores, further=further) if distributed.is_main() else ()
    return scores, distributed.broadcast_object(warnings)


def _check_dimensions(folder: ChunkFolder, reference: Reference) -> None:
    for title, name, moments in (("pooled", "pool", reference.pool), ("spatial", "spatial", reference.spatial)):
        width = folder.width(name)
        if width is not None and moments is not None and width != len(moments.mean):
            raise ValueError(
                f"{width} {title} features in the samples, {len(moments.mean)} in the reference: they come from "
                "different extractors"
            )


def _warnings(
    settings: MetricsConfig, folder: ChunkFolder, reference: Reference, scores: Scores, *, further: bool
) -> tuple[str, ...]:
    dim = len(reference.pool.mean)
    labels, logits = read_rows(folder, "labels"), read_rows(folder, "logits")
    found = sample_warnings(folder.total, dim, settings.is_split, labels, logits, scores.is_mean)
    pool = read_rows(folder, "pool")
    assert pool is not None
    found += repeat_warnings(pool)
    if reference.pool.count is not None and reference.pool.count <= dim:
        found.append(
            f"a reference of {reference.pool.count} images for {dim} features: its covariance is singular and FID is "
            "biased upwards; compare it only with FIDs against the same reference"
        )
    sides = read_rows(folder, "side")
    if sides is not None and reference.side is not None and bool((sides != reference.side).any()):
        own = "/".join(map(str, sides.unique().tolist()))
        found.append(
            f"samples of {own} pixels, a reference of {reference.side}: both are resized for the extractor, and their "
            "sharpness changes every score"
        )
    if reference.features is None:
        found.append("the reference has no images: no precision, recall, density, coverage, KID and MIND")
    if scores.sfid is None and not further:
        found.append("no spatial features on both sides: no sFID")
    if scores.is_mean is None and not further:
        found.append("the extractor has no logits: no Inception Score")
    machines = folder.made_on()
    if len(machines) > 1:
        found.append(f"made in parts on {'; '.join(machines)}: images differ in the last bits between these")
    return tuple(found)


# ------------------------------------------------------------------------------------------------- results


def _results(
    recipe: EvalRecipe,
    folder: ChunkFolder,
    reference: Reference,
    scores: Scores,
    warnings: tuple[str, ...],
    run: ScoringRun,
    representations: dict[str, Representation],
    validation: ValidationFD | None,
) -> Results:
    samples = _settings(folder)
    determined: dict[str, Any] = {
        "samples": samples,
        "reference": _determined(reference.provenance),
        "metrics": Scores.settings_in_hash(recipe.metrics),
    }
    if representations:
        determined["representations"] = {name: _determined(r.reference) for name, r in representations.items()}
    if validation is not None:
        determined["validation"] = config.to_dict(validation)
    results = Results(
        name=recipe.name,
        id=config.digest(determined),
        scores=scores,
        count=folder.total,
        nfe=_mean_nfe(folder),
        warnings=warnings,
        samples=samples,
        reference=reference.provenance,
        metrics=recipe.metrics,
        arithmetic={"features": "float32", "tf32": False, "autocast": False, "moments": "float64"},
        recipe_digest=config.digest(recipe),
        versions={
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "torch-fidelity", "numpy", "sfd-scale")},
            "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        },
        run=run,
        proof=read_proofs(folder),
        extractor=short_name(recipe.extractor),
        representations=representations,
        validation=validation,
    )
    return _with_ratio(results)


def _with_ratio(results: Results) -> Results:
    """The results with FDr, the mean ratio over all networks (arXiv 2604.28190); or with a warning for want of one."""
    if results.validation is None:
        return results
    ratios = results.fd_ratios
    if missing := [name for name in (str(results.extractor), *results.representations) if name not in ratios]:
        text = f"no FDr: validation has no number for {', '.join(missing)}"
        return dataclasses.replace(results, warnings=(*results.warnings, text))
    scores = dataclasses.replace(results.scores, fdr=statistics.fmean(ratios.values()))
    return dataclasses.replace(results, scores=scores)


def _determined(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What determines a reference, without paths."""
    return {key: provenance[key] for key in ("data", "extractor", "batch", "reference_images")}


def _settings(folder: ChunkFolder) -> dict[str, Any]:
    """The settings that determined the features in a folder."""
    settings: dict[str, Any] = read_json(folder.path / "config.json")
    return settings


def _mean_nfe(folder: ChunkFolder) -> float | None:
    if "nfe" not in folder.names():
        return None
    return torch.cat(list(folder.read("nfe"))).double().mean().item()


if __name__ == "__main__":
    from eval.__main__ import main

    main("score")
