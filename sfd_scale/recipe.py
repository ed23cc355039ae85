"""The typed recipes, and the checks that need more than one field.

A component's settings are the dataclass beside its class; here they are only composed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sfd_scale.checkpoint import CheckpointConfig
from sfd_scale.data.convert import ConvertConfig
from sfd_scale.data.dataloader import DataConfig
from sfd_scale.data.encode import StoreConfig
from sfd_scale.data.sources import SourceConfig
from sfd_scale.diffusion.latents import LatentLayout
from sfd_scale.diffusion.schedule import SemanticFirstSchedule
from sfd_scale.engines.deepspeed import DeepSpeedConfig
from sfd_scale.engines.ema import EMAConfig
from sfd_scale.engines.fsdp import FSDPConfig
from sfd_scale.engines.muon import MuonConfig, refuse_offload
from sfd_scale.engines.optim import AdamWConfig, ScheduleConfig
from sfd_scale.models.attention import AttentionBackend
from sfd_scale.runtime.profiling import ProfileConfig
from sfd_scale.runtime.seeds import Seeds
from sfd_scale.runtime.settings import NoEffectOnResults, at_least
from sfd_scale.tasks import ModelConfig, ObjectiveConfig, task_of
from sfd_scale.tasks.task import Task
from sfd_scale.tokenizers.make import CompositeConfig
from sfd_scale.tokenizers.patch_pca import PatchPCAFitConfig
from sfd_scale.tokenizers.pca import FeaturePCAFitConfig
from sfd_scale.training.divergence import DivergenceConfig
from sfd_scale.training.metrics import TrainingMetricsConfig
from sfd_scale.training.metrics_writer import WandbConfig
from sfd_scale.training.trainer import TrainerConfig


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Initial weights of a new run, which has a new optimizer and step 0. A run with checkpoints resumes from them.

    path: a run folder, one of its checkpoints, a file of `sfd export`, or a folder of `--hub-folder`.
    """

    path: Path
    weights: Literal["ema", "params"] = "ema"  # EMA or plain weights; an exported file holds only one of them


@dataclass(frozen=True, kw_only=True)
class TrainRecipe:
    """All settings of a training run."""

    kind: Literal["train"] = "train"
    name: NoEffectOnResults[str]
    model: ModelConfig
    objective: ObjectiveConfig
    data: DataConfig
    train: TrainerConfig
    published: NoEffectOnResults[str | None] = None  # the published score of this run, with its source
    seed: int | Seeds = 0  # one number is the seed of all three parts
    run: NoEffectOnResults[Path] = Path("runs/train")
    latents: LatentLayout = field(default_factory=LatentLayout)
    schedule: SemanticFirstSchedule = field(default_factory=SemanticFirstSchedule)
    tokenizer: CompositeConfig = field(default_factory=CompositeConfig)
    attention: AttentionBackend = "auto"
    optimizer: AdamWConfig | MuonConfig = field(default_factory=AdamWConfig)
    lr: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    init_from: InitConfig | None = None
    engine: DeepSpeedConfig | FSDPConfig = field(default_factory=FSDPConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: NoEffectOnResults[TrainingMetricsConfig] = field(default_factory=TrainingMetricsConfig)
    profile: NoEffectOnResults[ProfileConfig] = field(default_factory=ProfileConfig)
    divergence: DivergenceConfig = field(default_factory=DivergenceConfig)
    wandb: NoEffectOnResults[WandbConfig] = field(default_factory=WandbConfig)
    tensorboard: NoEffectOnResults[bool] = False  # event files beside metrics.jsonl; needs the extra of that name

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", self.seeds.shortest)
        self.task.check()
        if isinstance(self.engine, DeepSpeedConfig):
            refuse_offload(self.optimizer, "offload_optimizer", self.engine.offload_optimizer)
        else:
            refuse_offload(self.optimizer, "cpu_offload", self.engine.cpu_offload)

    @property
    def seeds(self) -> Seeds:
        """The seeds of initial weights, data and noise."""
        return Seeds.of(self.seed)

    @property
    def task(self) -> Task:
        """The kind of this run; everything that depends on the kind is asked of it."""
        return task_of(self)


@dataclass(frozen=True, kw_only=True)
class EncodeRecipe:
    """Encode images to shards."""

    kind: Literal["encode"] = "encode"
    name: NoEffectOnResults[str]
    source: SourceConfig
    out: NoEffectOnResults[Path]
    store: StoreConfig = field(default_factory=StoreConfig)
    tokenizer: CompositeConfig = field(default_factory=CompositeConfig)
    latents: LatentLayout = field(default_factory=LatentLayout)

    def __post_init__(self) -> None:
        if self.store.latents == "none":
            return
        if self.tokenizer.texture is None:
            raise ValueError("tokenizer.texture: null; name a texture codec, or set store.latents=none")
        if self.tokenizer.semantic is None and self.latents.semantic_channels:
            raise ValueError(
                "tokenizer.semantic: null; name a semantic codec, or set latents.semantic_channels=0 and store texture "
                "alone"
            )


@dataclass(frozen=True, kw_only=True)
class FitRecipe:
    """Fit a codec in closed form to the first `num_images` images of a source.

    codec: a PCA of patches, or of the features of tokenizer.vision.
    """

    kind: Literal["fit"] = "fit"
    name: NoEffectOnResults[str]
    source: SourceConfig
    codec: PatchPCAFitConfig | FeaturePCAFitConfig
    out: NoEffectOnResults[Path]
    tokenizer: CompositeConfig = field(default_factory=CompositeConfig)
    num_images: int = 4096
    batch: int = 256
    num_workers: NoEffectOnResults[int] = 0

    def __post_init__(self) -> None:
        at_least(self, num_images=1, batch=1, num_workers=0)
        if self.tokenizer.vision is None and isinstance(self.codec, FeaturePCAFitConfig):
            raise ValueError("tokenizer.vision: null; a PCA of features needs a vision encoder")
        if self.tokenizer.vision is None and isinstance(self.codec, PatchPCAFitConfig) and self.codec.alignment:
            raise ValueError("tokenizer.vision: null; codec.alignment above 0 needs a vision encoder")


@dataclass(frozen=True, kw_only=True)
class ConvertRecipe:
    """Convert the feature files of the official code to shards."""

    kind: Literal["convert"] = "convert"
    name: NoEffectOnResults[str]
    convert: ConvertConfig
    out: NoEffectOnResults[Path]


KINDS: dict[str, type] = {"train": TrainRecipe, "encode": EncodeRecipe, "fit": FitRecipe, "convert": ConvertRecipe}
