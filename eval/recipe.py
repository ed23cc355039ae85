"""The recipe of an evaluation: what is drawn from which checkpoint, through which features, against what."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from eval.features.config import ExtractorConfig, InceptionConfig
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
    """Every class as often as the others, shuffled: the protocol of most papers."""

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
    """A text file with one label a line."""

    path: Path
    kind: Literal["file"] = "file"


LabelsConfig = BalancedLabels | IidLabels | FixedLabel | LabelFile


@dataclass(frozen=True, kw_only=True)
class EvalRecipe:
    """`checkpoint` and `guide` are files of `sfd export`.

    precision: of the model. tf32, float32 with a GPU's TF32 products, is what the authors draw with.
    batch: fixed, whatever the number of ranks: it is part of what determines an image to the last bit. `auto` takes
        what fits the GPUs' memory at the first start and keeps it.
    decode_batch: latents that the codec decodes at once; null for all of a batch.
    cuda_graphs: replay the forward passes of whole batches from CUDA graphs, which helps where launching kernels takes
        longer than running them: small models, small batches.
    """

    kind: Literal["eval"] = "eval"
    name: NoEffectOnResults[str] = "eval"
    published: NoEffectOnResults[str | None] = None  # the number that the evaluation is to reach, and whose it is
    checkpoint: Path | None = None
    guide: Path | None = None
    allow_stats_mismatch: bool = False  # of the latents that checkpoint and guide were trained on
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
    extractor_batch: int = 64
    reference: ImagesConfig | None = None
    cache: NoEffectOnResults[Path] = Path("runs/eval-cache")
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    outputs: NoEffectOnResults[OutputsConfig] = field(default_factory=OutputsConfig)

    def __post_init__(self) -> None:
        at_least(self, num_samples=2, batch=1, decode_batch=1, extractor_batch=1)
        if isinstance(self.guidance, AutoGuidance) and self.guide is None:
            raise ValueError("guide: null, with guidance kind autoguidance; allowed: an exported checkpoint")
        if self.guide is not None and not isinstance(self.guidance, AutoGuidance):
            raise ValueError(f"guide: {self.guide}, which guidance kind {self.guidance.kind} ignores; allowed: null")


KINDS: dict[str, type] = {**training.KINDS, "eval": EvalRecipe}
