"""Images from an exported file: `sfd_scale.load` in Python, and `sfd sample`."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from sfd_scale import checkpoint, config
from sfd_scale.checkpoint import WEIGHTS
from sfd_scale.data.image_files import require_picture
from sfd_scale.diffusion.conditioning import Conditioning
from sfd_scale.diffusion.guidance import (
    AutoGuidance,
    ClassifierFreeGuidance,
    GuidanceConfig,
    InternalGuidance,
    NoGuidance,
    guided,
    interval_discontinuities,
)
from sfd_scale.diffusion.latents import LatentLayout, LatentStats
from sfd_scale.diffusion.sampler import Sampler
from sfd_scale.diffusion.samplers import SamplerConfig, Solver, solver_settings
from sfd_scale.diffusion.schedule import SemanticFirstSchedule
from sfd_scale.export import EXPORT_KEY, TEXTURE, carried_codec, read_note, require_note
from sfd_scale.models import attention
from sfd_scale.recipe import TrainRecipe
from sfd_scale.runtime import distributed
from sfd_scale.runtime.files import atomically
from sfd_scale.runtime.limits import download
from sfd_scale.runtime.matmul import bf16_matmul_on_cpu
from sfd_scale.runtime.progress import ProgressBar, progress
from sfd_scale.tasks import diffusion_task
from sfd_scale.tasks.diffusion import DiffusionModel, DiffusionTask
from sfd_scale.tasks.task import meta_model
from sfd_scale.tokenizers.make import TextureConfig, make_texture
from sfd_scale.tokenizers.protocols import TextureCodec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A trained model, with the codec, statistics and schedule that turn its latents into images."""

    model: DiffusionModel
    layout: LatentLayout
    schedule: SemanticFirstSchedule
    stats: LatentStats
    decode: Callable[[Tensor], Tensor]
    conditioning: Conditioning
    null_trained: bool  # whether training dropped conditions; classifier-free guidance needs it
    provenance: dict[str, Any]
    internal: bool = False  # whether the model has an internal layer; Internal Guidance needs it


def load_for_sampling(path: Path, device: torch.device) -> Loaded:
    """The model of an exported file, in eval mode, with the texture codec of its data.

    Raises:
        ValueError: if the file is not an export of a diffusion run, or its data was encoded with another codec.
    """
    note = read_note(path)
    recipe = config.from_dict(TrainRecipe, note["recipe"], str(path))
    try:
        task = diffusion_task(recipe)
    except ValueError as error:
        raise ValueError(f"{path}: images cannot be drawn from it: {error}") from error
    if "stats" not in note:
        raise ValueError(f"{path}: it has no latent statistics; import it again with --stats")
    require_note(note, path, {"recipe_digest": str, "step": int, "stats": dict, "stats_hash": str, "tokenizers": dict})
    if recipe.tokenizer.texture is None:
        raise ValueError(f"{path}: its recipe has no tokenizer.texture, which decodes latents to images")
    weights = checkpoint.load_weights(path)
    _check_size(path, task, sum(weight.numel() for weight in weights.values()))
    model = task.make_model()
    checkpoint.load_whole(model, weights, path)
    texture = _texture_codec(path, note, recipe.tokenizer.texture, device)
    if texture.fingerprint not in note["tokenizers"].values():
        raise ValueError(
            f"{path}: tokenizer.texture: {texture.fingerprint}, but the training data was encoded with "
            f"{note['tokenizers']}; give the run that tokenizer.texture, start it once more, which trains no further "
            "step, and export again"
        )
    stats = LatentStats(*(torch.tensor(note["stats"][key], dtype=torch.float64) for key in ("mean", "std")))

    def decode(latents: Tensor) -> Tensor:
        return texture.decode(recipe.latents.split(latents)[0])

    return Loaded(
        model.to(device).eval(), recipe.latents, recipe.schedule, stats, decode, task.model.conditioning,
        task.loss.label_dropout > 0,
        {key: note[key] for key in ("recipe_digest", "step", "stats_hash")} | {"name": recipe.name},
        task.model.internal_depth is not None,
    )  # fmt: skip


