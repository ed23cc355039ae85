"""Draw the images of a recipe on all ranks, and keep their features (and, if asked, the images)."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from eval.features.extract import extract_padded
from eval.features.extractor import LazyExtractor
from eval.features.make import make_extractor
from eval.images import outputs
from eval.recipe import BalancedLabels, EvalRecipe, FixedLabel, IidLabels, LabelFile
from eval.work import chunks
from eval.work.auto_batch import auto_batch
from eval.work.chunks import ChunkFolder
from eval.work.cuda_graphs import GraphedModel, check_graphs
from eval.work.side_stream import SideStream
from sfd_scale import config
from sfd_scale.diffusion.conditioning import Conditioning
from sfd_scale.diffusion.fixed_step import FixedStepConfig
from sfd_scale.diffusion.guidance import FlowModel, GuidanceConfig, NoGuidance, guided, guides, interval_discontinuities
from sfd_scale.diffusion.sampler import Sampler
from sfd_scale.diffusion.samplers import SamplerConfig
from sfd_scale.diffusion.schedule import SemanticFirstSchedule
from sfd_scale.models import attention
from sfd_scale.runtime import distributed
from sfd_scale.runtime.files import file_sha256
from sfd_scale.runtime.matmul import allow_tf32, bf16_matmul_on_cpu, deterministic_cudnn, strict_float32

if TYPE_CHECKING:
    from sfd_scale.sample import Loaded

logger = logging.getLogger(__name__)
Precision = Literal["bf16", "tf32", "fp32"]
Loader = Callable[[Path, Precision, bool, torch.device], "Loaded"]


@dataclass(frozen=True)
class Generation:
    """One evaluation's work: who draws, which labels, whose features, and all that decides the result."""

    sampler: Sampler
    labels: Tensor
    extractor: LazyExtractor
    config: dict[str, Any]


def prepare(
    recipe: EvalRecipe, device: torch.device, extractor: LazyExtractor | None = None, load: Loader | None = None
) -> Generation:
    """Load the models and name the extractor of a recipe; a sweep gives what it has already.

    Raises:
        ValueError: for a missing checkpoint, a guide that does not belong to it, guidance that does nothing, or a
            setting that the device does not have.
    """
    load = load_model if load is None else load
    if recipe.checkpoint is None:
        raise ValueError("checkpoint: null; allowed: a file of `sfd export` (checkpoint=PATH or --checkpoint PATH)")
    files = [path for path in (recipe.checkpoint, recipe.guide) if path is not None and path.is_file()]
    if len({file_sha256(path) for path in files}) < len(files):
        raise ValueError(
            f"guide: {recipe.guide} is the checkpoint itself, which guides nothing; allowed: a worse model"
        )
    if recipe.cuda_graphs:
        check_graphs(device)
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    kernel = attention.activate(recipe.attention, device, dtype=dtype)
    loaded = load(recipe.checkpoint, recipe.precision, recipe.compile, device)
    guide = None if recipe.guide is None else load(recipe.guide, recipe.precision, recipe.compile, device)
    labels = labels_of(recipe, loaded.conditioning)
    check_guidance(recipe.guidance, recipe.sampler, loaded.schedule)
    extractor = make_extractor(recipe.extractor, device) if extractor is None else extractor
    if recipe.batch == "auto":
        recipe = dataclasses.replace(recipe, batch=_fitting(recipe, loaded, guide, extractor, device))
        torch.compiler.reset()  # after the batches that were tried, blocks would be compiled for any size
    sampler = make_sampler(recipe, loaded, guide, device)
    weights = [None if found is None else found.provenance for found in (loaded, guide)]
    determined = describe(recipe, extractor.fingerprint, kernel, *weights)
    return Generation(sampler, labels, extractor, determined)


def _fitting(
    recipe: EvalRecipe, loaded: Loaded, guide: Loaded | None, extractor: LazyExtractor, device: torch.device
) -> int:
    """The batch that fits: two steps from noise, then pixels and features of as many images."""

    def work(batch: int) -> Iterator[None]:
        short = dataclasses.replace(recipe, batch=batch, sampler=FixedStepConfig(num_steps=2))
        sampler = make_sampler(short, loaded, guide, device)
        drawn = sampler.draw(range(batch), torch.zeros(batch, dtype=torch.int64))
        yield
        extract_padded(extractor.get(), sampler.pixels(drawn), batch)
        yield

    return auto_batch(work, device)


