"""The recipe of an evaluation: checkpoint, sampler, guidance, feature extractor, reference and scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from eval.features.config import ExtractorConfig, ExtractorName, InceptionConfig
from eval.features.presets import by_name, named, short_name
from eval.images.outputs import OutputsConfig
from eval.images.sources import ImagesConfig
from eval.metrics.config import MetricsConfig
from sfd_scale import recipe as training
from sfd_scale.diffusion.fixed_step import FixedStepConfig
from sfd_scale.diffusion.guidance import AutoGuidance, GuidanceConfig, NoGuidance
from sfd_scale.diffusion.samplers import SamplerConfig
from sfd_scale.models.attention import AttentionBackend
from sfd_scale.runtime.settings import NoEffectOnResults, at_least


@dataclass(frozen=True, kw_only=True)
class BalancedLabels:
    """Every class equally often, in shuffled order: the protocol of most papers."""

    kind: Literal["balanced"] = "balanced"


@dataclass(frozen=True, kw_only=True)
class IidLabels:
    """Independent uniform labels."""

    kind: Literal["iid"] = "iid"


@dataclass(frozen=True, kw_only=True)
class FixedLabel:
    """One class for every image."""

    label: int
    kind: Literal["fixed"] = "fixed"


@dataclass(frozen=True, kw_only=True)
class LabelFile:
    """A text file with one label per line."""

    path: Path
    kind: Literal["file"] = "file"


LabelsConfig = BalancedLabels | IidLabels | FixedLabel | LabelFile


@dataclass(frozen=True, kw_only=True)
class EvalRecipe:
    """An evaluation: which model draws which images, and what their features are scored against.

    checkpoint, guide: files of `sfd export`; `guide` is the guidance model of AutoGuidance.
    published: the number that the evaluation is to reach, and its source.
    allow_stats_mismatch: accept a guidance model that was trained with other latent statistics.
    precision: of the model. The official code samples with tf32: float32 with TF32 matmuls on the GPU.
    batch: independent of the number of ranks, because it changes the last bits of an image. `auto` takes the largest
        that fits the memory of all GPUs at the first start, and records it.
    decode_batch: how many latents are decoded at once; null: all of a batch.
    extractor: the main representation, whose scores every table shows.
    extractors: all representations that are scored, each with its own features and statistics. The main one may stand
        among them. A name stands for a network of `features.presets`.
    extractor_weights: the folder with the weights of named networks, such as dinov2_l.safetensors.
    references: the references of single extractors by name, in place of `reference`; their statistics may be of that
        network.
    validation: FD of the validation set for each network, by which FD is divided for FDr: the numbers of FD-loss
        (`published`), or a file of `eval validation`. Null: no FDr.
    cuda_graphs: replay the forward passes of full batches from CUDA graphs. This helps small models and small batches,
        where launching kernels takes longer than running them.
    """

    kind: Literal["eval"] = "eval"
    name: NoEffectOnResults[str] = "eval"
    published: NoEffectOnResults[str | None] = None
    checkpoint: Path | None = None
    guide: Path | None = None
    allow_stats_mismatch: bool = False
    sampler: SamplerConfig = field(default_factory=FixedStepConfig)
    guidance: GuidanceConfig = field(default_factory=NoGuidance)
    num_samples: int = 50_000
    batch: int | Literal["auto"] = 64
    decode_batch: int | None = None
    seed: int = 0
    labels: LabelsConfig = field(default_factory=BalancedLabels)
    precision: Literal["bf16", "tf32", "fp32"] = "bf16"
    attention: AttentionBackend = "auto"
    compile: bool = False
    cuda_graphs: bool = False
    extractor: ExtractorConfig = field(default_factory=InceptionConfig)
    extractors: tuple[ExtractorConfig | ExtractorName, ...] = ()
    extractor_weights: NoEffectOnResults[Path | None] = None
    extractor_batch: int = 64
    reference: ImagesConfig | None = None
    references: dict[str, ImagesConfig] = field(default_factory=dict)
    validation: Path | Literal["published"] | None = None
    cache: NoEffectOnResults[Path] = Path("runs/eval-cache")
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    outputs: NoEffectOnResults[OutputsConfig] = field(default_factory=OutputsConfig)

    def further_extractors(self) -> Mapping[str, ExtractorConfig]:
        """The extractors beside the main one, by name.

        Raises:
            ValueError: if the weights of a named network are missing.
        """
        main = short_name(self.extractor)
        listed = [given for given in self.extractors if given not in (main, self.extractor)]
        further = [by_name(given, self.extractor_weights) if isinstance(given, str) else given for given in listed]
        return dict(list(named([self.extractor, *further]).items())[1:])

    def reference_of(self, name: str | None) -> ImagesConfig | None:
        """The reference of a further extractor, or of the main one (None)."""
        return self.reference if name is None else self.references.get(name, self.reference)

    def __post_init__(self) -> None:
        at_least(self, num_samples=2, batch=1, decode_batch=1, extractor_batch=1)
        if isinstance(self.guidance, AutoGuidance) and self.guide is None:
            raise ValueError("guide: null, with guidance kind autoguidance; allowed: a file of `sfd export`")
        if self.guide is not None and not isinstance(self.guidance, AutoGuidance):
            raise ValueError(f"guide: {self.guide}, which guidance kind {self.guidance.kind} ignores; allowed: null")


KINDS: dict[str, type] = {**training.KINDS, "eval": EvalRecipe}
