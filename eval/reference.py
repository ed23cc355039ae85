"""`eval reference`: moments and features of the real images that scores compare with, computed once and cached."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.features.config import INCEPTION_GRID, InceptionConfig
from eval.features.extract import FeatureSet, extract, extract_all, read_features
from eval.features.extractor import LazyExtractor
from eval.features.make import make_extractors
from eval.features.presets import short_name
from eval.images import npz, outputs
from eval.images.sources import Images, ImagesConfig, NpzSource, open_images
from eval.metrics.config import MetricsConfig
from eval.metrics.moments import FeatureMoments, moments
from eval.metrics.reference import Reference
from eval.recipe import EvalRecipe
from sfd_scale import config
from sfd_scale.runtime import distributed, seeding
from sfd_scale.runtime.files import file_sha256, write_atomically
from sfd_scale.runtime.weight_files import read_safetensors, safetensors_bytes

logger = logging.getLogger(__name__)
GRID_CLASSES, GRID_EACH = 16, 8
# What determines a reference. Its provenance has more: paths, and the numbers of its images.
_DETERMINED = ("kind", "format", "data", "extractor", "batch", "reference_images")
_INCEPTION = {"mu": 2048, "mu_s": math.prod(INCEPTION_GRID)}


@dataclass(frozen=True)
class Judge:
    """An extractor beside the main one, with its reference."""

    extractor: LazyExtractor
    reference: Reference


def load_judges(recipe: EvalRecipe, device: torch.device) -> dict[str, Judge]:
    """The further extractors of a recipe with their references, by name. All ranks have to call this.

    Images that are the reference of several extractors are read once.

    Raises:
        ValueError: as for `load_reference`.
    """
    extractors = make_extractors(recipe.further_extractors(), device)
    for name in recipe.references:
        if name not in extractors:
            raise ValueError(f"references: {name}; allowed: an extractor beside the main one ({', '.join(extractors)})")
    planned = [_planned(recipe, recipe.reference_of(name), extractor) for name, extractor in extractors.items()]
    todo = distributed.broadcast_object([not plan.file.is_file() for plan in planned])
    open_plans = [plan for plan, missing in zip(planned, todo, strict=True) if missing and plan.images is not None]
    for data in dict.fromkeys(plan.determined["data"] for plan in open_plans):
        same = [plan for plan in open_plans if plan.determined["data"] == data]
        images = same[0].images
        assert images is not None
        extract_all(images, [plan.extractor for plan in same], recipe.extractor_batch, recipe.cache)
    return {name: Judge(extractor, load_reference(recipe, extractor, name)) for name, extractor in extractors.items()}


@dataclass(frozen=True)
class _Plan:
    """A reference that may have to be computed. images: None if the source has statistics alone."""

    source: ImagesConfig
    extractor: LazyExtractor
    images: Images | None
    determined: dict[str, Any]
    file: Path


def _planned(recipe: EvalRecipe, source: ImagesConfig | None, extractor: LazyExtractor) -> _Plan:
    if source is None:
        raise ValueError("reference: null; allowed: kind npz, folder, flat, mds or digits, with its path")
    has_images = not isinstance(source, NpzSource) or "arr_0" in npz.keys(source.path)
    images = open_images(source, recipe.cache) if has_images else None
    determined = {
        "kind": "reference",
        "format": 1,
        "data": images.fingerprint if images is not None else _file_fingerprint(source),
        "extractor": extractor.fingerprint,
        "batch": recipe.extractor_batch,
        "reference_images": recipe.metrics.reference_images,
    }
    return _Plan(source, extractor, images, determined, cached_file(recipe.cache, determined))


def cached_file(cache: Path, provenance: Mapping[str, Any]) -> Path:
    """The file in the cache of a reference with this provenance."""
    determined = {key: provenance[key] for key in _DETERMINED}
    return cache / f"reference-{config.digest(determined)[:16]}.safetensors"


def load_reference(recipe: EvalRecipe, extractor: LazyExtractor, name: str | None = None) -> Reference:
    """The reference of an extractor, from the cache or computed. All ranks have to call this.

    Args:
        name: of a further extractor; None for the main one.

    Raises:
        ValueError: if the recipe has none, or its statistics do not fit the extractor.
    """
    plan = _planned(recipe, recipe.reference_of(name), extractor)
    own = name in recipe.references or (name is None and isinstance(recipe.extractor, InceptionConfig))
    stored = _stored_statistics(plan.source, name or short_name(recipe.extractor), own=own, inception=name is None)
    if not distributed.broadcast_object(plan.file.is_file()):
        found = None if plan.images is None else _features(recipe, plan.images, extractor)
        if distributed.is_main():
            _write(plan.file, _tensors(stored, found, recipe.metrics), plan.images)
        distributed.barrier()
    return read_reference(plan.file, {**plan.determined, "source": config.to_dict(plan.source)})


def _features(recipe: EvalRecipe, images: Images, extractor: LazyExtractor) -> FeatureSet:
    return read_features(extract(images, extractor, recipe.extractor_batch, recipe.cache))


def _file_fingerprint(source: ImagesConfig) -> str:
    assert isinstance(source, NpzSource)
    return f"npz:{file_sha256(source.path)}"


# ------------------------------------------------------------------------------------------------- ADM's files


def _stored_statistics(source: ImagesConfig, extractor: str, *, own: bool, inception: bool) -> dict[str, Tensor]:
    """mu, sigma, mu_s and sigma_s of an ADM reference file; empty for other sources.

    Args:
        own: whether the file is for this extractor. inception: whether that is Inception.

    Raises:
        ValueError: for a file without usable statistics or images, or statistics of another extractor.
    """
    if not isinstance(source, NpzSource):
        return {}
    found = npz.read_statistics(source.path)
    if not found and "arr_0" not in npz.keys(source.path):
        raise ValueError(f"{source.path}: neither statistics (mu, sigma, mu_s, sigma_s) nor images (arr_0) in it")
    if found and not {"mu", "sigma"} <= found.keys():
        raise ValueError(f"{source.path}: {', '.join(sorted(found))} without mu and sigma; FID needs both")
    if found and not own:
        raise ValueError(
            f"{source.path}: its statistics are of Inception features, but the extractor is {extractor}; allowed: the "
            f"inception extractor, a reference of images, or references.{extractor} with statistics of that network"
        )
    if not inception:
        return {key: found[key] for key in ("mu", "sigma") if key in found}
    for key, dim in _INCEPTION.items():
        if key in found and found[key].numel() != dim:
            raise ValueError(f"{source.path}: {key} has {found[key].numel()} entries; Inception has {dim}")
    if "mu_s" in found:
        check_spatial_order(found["mu_s"], INCEPTION_GRID, str(source.path))
    return found


def check_spatial_order(mean: Tensor, grid: tuple[int, int, int], where: str) -> None:
    """Refuse spatial statistics in (channel, row, column) order. They would change sFID by orders of magnitude.

    Mean feature maps differ far more between channels than between places. In the right order, most of the variance is
    between channels.

    Args:
        mean: (h·w·c,), the mean of the spatial features.
        grid: (h, w, c).
        where: names the statistics in the message.

    Raises:
        ValueError: if the wrong order has the larger variance between channels.
    """
    h, w, c = grid
    here = _variance_between(mean.reshape(h * w, c).T)
    swapped = _variance_between(mean.reshape(c, h * w))
    if swapped > here:
        raise ValueError(
            f"{where}: the spatial statistics are in (channel, row, column) order: {100 * swapped:.0f}% of their "
            f"variance is then between channels, and {100 * here:.0f}% in the order of ADM's files; allowed: "
            "statistics in (row, column, channel) order"
        )


def _variance_between(maps: Tensor) -> float:
    """The fraction of the variance of maps (c, h·w) that is between rows."""
    return (maps.mean(1).var(correction=0) / maps.var(correction=0).clamp(min=1e-300)).item()


# ------------------------------------------------------------------------------------------------- cache


def _tensors(given: dict[str, Tensor], found: FeatureSet | None, metrics: MetricsConfig) -> dict[str, Tensor]:
    stored = dict(given)
    if found is not None and "mu" not in given:
        pool = moments(found.pool)
        stored |= {"mu": pool.mean, "sigma": pool.cov, "count": torch.tensor(len(found))}
        if found.spatial is not None:
            spatial = moments(found.spatial)
            stored |= {"mu_s": spatial.mean, "sigma_s": spatial.cov}
    if found is not None:
        rows = seeding.permutation(0, "reference_images", len(found))[: metrics.reference_images].sort().values
        stored["features"] = found.pool[rows]
        if found.labels is not None:
            stored["labels"] = found.labels
    return stored


def _write(file: Path, tensors: dict[str, Tensor], images: Images | None) -> None:
    if images is not None:
        labels = tensors.pop("labels", None)
        tensors["grid"] = _grid(images, labels)
        tensors["side"] = torch.tensor(images.rows(range(1))[0].shape[-1])
    write_atomically(file, safetensors_bytes({name: tensor.contiguous() for name, tensor in tensors.items()}))
    logger.info("reference: %s", file)


def _grid(images: Images, labels: Tensor | None) -> Tensor:
    """A picture of real images; with labels, one class per row."""
    if labels is None:
        numbers = torch.linspace(0, images.count - 1, min(images.count, GRID_CLASSES * GRID_EACH)).long()
        rows = [part.tolist() for part in numbers.split(GRID_EACH)]
    else:
        rows = outputs.rows_by_class(labels, GRID_CLASSES, GRID_EACH)
    return outputs.tile([[images.rows(range(n, n + 1))[0][0] for n in row] for row in rows])


def read_reference(file: Path, provenance: dict[str, Any]) -> Reference:
    """The reference in a file of the cache."""
    tensors = read_safetensors(file)
    count = int(tensors["count"]) if "count" in tensors else None
    spatial = FeatureMoments(tensors["mu_s"], tensors["sigma_s"], count) if "mu_s" in tensors else None
    features, grid = (tensors[name] if name in tensors else None for name in ("features", "grid"))  # noqa: SIM401
    side = int(tensors["side"]) if "side" in tensors else None
    provenance = {**provenance, "count": count, "features_count": None if features is None else len(features)}
    return Reference(
        FeatureMoments(tensors["mu"], tensors["sigma"], count), spatial, features, grid, side, provenance, file
    )


if __name__ == "__main__":
    from eval.__main__ import main

    main("reference")