def _check_size(path: Path, task: DiffusionTask, stored: int) -> None:
    """Refuse a recipe whose model is larger than the weights in the file, before it takes memory.

    Raises:
        ValueError: names the file.
    """
    wanted = sum(parameter.numel() for parameter in meta_model(task).parameters() if parameter.requires_grad)
    if wanted > stored:
        raise ValueError(
            f"{path}: its weights do not fit the model and latents of its recipe: missing weights, {stored:,} values "
            f"of {wanted:,}"
        )


def _texture_codec(path: Path, note: Mapping[str, Any], settings: TextureConfig, device: torch.device) -> TextureCodec:
    """The texture codec: of the recipe's file, of the file beside the export, or of the export's own note."""
    if settings.weights is None or settings.weights.exists():
        return make_texture(settings, device)
    beside = path.with_name(TEXTURE)
    if beside.is_file():
        return make_texture(dataclasses.replace(settings, weights=beside), device)
    carried = carried_codec(note, path)
    if carried is None:
        return make_texture(settings, device)  # which says that the file is missing
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / TEXTURE
        file.write_bytes(carried)
        return make_texture(dataclasses.replace(settings, weights=file), device)


@dataclass(frozen=True)
class Output:
    """images: a list of N PIL images, or (N, 3, H, W) uint8 on the CPU. labels: (N,) int64. seed: of the noise."""

    images: Any
    labels: Tensor
    seed: int


