"""Features and a reference → results.json: FID, sFID, IS, precision, recall, KID, and all that determined them."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from eval import metrics, outputs
from eval.chunks import ChunkFolder, config_hash, write_atomically
from eval.extract import FeatureSet, extract, open_features, read_features
from eval.features import LazyExtractor, make_extractor
from eval.metrics import MetricsConfig, Moments, MomentSums
from eval.neighbours import precision_recall
from eval.npz import STATISTICS, keys
from eval.recipe import EvalRecipe
from eval.reference import Reference, load_reference
from eval.sources import NpzSource, open_images, source_for
from sfd_scale import config, distributed

logger = logging.getLogger(__name__)
FORMAT = 1
Results = dict[str, Any]


def score(
    recipe: EvalRecipe,
    samples: Path,
    out: Path,
    extractor: LazyExtractor | None = None,
    reference: Reference | None = None,
) -> Results:
    """Score generated features, an .npz or a folder of images against the recipe's reference; writes `out`.

    Every rank has to call this; the result is the same for any number of them.

    Raises:
        ValueError: for samples of another extractor than the recipe's, or files that cannot be scored.
    """
    started = time.monotonic()
    if extractor is None:
        extractor = make_extractor(recipe.extractor, distributed.device())
    folder = features_of(recipe, samples, extractor)
    if reference is None:
        reference = load_reference(recipe, extractor)
    scores, warnings = score_features(recipe.metrics, folder, reference)
    results = _results(recipe, folder, reference, scores, warnings)
    results["run"] = {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started, 3),
        "world_size": distributed.world_size(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "samples": str(samples),
        "features": str(folder.path),
        "reference": str(reference.file),
        "checkpoint": None if recipe.checkpoint is None else str(recipe.checkpoint),
    }
    if distributed.is_main():
        _write(results, folder, reference, out)
    distributed.barrier()
    return results


def features_of(recipe: EvalRecipe, samples: Path, extractor: LazyExtractor) -> ChunkFolder:
    """The folder of features that `samples` is, or that are now extracted from the images there.

    Raises:
        ValueError: for features of another extractor, or an .npz whose stored statistics ADM would score instead.
    """
    if (samples / "config.json").is_file():
        folder = open_features(samples)
        made_with = json.loads((samples / "config.json").read_text(encoding="utf-8"))["extractor"]
        if made_with != extractor.identity:
            raise ValueError(
                f"{samples}: its features are of {made_with}, the recipe's extractor is {extractor.identity}; "
                "score them with their own recipe, or generate anew"
            )
        return folder
    source = source_for(samples)
    if isinstance(source, NpzSource):
        stored = sorted(keys(samples) & set(STATISTICS))
        if stored:
            raise ValueError(
                f"{samples}: holds {', '.join(stored)} beside the images; ADM's evaluator would take these for the "
                "samples' statistics and never look at the images. Remove them, or give the file as the reference"
            )
    return extract(open_images(source), extractor, recipe.extractor_batch, recipe.cache)


def score_features(
    settings: MetricsConfig, folder: ChunkFolder, reference: Reference
) -> tuple[dict[str, float | None], list[str]]:
    """All scores of a finished folder of features, the same on every rank, and warnings about them."""
    device = distributed.device()
    samples = read_features(folder)
    _check_dimensions(samples, reference)
    scores: dict[str, float | None] = dict.fromkeys(
        ("fid", "sfid", "is_mean", "is_std", "is_whole_splits", "precision", "recall", "kid_mean", "kid_std")
    )
    if reference.features is not None:
        pool, real = samples.pool.to(device), reference.features.to(device)
        scores["precision"], scores["recall"] = precision_recall(pool, real, settings.neighbours)
        if settings.kid_subsets:
            kid = metrics.kernel_distance(pool, real, settings.kid_subsets, settings.kid_size)
            scores["kid_mean"], scores["kid_std"] = kid
    pool_moments, spatial_moments = _moments(settings, folder, samples, device)
    scores["fid"] = metrics.frechet_distance(pool_moments, reference.pool.to(device))
    if spatial_moments is not None and reference.spatial is not None:
        scores["sfid"] = metrics.frechet_distance(spatial_moments, reference.spatial.to(device))
    if samples.logits is not None:
        inception = metrics.inception_score(samples.logits.to(device), settings.is_split)
        scores["is_mean"], scores["is_std"], scores["is_whole_splits"] = inception
    return distributed.broadcast_object((scores, _warnings(settings, samples, reference, scores)))


def _moments(
    settings: MetricsConfig, folder: ChunkFolder, samples: FeatureSet, device: torch.device
) -> tuple[Moments, Moments | None]:
    if settings.mode == "low_memory":
        pool = _summed(folder, "pool")
        return pool.to(device), None if samples.spatial is None else _summed(folder, "spatial").to(device)
    spatial = None if samples.spatial is None else metrics.moments(samples.spatial.to(device))
    return metrics.moments(samples.pool.to(device)), spatial


def _summed(folder: ChunkFolder, name: str) -> Moments:
    """Moments from sums over each rank's chunks; as many rows at the end as the folder should have."""
    sums: MomentSums | None = None
    for chunk, rows in enumerate(folder.read(name)):
        if sums is None:
            sums = MomentSums(rows.shape[1], shift=rows.double().mean(0))
        if chunk % distributed.world_size() == distributed.rank():
            sums.update(rows)
    assert sums is not None
    distributed.all_reduce_sum(sums.sums)
    found = sums.finish()
    assert found.count == folder.total
    return found


