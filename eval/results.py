"""results.json: the scores of one set of samples, and everything that determined them. results.jsonl: their table."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.images.proof import ImageProof
from eval.metrics.config import MetricsConfig
from eval.metrics.scores import Scores
from sfd_scale import config
from sfd_scale.runtime.files import read_json, read_text, write_json
from sfd_scale.runtime.run_paths import RESULTS, RunPaths

logger = logging.getLogger(__name__)
FORMAT = 1
# Image i of two sets has the same noise and label if these settings agree.
PAIRING = ("seed", "labels", "num_samples")


@dataclass(frozen=True, kw_only=True)
class ScoringRun:
    """When, where and from which files scores were computed. Nothing here changes a score.

    made_on: the machines that computed the features.
    reference_grid, grid: PNG files of real images and of samples. `reference_grid` is left out of the file if None.
    """

    finished: str
    seconds: float
    world_size: int
    made_on: tuple[str, ...]
    device: str
    samples: str
    features: str
    reference: str
    checkpoint: str | None
    reference_grid: str | None = None
    grid: str | None


@dataclass(frozen=True, kw_only=True)
class Representation:
    """The scores in the representation of one further network.

    extractor: its fingerprint. scores: `fid` is the Fréchet distance (FD) of its pooled features.
    reference: as in `Results`.
    features: the folder of its features.
    """

    extractor: str
    scores: Scores
    warnings: tuple[str, ...]
    reference: dict[str, Any]
    features: str


def further_key(key: str, extractor: str) -> str:
    """A score in the representation of a further network, as tables name it: the Fréchet distance is FD there."""
    return f"{'fd' if key == 'fid' else key} ({extractor})"


@dataclass(frozen=True, kw_only=True)
class ValidationFD:
    """FD of the validation set against the reference, by the name of the extractor: the unit of FDr.

    source: where the numbers are from.
    """

    source: str
    fd: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Results:
    """The contents of a results.json, in its order.

    id: hash of `samples`, of what determines the reference, and of `metrics`.
    nfe: mean number of function evaluations per sample; None for given images.
    samples: the config.json of their folder of features, unchanged. Its keys depend on `kind`, generated or extracted.
    reference: what determines the reference, and the numbers of its images.
    recipe_digest: hash of the evaluation recipe.
    proof: a few images as hashes, for `eval verify`; left out of the file if there are none.
    extractor: the short name of the main extractor. None in results of the first release.
    representations: the scores of the further extractors by name.
    validation: the numbers behind FDr; None: no FDr.
    """

    name: str
    id: str
    scores: Scores
    count: int
    nfe: float | None
    warnings: tuple[str, ...]
    samples: dict[str, Any]
    reference: dict[str, Any]
    metrics: MetricsConfig
    arithmetic: dict[str, Any]
    recipe_digest: str
    versions: dict[str, str | int | None]
    run: ScoringRun
    proof: tuple[ImageProof, ...] = ()
    extractor: str | None = None
    representations: dict[str, Representation] = field(default_factory=dict)
    validation: ValidationFD | None = None

    @classmethod
    def read(cls, path: Path) -> Results:
        """The results in a file, or in the results.json of a folder.

        Raises:
            ValueError: for a file that is missing or damaged, that is no results.json, or of a newer release.
        """
        file = path / RESULTS if path.is_dir() else path
        data = read_json(file)
        if not isinstance(data, dict) or not isinstance(data.get("format"), int) or data["format"] > FORMAT:
            raise ValueError(f"{file}: not a results.json of this release")
        try:
            found = config.from_dict(cls, {key: value for key, value in data.items() if key != "format"}, str(file))
        except config.ConfigError as error:
            raise ValueError(f"{file}: not a results.json of this release: {error}") from error
        if lacking := found.lacking():
            raise ValueError(f"{file}: not a results.json of this release: {', '.join(lacking)} missing")
        return found

    def lacking(self) -> list[str]:
        """What `samples` and `reference` lack, by dotted key. Their keys depend on the kind of the samples."""
        generated = self.samples.get("kind") == "generated"
        own_keys = ("checkpoint", "sampler", "guidance") if generated else ("images",)
        needed: dict[str, tuple[Any, tuple[str, ...]]] = {
            "samples": (self.samples, ("kind", "extractor", *own_keys)),
            "reference": (self.reference, ("data",)),
        }
        needed |= {
            f"representations.{name}.reference": (own.reference, ("data",))
            for name, own in self.representations.items()
        }
        for name, keys in (("checkpoint", ("name", "step", "sha256")), ("sampler", ("kind",)), ("guidance", ("kind",))):
            if name in self.samples:
                needed[f"samples.{name}"] = (self.samples[name], keys)
        return [
            f"{part}.{key}"
            for part, (found, keys) in needed.items()
            for key in keys
            if not isinstance(found, dict) or key not in found
        ]

    def write(self, path: Path) -> None:
        write_json(path, self.as_json())

    def as_json(self) -> dict[str, Any]:
        """The plain data of the file."""
        data: dict[str, Any] = {"format": FORMAT, **config.to_dict(self)}
        if self.run.reference_grid is None:
            del data["run"]["reference_grid"]
        # What an earlier release did not know is written only where it has a value.
        data["scores"] = self.scores.as_json()
        for name in self.scores.settings_left_out():
            del data["metrics"][name]
        if not self.proof:
            del data["proof"]
        for name, found in self.representations.items():
            data["representations"][name]["scores"] = found.scores.as_json()
        for name in ("extractor", "representations", "validation"):
            if not data[name]:
                del data[name]
        return data

    # -------------------------------------------------------------------------------------------- the samples

    @property
    def generated(self) -> bool:
        """Whether `eval generate` drew the samples. Otherwise they are images that were given."""
        return bool(self.samples["kind"] == "generated")

    @property
    def step(self) -> int:
        """The training step of the checkpoint that drew the samples."""
        assert self.generated
        return int(self.samples["checkpoint"]["step"])

    @property
    def title(self) -> str:
        """The model and its step, or the name of the folder or file of images."""
        if not self.generated:
            return Path(self.run.samples).name
        model = self.samples["checkpoint"]["name"]
        return f"{model}, untrained" if self.step == 0 else f"{model}, step {self.step:,}"

    @property
    def sampling(self) -> str:
        """Sampler, NFE and guidance in a few words."""
        if not self.generated:
            return "given images"
        sampler, guidance = self.samples["sampler"], self.samples["guidance"]
        steps = f" {sampler['num_steps']}" if "num_steps" in sampler else ""
        parts = [f"{sampler['kind']}{steps}", f"NFE {self.nfe:.0f}"]
        if guidance["kind"] == "none":
            parts.append("no guidance")
        else:
            parts.append(f"{guidance['kind']} {guidance['scale_texture']:g}/{guidance['scale_semantic']:g}")
        return ", ".join(parts)

    @property
    def weights_hash(self) -> str | None:
        """SHA-256 of the file of the weights that drew the samples; None for given images."""
        return str(self.samples["checkpoint"]["sha256"]) if self.generated else None

    # -------------------------------------------------------------------------------------------- the protocol

    @property
    def labels(self) -> str:
        """The label protocol. Balanced labels lower FID by about 0.1 on ImageNet (README of RAE)."""
        if not self.generated:
            return "of the given images"
        labels = self.samples.get("labels", {"kind": "unknown"})
        return " ".join(str(value) for value in labels.values())

    @property
    def evaluator(self) -> str:
        """The extractor of the main scores, and where a score is not computed as by default."""
        metrics = config.differences(config.to_dict(MetricsConfig()), config.to_dict(self.metrics))
        settings = [f"{name} {now}" for name, (_, now) in metrics.items() if name in ("frechet", "distances")]
        return ", ".join([str(self.samples["extractor"]), *settings])

    @property
    def fd(self) -> dict[str, float]:
        """FD by extractor, the main one first; empty if there is no further one."""
        if not self.representations or self.extractor is None:
            return {}
        found = {self.extractor: self.scores.fid, **{name: r.scores.fid for name, r in self.representations.items()}}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def fd_ratios(self) -> dict[str, float]:
        """FD over that of the validation set (FDr, arXiv 2604.28190), by extractor; empty without such numbers."""
        known = {} if self.validation is None else self.validation.fd
        own = self.fd or (
            {} if self.extractor is None or self.scores.fid is None else {self.extractor: self.scores.fid}
        )
        return {name: value / known[name] for name, value in own.items() if name in known}

    def paired_with(self, other: Results) -> bool:
        """Whether image i of both has the same noise and label."""
        if not (self.generated and other.generated):
            return False
        return all(key in self.samples and self.samples[key] == other.samples.get(key) for key in PAIRING)


def results_of_run(run: Path, recipe_digest: str) -> list[tuple[Path, Results]]:
    """All results whose samples were drawn from weights of a run, by steps.

    They are those of `eval watch` inside the run, and those of `eval score` in the folders beside the run.

    Args:
        recipe_digest: of the run's recipe, as its exported files record it.

    Raises:
        ValueError: see `Results.read`, for results inside the run. A damaged file beside it is left out with a warning.
    """
    found = [(file, Results.read(file)) for file in RunPaths(run).evaluations.results_files()]
    found = [(file, result) for file, result in found if result.generated]
    for file in sorted(run.resolve().parent.glob(f"*/{RESULTS}")):
        try:
            result = Results.read(file)
        except ValueError as error:
            logger.warning("%s; it is left out", error)
            continue
        if result.generated and result.samples["checkpoint"].get("recipe_digest") == recipe_digest:
            found.append((file, result))
    return sorted(found, key=lambda pair: pair[1].step)


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """One line of results.jsonl, the table of the scored checkpoints of a run.

    labels, reference, evaluator: the protocol of the scores; None in lines of the first release.
    fd: FD by extractor, if there are several.
    """

    step: int
    scores: Scores
    count: int
    nfe: float | None
    name: str
    id: str
    labels: str | None = None
    reference: str | None = None
    evaluator: str | None = None
    fd: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, results: Results) -> ScoreRow:
        return cls(
            step=results.step, scores=results.scores, count=results.count, nfe=results.nfe, name=results.name,
            id=results.id, labels=results.labels, reference=str(results.reference["data"]),
            evaluator=results.evaluator, fd=results.fd,
        )  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """The plain data of the line; the scores stand beside the other values."""
        data = config.to_dict(self)
        del data["scores"]
        for key in ("labels", "reference", "evaluator", "fd"):
            if not data[key]:
                del data[key]
        return {"step": data.pop("step"), **self.scores.as_json(), **data}


def read_table(path: Path) -> list[ScoreRow]:
    """The lines of a results.jsonl; none, if there is no such file.

    Raises:
        ValueError: for a line that is damaged.
    """
    if not path.is_file():
        return []
    keys = Scores().by_key().keys()
    found = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        try:
            data = json.loads(line)
            scores = {key: data.pop(key) for key in keys if key in data}
            found.append(config.from_dict(ScoreRow, {**data, "scores": scores}, str(path)))
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{path}: line {number} is no line of a results.jsonl: {error}") from error
    return found