def with_kept_batch(recipe: EvalRecipe, *folders: Path) -> EvalRecipe:
    """`batch: auto` replaced by what the first of the folders that was begun has; all ranks have to call this."""
    if recipe.batch != "auto":
        return recipe
    files = [folder / "config.json" for folder in folders if (folder / "config.json").is_file()]
    kept = json.loads(files[0].read_text(encoding="utf-8"))["batch"] if files else None
    kept = distributed.broadcast_object(kept)
    return recipe if kept is None else dataclasses.replace(recipe, batch=kept)


def load_model(path: Path, precision: Precision, compiled: bool, device: torch.device) -> Loaded:
    """A model made ready for sampling; see sample.load_for_sampling."""
    from sfd_scale.sample import load_for_sampling

    return made_ready(load_for_sampling(path, device), precision, compiled)


def made_ready(loaded: Loaded, precision: Precision, compiled: bool) -> Loaded:
    """Weights in the precision of sampling, no alignment head, and blocks compiled if asked."""
    loaded.model.repa_projector = None
    loaded.model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    if compiled:
        from sfd_scale.engines.block_transforms import prepare_blocks

        prepare_blocks(loaded.model, "none", compiled=True)
    return loaded


def make_sampler(recipe: EvalRecipe, loaded: Loaded, guide: Loaded | None, device: torch.device) -> Sampler:
    """The guided sampler of a recipe.

    Raises:
        ValueError: for a guide of another layout, normalisation or schedule.
    """
    assert isinstance(recipe.batch, int)
    model: FlowModel = loaded.model
    worse: FlowModel | None = None
    if guide is not None:
        check_guide(loaded, guide, recipe.allow_stats_mismatch)
        worse = guide.model
    if recipe.cuda_graphs:
        sizes = (recipe.batch, 2 * recipe.batch)  # CFG asks for both velocities at once
        model, worse = GraphedModel(model, sizes), None if worse is None else GraphedModel(worse, sizes)
    conditioning = loaded.conditioning if loaded.null_trained else None
    velocity = guided(model, recipe.guidance, loaded.layout, guide=worse, conditioning=conditioning)
    return Sampler(
        velocity=velocity,
        layout=loaded.layout,
        schedule=loaded.schedule,
        config=recipe.sampler,
        stats=loaded.stats,
        decode=loaded.decode,
        seed=recipe.seed,
        batch=recipe.batch,
        device=device,
        discontinuities=interval_discontinuities(recipe.guidance, loaded.schedule),
        decode_batch=recipe.decode_batch,
    )