def _check_dimensions(samples: FeatureSet, reference: Reference) -> None:
    for name, tensor, moments in (
        ("pooled", samples.pool, reference.pool),
        ("spatial", samples.spatial, reference.spatial),
    ):
        if tensor is not None and moments is not None and tensor.shape[1] != len(moments.mean):
            raise ValueError(
                f"{tensor.shape[1]} {name} features in the samples, {len(moments.mean)} in the reference; they are of "
                "different extractors"
            )


def _warnings(
    settings: MetricsConfig, samples: FeatureSet, reference: Reference, scores: dict[str, float | None]
) -> list[str]:
    found = metrics.sample_warnings(len(samples), samples.pool.shape[1], settings.is_split, samples.labels)
    if reference.features is None:
        found.append("the reference has no images: no precision, recall and KID")
    if reference.spatial is None or scores["sfid"] is None:
        found.append("no spatial features on both sides: no sFID")
    if scores["is_mean"] is None:
        found.append("the extractor has no logits: no Inception Score")
    return found


# ------------------------------------------------------------------------------------------------- results


def _results(
    recipe: EvalRecipe,
    folder: ChunkFolder,
    reference: Reference,
    scores: dict[str, float | None],
    warnings: list[str],
) -> Results:
    samples = json.loads((folder.path / "config.json").read_text(encoding="utf-8"))
    determined = {
        "samples": samples,
        "reference": {key: reference.provenance[key] for key in ("data", "extractor", "batch", "reference_images")},
        "metrics": config.to_dict(recipe.metrics),
    }
    return {
        "format": FORMAT,
        "name": recipe.name,
        "id": config_hash(determined),
        "scores": scores,
        "count": folder.total,
        "nfe": _mean_nfe(folder),
        "warnings": warnings,
        "samples": samples,
        "reference": reference.provenance,
        "metrics": determined["metrics"],
        "recipe_digest": config.digest(recipe),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "torch-fidelity", "numpy", "sfd-scale")},
        },
    }


def _mean_nfe(folder: ChunkFolder) -> float | None:
    if "nfe" not in folder.names():
        return None
    return torch.cat(list(folder.read("nfe"))).double().mean().item()


def _write(results: Results, folder: ChunkFolder, reference: Reference, out: Path) -> None:
    if reference.grid is not None:
        path = out.with_name("reference.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        outputs.to_image(reference.grid).save(path)
        results["run"]["reference_grid"] = str(path)
    grid = folder.path / outputs.GRID
    results["run"]["grid"] = str(grid) if grid.is_file() else None
    write_atomically(out, f"{json.dumps(results, indent=1)}\n".encode())
    logger.info("%s", out)
    for warning in results["warnings"]:
        logger.warning("%s", warning)


def read_results(path: Path) -> Results:
    """A results.json.

    Raises:
        ValueError: if it is none, or of a newer release.
    """
    file = path / "results.json" if path.is_dir() else path
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: not a readable results.json: {error}") from error
    if not isinstance(results, dict) or "format" not in results or results["format"] > FORMAT:
        raise ValueError(f"{file}: not a results.json of this release")
    return results