class Pipeline:
    """Draws images from a trained model. `load` makes it.

    Image i of a call depends on the weights, `seed`, i, its label, the sampler and the batch size, and on nothing else:
    there is no generator to reset.
    """

    def __init__(self, loaded: Loaded, guide: Loaded | None, device: torch.device) -> None:
        self.loaded, self.guide, self.device = loaded, guide, device

    @property
    def num_classes(self) -> int:
        return self.loaded.conditioning.num_classes

    def __call__(
        self,
        labels: Sequence[int] | int | None = None,
        *,
        count: int | None = None,
        guidance: float | Sequence[float] | GuidanceConfig = 1.0,
        steps: int = 50,
        solver: Solver = "euler",
        seed: int = 0,
        batch: int = 16,
        output: Literal["pil", "tensor"] = "pil",
        show_progress: bool = True,
    ) -> Output:
        """Draw images.

        Args:
            labels: the class of each image, or one class for all; all classes in turn by default.
            count: number of images; by default that of `labels`, or one of each class, at most 16.
            guidance: the scale, or one for texture and one for semantics; 1 is no guidance. With a guidance model it is
                AutoGuidance (arXiv 2406.02507), otherwise classifier-free guidance (arXiv 2207.12598). A settings class
                of `diffusion.guidance` also gives an interval.
            steps: of a fixed-step solver; dopri5 chooses its own.
            batch: images at once. Another batch size can change the last bits of an image.
            output: "pil" or "tensor".
            show_progress: show a bar on a terminal.

        Raises:
            ValueError: for a class that the model lacks, or guidance that it does not support.
        """
        chosen = self.labels(labels, count)
        config = self.guidance_of(guidance)
        solution = solver_settings(solver, steps)
        batch = min(batch, len(chosen))
        images = []
        with bf16_matmul_on_cpu(self.device), _bar(len(chosen), show_progress) as bar:
            sampler = self.sampler(config, solution, seed, batch)
            for start in range(0, len(chosen), batch):
                part = self.loaded.conditioning.given(chosen[start : start + batch])
                images.append(sampler.images(range(start, start + len(part)), part).images.cpu())
                bar.advance(len(part))
        drawn = torch.cat(images)
        if output == "tensor":
            return Output(drawn, chosen, seed)
        from PIL import Image

        return Output([Image.fromarray(image.permute(1, 2, 0).numpy()) for image in drawn], chosen, seed)

    def labels(self, labels: Sequence[int] | int | None, count: int | None) -> Tensor:
        """The label of each image, as in a call: (count,) int64."""
        conditioning = self.loaded.conditioning
        if count is not None and count < 1:
            raise ValueError(f"count: {count}; allowed: 1 and up")
        if labels is None:
            return conditioning.in_turn(min(self.num_classes, 16) if count is None else count)
        try:
            given = torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError):
            given = torch.empty(0)
        if given.ndim > 1 or given.is_floating_point() or given.numel() == 0:
            raise ValueError(f"labels: {labels!r}; allowed: a class index, or a list of them, not empty")
        chosen = (given.expand(count or 1) if given.ndim == 0 else given).long()
        if count is not None and count != len(chosen):
            raise ValueError(f"count: {count}, with {len(chosen)} labels; allowed: one of the two, or one label")
        conditioning.check(chosen, "labels")
        return chosen

    def guidance_of(self, scale: float | Sequence[float] | GuidanceConfig) -> GuidanceConfig:
        """The settings of a scale: AutoGuidance with a guidance model, otherwise classifier-free guidance.

        Raises:
            ValueError: for anything but a number, two of them, or settings.
        """
        if isinstance(scale, NoGuidance | ClassifierFreeGuidance | AutoGuidance | InternalGuidance):
            return scale
        try:
            texture, semantic = map(float, scale) if isinstance(scale, Sequence) else (float(scale), float(scale))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"guidance: {scale!r}; allowed: a number, two as in (1.5, 2.5) for texture and semantics, or settings "
                "of sfd_scale.diffusion.guidance"
            ) from error
        if texture == 1 and semantic == 1:
            return NoGuidance()
        kind = ClassifierFreeGuidance if self.guide is None else AutoGuidance
        return kind(scale_texture=float(texture), scale_semantic=float(semantic))

    def sampler(self, guidance: GuidanceConfig, solver: SamplerConfig, seed: int, batch: int) -> Sampler:
        """The sampler of this model, for batches of `batch` images."""
        loaded = self.loaded
        guide = self.guide.model if self.guide is not None and not isinstance(guidance, NoGuidance) else None
        conditioning = loaded.conditioning if loaded.null_trained else None
        return Sampler(
            velocity=guided(
                loaded.model, guidance, loaded.layout, guide=guide, conditioning=conditioning, internal=loaded.internal
            ),
            layout=loaded.layout, schedule=loaded.schedule, config=solver, stats=loaded.stats, decode=loaded.decode,
            seed=seed, batch=batch, device=self.device,
            discontinuities=interval_discontinuities(guidance, loaded.schedule),
        )  # fmt: skip


def load(
    source: str | Path,
    *,
    guide: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Pipeline:
    """A pipeline that draws images, from a trained model.

    Args:
        source: a file of `sfd export`, a folder of `sfd export --hub-folder`, or the id of such a folder on the Hugging
            Face hub, such as "owner/name".
        guide: the guidance model (AutoGuidance), given in the same way.
        device: by default the GPU, or the CPU where there is none.
        dtype: of the model; latents stay in float32.

    Raises:
        ValueError: if a source is missing or damaged, or the guidance model does not fit.
    """
    on = distributed.device() if device is None else torch.device(device)
    if on.type == "cuda":
        attention.activate("auto", on, dtype=dtype)
    found = [load_for_sampling(_weights_of(file), on) for file in (source, guide) if file is not None]
    for part in found:
        part.model.repa_projector = None  # of the training alone
        part.model.to(dtype)
    worse = found[1] if len(found) > 1 else None
    if worse is not None:
        check_guidance_model(found[0], worse)
    return Pipeline(found[0], worse, on)


class SFDModel(nn.Module, PyTorchModelHubMixin, library_name="sfd-scale"):
    """A trained velocity model, with `from_pretrained`, `save_pretrained` and `push_to_hub` of the Hugging Face hub.

    `load` draws images; this class is for code of your own. The files are those of `sfd export --hub-folder`.
    """

    def __init__(self, note: dict[str, Any]) -> None:
        super().__init__()
        self.note = note
        self.model = diffusion_task(config.from_dict(TrainRecipe, note["recipe"])).make_model()

    def forward(self, x: Tensor, t_texture: Tensor, t_semantic: Tensor, y: Tensor) -> Tensor:
        """Latents (N, C, H, W), clocks (N,) and labels (N,) → velocity (N, C, H, W)."""
        velocity: Tensor = self.model(x, t_texture, t_semantic, y)[0]
        return velocity

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **_: Any) -> SFDModel:  # type: ignore[override]
        file = _weights_of(model_id)
        model = cls(read_note(file))
        checkpoint.load_whole(model.model, checkpoint.load_weights(file), file)
        return model.eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        weights = {name: value.detach() for name, value in self.model.named_parameters()}
        checkpoint.save_weights(weights, save_directory / WEIGHTS, {EXPORT_KEY: json.dumps(self.note)})


