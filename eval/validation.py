"""FD of the validation set, by which FD is divided for FDr (arXiv 2604.28190): published, or measured here."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.features.extract import extract_all, read_features
from eval.features.make import make_extractor
from eval.features.presets import PUBLISHED_VALIDATION_FD, short_name
from eval.images.sources import open_images, source_for
from eval.metrics.frechet import frechet_distance
from eval.metrics.moments import moments
from eval.metrics.reference import Reference
from eval.recipe import EvalRecipe
from eval.reference import Judge, load_judges, load_reference
from eval.results import ValidationFD
from sfd_scale.runtime import distributed
from sfd_scale.runtime.files import read_json, require_output, write_json

logger = logging.getLogger(__name__)
FORMAT = 1
PUBLISHED = "FD-loss (arXiv 2604.28190), ImageNet 256x256"
_SAME = ("data", "extractor", "batch")  # of the reference; FD of another is in another unit


def validation_fd(recipe: EvalRecipe, reference: Reference, judges: Mapping[str, Judge]) -> ValidationFD | None:
    """FD of the validation set for the main extractor and the further ones; None if the recipe asks for no FDr.

    Raises:
        ValueError: for a file of other references or extractors.
    """
    if recipe.validation is None:
        return None
    names = [short_name(recipe.extractor), *judges]
    if recipe.validation == "published":
        known: dict[str, float] = {str(name): value for name, value in PUBLISHED_VALIDATION_FD.items()}
        return ValidationFD(source=PUBLISHED, fd={name: known[name] for name in names if name in known})
    assert isinstance(recipe.validation, Path)
    path, stored = recipe.validation, read_json(recipe.validation)
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise ValueError(f"validation: {path}; allowed: published, or a file of `eval validation`")
    used = dict(zip(names, [reference, *(judge.reference for judge in judges.values())], strict=True))
    for name in names:
        made = stored["extractors"].get(name)
        for key in _SAME if made is not None else ():
            if made["reference"][key] != used[name].provenance[key]:
                raise ValueError(
                    f"validation: {path} has {name} with {key} {made['reference'][key]}, the recipe has "
                    f"{used[name].provenance[key]}; allowed: a file of `eval validation` with this recipe"
                )
    fd = {name: float(stored["extractors"][name]["fd"]) for name in names if name in stored["extractors"]}
    return ValidationFD(source=f"{stored['images']}, {stored['count']} images", fd=fd)


def measure(recipe: EvalRecipe, images: Path, out: Path) -> dict[str, float]:
    """FD of validation images against the recipe's reference, for every extractor; writes the file of `validation`.

    Images in class folders, such as ImageNet's, are cropped to the size of the reference. All ranks have to call this.

    Raises:
        ValueError: as for `load_reference`.
    """
    if distributed.is_main():
        require_output(out)
    device = distributed.device()
    extractor, judges = make_extractor(recipe.extractor, device), load_judges(recipe, device)
    references = [load_reference(recipe, extractor), *(judge.reference for judge in judges.values())]
    extractors = [extractor, *(judge.extractor for judge in judges.values())]
    side = references[0].side
    opened = open_images(source_for(images, side), recipe.cache, one_size=side is None)
    folders = extract_all(opened, extractors, recipe.extractor_batch, recipe.cache)
    found: dict[str, float] = {}
    written: dict[str, Any] = {}
    for name, folder, reference in zip((short_name(recipe.extractor), *judges), folders, references, strict=True):
        if distributed.is_main():
            own = moments(read_features(folder).pool.to(device))
            found[name] = frechet_distance(own, reference.pool.to(device), recipe.metrics.frechet)
            kept = {key: reference.provenance[key] for key in _SAME}
            written[name] = {"fd": found[name], "reference": kept}
    if distributed.is_main():
        write_json(out, {"format": FORMAT, "images": opened.fingerprint, "count": opened.count, "extractors": written})
        logger.info("%s", out)
    found = distributed.broadcast_object(found)
    return found