def check_guide(loaded: Loaded, guide: Loaded, allow_stats_mismatch: bool = False) -> None:
    """Refuse a guide whose latents mean something else; other statistics may be allowed, with a warning.

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
            raise ValueError(f"guide: its {what} is {other}, the checkpoint's is {own}; a guide has to share it{hint}")


def check_guidance(guidance: GuidanceConfig, sampler: SamplerConfig, schedule: SemanticFirstSchedule) -> None:
    """Refuse an interval that begins after the last time at which the sampler asks for a velocity.

    Raises:
        ValueError: that says when that is.
    """
    times = sampler.evaluation_times(schedule)
    if isinstance(guidance, NoGuidance) or times is None or guides(guidance, schedule.clocks(times)):
        return
    clocks = schedule.clocks(times)
    guided_parts = ((clocks.texture, guidance.scale_texture), (clocks.semantic, guidance.scale_semantic))
    latest = max(clock.max().item() for clock, scale in guided_parts if scale != 1)
    raise ValueError(
        f"interval_start: {guidance.interval_start} guides nothing, as no step of the sampler is that late; allowed: "
        f"up to {latest:.4g}, or more steps"
    )


def labels_of(recipe: EvalRecipe, conditioning: Conditioning) -> Tensor:
    """The label of every image: (num_samples,) int64.

    Raises:
        ValueError: for labels that are no classes, or a file of another length.
    """
    count = recipe.num_samples
    match recipe.labels:
        case BalancedLabels():
            return conditioning.balanced(recipe.seed, count)
        case IidLabels():
            return conditioning.independent(recipe.seed, count)
        case FixedLabel(label=label):
            labels = torch.full((count,), label)
        case LabelFile(path=path):
            if not path.is_file():
                raise ValueError(f"labels.path: {path}; allowed: an existing file with a label a line")
            words = path.read_text(encoding="utf-8").split()
            if not all(word.isdecimal() for word in words):
                raise ValueError(f"labels.path: {path} holds more than class numbers; allowed: one a line")
            labels = torch.tensor([int(word) for word in words])
    if len(labels) != count:
        raise ValueError(f"labels.path: {len(labels)} labels; allowed: num_samples, {count}")
    conditioning.check(labels, "labels")
    return labels


def describe(
    recipe: EvalRecipe,
    extractor: str,
    kernel: str,
    checkpoint: Mapping[str, Any] | None,
    guide: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """All that determines the features of a generated set, and nothing that does not (paths, reference, ranks)."""
    assert recipe.checkpoint is not None and checkpoint is not None

    def weights(path: Path, provenance: Mapping[str, Any]) -> dict[str, Any]:
        return {"sha256": file_sha256(path), **provenance}

    labels: dict[str, Any] = config.to_dict(recipe.labels)
    if isinstance(recipe.labels, LabelFile):
        labels = {"kind": "file", "sha256": file_sha256(recipe.labels.path)}
    return {
        "kind": "generated",
        "checkpoint": weights(recipe.checkpoint, checkpoint),
        "guide": None if recipe.guide is None or guide is None else weights(recipe.guide, guide),
        "sampler": config.to_dict(recipe.sampler),
        "guidance": config.to_dict(recipe.guidance),
        "num_samples": recipe.num_samples,
        "batch": recipe.batch,
        "decode_batch": recipe.decode_batch,
        "seed": recipe.seed,
        "labels": labels,
        "precision": recipe.precision,
        "attention": kernel,
        "compile": recipe.compile,
        "cuda_graphs": recipe.cuda_graphs,
        "extractor": extractor,
        "images": outputs.kept_images(recipe.outputs),
    }


def generate(recipe: EvalRecipe, out: Path, job: Generation | None = None) -> ChunkFolder:
    """Fill `out` with the features of the recipe's images. A second start continues; a finished folder is left as is.

    Raises:
        ValueError: if `out` holds the results of other settings.
    """
    device = distributed.device()
    job = prepare(with_kept_batch(recipe, out), device) if job is None else job
    batch = job.sampler.batch
    # What may be wrong with it is told before the folder belongs to these settings.
    extractor, side = job.extractor.get(), SideStream(device)
    folder = ChunkFolder(out, recipe.num_samples, batch)
    if distributed.is_main():
        folder.require_settings(job.config)
    distributed.barrier()
    kept = outputs.kept_rows(recipe.outputs, job.labels)

    def produce(chunk: int) -> tuple[Callable[[], dict[str, Tensor]], dict[str, Any]]:
        rows = folder.rows(chunk)
        labels = job.labels[rows.start : rows.stop]
        drawn = job.sampler.draw(rows, labels)
        sampled = side.mark()

        def finish() -> dict[str, Tensor]:
            with side.after(sampled):
                images = job.sampler.pixels(drawn)
                wanted = [row - rows.start for row in rows if row in kept]
                tensors = {**extract_padded(extractor, images, batch), "nfe": drawn.nfe, "images": images[wanted]}
                tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
            return {**tensors, "labels": labels, "image_numbers": torch.tensor(wanted).long() + rows.start}

        numbers = {"NFE": drawn.nfe.double().mean().item()}
        if recipe.precision != "tf32":
            return finish, numbers
        # The extractor's float32 is another, and which one it is holds for all threads: not beside the next batch.
        tensors = finish()
        return lambda: tensors, numbers

    started = time.monotonic()
    # Set once for both threads: these are settings of the process.
    exact = strict_float32(device) if recipe.precision == "fp32" else deterministic_cudnn()
    products = allow_tf32() if recipe.precision == "tf32" else nullcontext()
    with exact, products, bf16_matmul_on_cpu(device):
        made = chunks.run(folder, produce, "generate", "images")
    if distributed.is_main():
        outputs.write(recipe.outputs, folder, job.labels)
        _announce(made, time.monotonic() - started, out)
    distributed.barrier()
    return folder


def _announce(made: int, seconds: float, out: Path) -> None:
    if made:
        logger.info("%d images in %.1f s, %.1f images/s: %s", made, seconds, made / seconds, out)
    else:
        logger.info("all images were there already: %s", out)