def check_guidance_model(loaded: Loaded, guide: Loaded, allow_stats_mismatch: bool = False) -> None:
    """Refuse a guidance model (AutoGuidance) that was trained on other latents or another schedule.

    Args:
        allow_stats_mismatch: accept other latent statistics, with a warning.

    Raises:
        ValueError: naming what differs.
    """
    pairs = {
        "latent layout": (loaded.layout, guide.layout),
        "hash of the latent statistics": (loaded.stats.hash, guide.stats.hash),
        "schedule": (loaded.schedule, guide.schedule),
        "conditioning": (loaded.conditioning, guide.conditioning),
    }
    for what, (own, other) in pairs.items():
        if own != other and "statistics" in what and allow_stats_mismatch:
            logger.warning("guide: its %s is %s, the checkpoint's is %s", what, other, own)
        elif own != other:
            hint = ", or allow_stats_mismatch=true" if "statistics" in what else ""
            raise ValueError(f"guide: its {what} is {other}, the checkpoint's is {own}; allowed: the same{hint}")


def _weights_of(source: str | Path) -> Path:
    """The weights file of a source of `load`."""
    path = Path(source)
    if path.is_dir():
        return path / WEIGHTS
    if path.suffix == ".safetensors" or path.exists() or str(source).count("/") != 1:
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    def get() -> str:
        return snapshot_download(str(source), allow_patterns=["*.safetensors", "*.yaml", "*.json"])

    try:
        return Path(download(f"{source}", get)) / WEIGHTS
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(f"{source}: no such file or folder here, and not on the Hugging Face hub: {error}") from error


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[ProgressBar]:
    if shown:
        with progress(total, "sampling", "images") as bar:
            yield bar
    else:
        yield ProgressBar(total, "sampling", "images", None, quiet=True)


def sample_grid(
    checkpoint_file: Path,
    out: Path,
    *,
    count: int,
    label: int | None,
    steps: int,
    seed: int,
    guidance: float | tuple[float, float] = 1.0,
    guide: Path | None = None,
    solver: Solver = "euler",
    columns: int | None = None,
) -> Path:
    """Draw a PNG grid of images; see `Pipeline`.

    Args:
        label: one class; all classes in turn if None.
        columns: of the grid; a square by default.

    Raises:
        ValueError: as for `load` and a call of the pipeline, and for an `out` that is no picture.
    """
    require_picture(out)
    pipeline = load(checkpoint_file, guide=guide)
    if label is not None:
        pipeline.loaded.conditioning.check(torch.tensor([label]), "--label")
    images = pipeline(
        label, count=count, guidance=guidance, steps=steps, solver=solver, seed=seed, batch=count, output="tensor"
    ).images
    from torchvision.utils import save_image  # a slow import: it loads the compiler

    with atomically(out) as temporary:
        save_image(images.float() / 255, str(temporary), nrow=columns or math.isqrt(count - 1) + 1)
    logger.info("%s: %d images", out, count)
    return out


if __name__ == "__main__":
    from sfd_scale.__main__ import main

    main("sample")
