"""Groups of trainings: their results, the seeds of each, and how each image moves each score.

N images.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.comparison.variance import sampling_gram
from eval.features.extract import open_features, read_features
from eval.generate import further_features
from eval.metrics.influence import Influence
from eval.metrics.reference import Reference
from eval.metrics.scores import SCORES
from eval.reference import cached_file, read_reference
from eval.results import Results, further_key
from sfd_scale import config
from sfd_scale.export import read_note
from sfd_scale.runtime.files import read_json
from sfd_scale.runtime.run_paths import RESULTS, RunPaths
from sfd_scale.runtime.seeds import SEED_PARTS, Seeds


@dataclass(frozen=True)
class Replicate:
    """The results of one set of samples, with the seeds of its training, as far as they are known."""

    path: Path
    results: Results
    seeds: Seeds | None
    influences: Mapping[str, Influence]  # by the key of the score

    def same_images(self, other: Replicate) -> bool:
        """Whether image i of both has the same noise and label."""
        return self is other or self.results.paired_with(other.results)


Group = Sequence[Replicate]
AGAINST = "against"  # between the words of two groups


def results_files(word: str) -> list[Path]:
    """The results that a word names: a results.json, its folder, a run folder (the last evaluated step), or a pattern.

    Raises:
        ValueError: if it names none.
    """
    paths = [Path(word)] if Path(word).exists() else sorted(map(Path, glob.glob(word)))
    found = [file for path in paths if (file := _results_of(path)) is not None]
    if not found:
        raise ValueError(
            f"{word}: no results; allowed: a {RESULTS}, its folder, an evaluated run, or a pattern of them"
        )
    return found


def split_sides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words for A and for B: two words, or any number on each side of `against`.

    Raises:
        ValueError: for anything else.
    """
    if words.count(AGAINST) == 1:
        middle = words.index(AGAINST)
        sides = list(words[:middle]), list(words[middle + 1 :])
    else:
        sides = list(words[:1]), list(words[1:])
    if not all(sides) or AGAINST in (*sides[0], *sides[1]) or (AGAINST not in words and len(words) != 2):
        raise ValueError(f"{' '.join(words)}: allowed: A B, or A1 A2 ... {AGAINST} B1 B2 ...")
    return sides


def _results_of(path: Path) -> Path | None:
    if path.is_file():
        return path
    if (path / RESULTS).is_file():
        return path / RESULTS
    steps = RunPaths(path).evaluations.results_files()
    return steps[-1] if steps else None


def read_group(words: Sequence[str], first: Results | None = None) -> list[Replicate]:
    """The replicates that the words name, each once.

    Args:
        first: the results that all others have to be comparable with; by default the first of the group.

    Raises:
        ValueError: for results that are not comparable, or two of one model.
    """
    found = {file: Results.read(file) for word in words for file in results_files(word)}
    by_model: dict[str, Path] = {}
    for file, results in found.items():
        check_comparable(next(iter(found.values())) if first is None else first, results)
        model = weights_of(results) or results.id
        if model in by_model:
            raise ValueError(f"{file}: the same model as {by_model[model]}; allowed: each training once per group")
        by_model[model] = file
    references = _References()
    return [
        Replicate(file, results, seeds_of(file, results), _influences(file, results, references))
        for file, results in found.items()
    ]


def weights_of(results: Results) -> str | None:
    """The hash of the model that drew the samples; None for given images."""
    return str(results.samples["checkpoint"]["sha256"]) if results.generated else None


def check_comparable(a: Results, b: Results) -> None:
    """Raises ValueError for results against different references, or with different settings of the scores."""
    pairs = {"": (a.reference, b.reference)}
    for name in a.representations.keys() & b.representations.keys():
        pairs[f" of {name}"] = a.representations[name].reference, b.representations[name].reference
    for network, (left, right) in pairs.items():
        for what, key in (("reference", "data"), ("extractor", "extractor")):
            if left.get(key) != right.get(key):
                raise ValueError(f"{what}{network}: {left.get(key)} and {right.get(key)}; allowed: the same for both")
    if a.metrics != b.metrics:
        raise ValueError(f"metrics: {a.metrics} and {b.metrics}; allowed: the same for both")


class _References:
    """References from the cache, each read once. file: the results that need them."""

    def __init__(self) -> None:
        self._known: dict[Path, Reference] = {}

    def read(self, cached: Path, provenance: dict[str, Any], file: Path) -> Reference:
        if not cached.is_file():
            raise ValueError(f"{file}: its reference {cached} is not in the cache any more; score it again")
        if cached not in self._known:
            self._known[cached] = read_reference(cached, provenance)
        return self._known[cached]


def _influences(file: Path, results: Results, references: _References) -> dict[str, Influence]:
    """How each image moves each score: of the main network, then of each further one, then FDr."""
    cached = Path(results.run.reference)
    folder = _features(file, file.parent, results.run.features, results.samples)
    found = _of_network(folder, references.read(cached, results.reference, file), results)
    distances = {str(results.extractor): found["fid"]}
    for name, further in results.representations.items():
        reference = references.read(cached_file(cached.parent, further.reference), further.reference, file)
        settings = {**results.samples, "extractor": further.extractor}
        folder = _features(file, further_features(file.parent, name), further.features, settings)
        own = _of_network(folder, reference, results)
        distances[name] = own["fid"]
        found |= {further_key(key, name): influence for key, influence in own.items()}
    if results.scores.fdr is not None and results.validation is not None:
        shares = {name: 1 / len(distances) / results.validation.fd[name] for name in distances}
        moved = torch.stack([shares[name] * influence.per_image for name, influence in distances.items()]).sum(0)
        found["fdr"] = Influence(results.scores.fdr, moved)
    return found


def _of_network(folder: Path, reference: Reference, results: Results) -> dict[str, Influence]:
    samples = read_features(open_features(folder))
    made = {
        score.key: score.influence(samples, reference, results.metrics)
        for score in SCORES
        if score.influence is not None
    }
    return {key: found for key, found in made.items() if found is not None}


def _features(file: Path, beside: Path, recorded: str, settings: Mapping[str, Any]) -> Path:
    """The folder of features with these settings: beside the results in `file`, or at the recorded path."""
    for folder in (beside, Path(recorded)):
        if (folder / "config.json").is_file() and read_json(folder / "config.json") == settings:
            return folder
    raise ValueError(f"{file}: its features of {settings['extractor']} are neither beside it nor at {recorded}")


def seeds_of(file: Path, results: Results) -> Seeds | None:
    """The seeds of the training: of the run folder that has the results, or of the exported file that drew the samples.

    None if neither is here.
    """
    for folder in file.parents[1:4]:
        recipe = RunPaths(folder).recipe_file
        if recipe.is_file():
            return _seeds(config.tree(recipe))
    exported = results.run.checkpoint
    if exported is not None and Path(exported).is_file():
        return _seeds(read_note(Path(exported))["recipe"])
    return None


def _seeds(recipe: Mapping[str, Any]) -> Seeds:
    seed = recipe.get("seed", 0)
    parts = {part: seed.get(part, 0) for part in SEED_PARTS} if isinstance(seed, Mapping) else None
    return Seeds(**parts) if parts is not None else Seeds.of(seed)


# ------------------------------------------------------------------------------------------------- of one score


def values(group: Group, key: str) -> list[float]:
    """The score of each replicate."""
    return [replicate.influences[key].value for replicate in group]


def gram(group: Group, key: str) -> Tensor:
    """The covariance of the sampling errors of a score: (n, n). Reference images are the same for all."""
    found = [replicate.influences[key] for replicate in group]

    def same_images(one: int, other: int) -> bool:
        return found[one].of_reference or group[one].same_images(group[other])

    return sampling_gram([influence.per_image for influence in found], same_images)


def common_scores(*groups: Group) -> list[str]:
    """The keys of the scores that all replicates have, in the order of the first."""
    everyone = [replicate for group in groups for replicate in group]
    return [key for key in everyone[0].influences if all(key in replicate.influences for replicate in everyone)]


def in_order_of_seeds(a: Group, b: Group) -> tuple[Group, Group] | None:
    """Both groups in one order of their seeds, if each has the same seeds, all different; None otherwise."""
    sides = [{replicate.seeds: replicate for replicate in group} for group in (a, b)]
    if None in sides[0] or sides[0].keys() != sides[1].keys() or len(sides[0]) < max(len(a), len(b), 2):
        return None
    order = list(sides[0])
    return [sides[0][seeds] for seeds in order], [sides[1][seeds] for seeds in order]
