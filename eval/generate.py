"""`eval generate`: draw the images of a recipe on all ranks and store their features, and the images on request."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from eval.features.extract import extract_missing, extract_padded
from eval.features.extractor import Extractor, LazyExtractor
from eval.features.make import make_extractor, make_extractors
from eval.images import outputs
from eval.images.proof import proof_tensors, proven_rows
from eval.recipe import BalancedLabels, EvalRecipe, FixedLabel, IidLabels, LabelFile
from eval.speed import slow_settings
from eval.work import chunks
from eval.work.auto_batch import auto_batch
from eval.work.chunks import ChunkFolder
from eval.work.cuda_graphs import GraphedModel, check_graphs
from eval.work.side_stream import SideStream
from sfd_scale import config
from sfd_scale.diffusion.conditioning import Conditioning
from sfd_scale.diffusion.fixed_step import FixedStepConfig
from sfd_scale.diffusion.guidance import FlowModel, GuidanceConfig, NoGuidance, guided, guides, interval_discontinuities
from sfd_scale.diffusion.sampler import Sampler, noise_of
from sfd_scale.diffusion.samplers import SamplerConfig
from sfd_scale.diffusion.schedule import SemanticFirstSchedule
from sfd_scale.models import attention
from sfd_scale.runtime import distributed
from sfd_scale.runtime.file_kind import require_kind
from sfd_scale.runtime.files import file_sha256, read_json, read_text, write_json
from sfd_scale.runtime.matmul import allow_tf32, bf16_matmul_on_cpu, deterministic_cudnn, strict_float32

if TYPE_CHECKING:
    from sfd_scale.sample import Loaded

logger = logging.getLogger(__name__)
Precision = Literal["bf16", "tf32", "fp32"]
CHECKPOINT_FILE = "checkpoint.json"  # in a folder of `generate`: the path of the weights that drew the images
LoadModel = Callable[[Path, Precision, bool, torch.device], "Loaded"]


@dataclass(frozen=True)
class PreparedGeneration:
    """What `generate` needs of a recipe.

    labels: (num_samples,) int64, the class of each image.
    further: the extractors of further representations, by name.
    settings: everything that determines the features; config.json of their folder.
    """

    sampler: Sampler
    labels: Tensor
    conditioning: Conditioning
    extractor: LazyExtractor
    settings: dict[str, Any]
    further: Mapping[str, LazyExtractor] = field(default_factory=dict)


def prepare(
    recipe: EvalRecipe,
    device: torch.device,
    extractor: LazyExtractor | None = None,
    load: LoadModel | None = None,
    further: Mapping[str, LazyExtractor] | None = None,
) -> PreparedGeneration:
    """Load the models of a recipe and check them.

    Args:
        extractor, load, further: in place of the recipe's extractor, of `load_model` and of the extractors of further
            representations, for a sweep that reuses them.

    Raises:
        ValueError: for a missing checkpoint, a guidance model that does not fit it, guidance without effect, or a
            setting that the device does not support.
    """
    load = load_model if load is None else load
    if recipe.checkpoint is None:
        raise ValueError("checkpoint: null; allowed: a file of `sfd export` (checkpoint=PATH or --checkpoint PATH)")
    files = [path for path in (recipe.checkpoint, recipe.guide) if path is not None and path.is_file()]
    if len({file_sha256(path) for path in files}) < len(files):
        raise ValueError(
            f"guide: {recipe.guide} is the checkpoint itself, so guidance has no effect; allowed: a smaller or less "
            "trained model"
        )
    if recipe.cuda_graphs:
        check_graphs(device)
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    kernel = attention.activate(recipe.attention, device, dtype=dtype)
    loaded = load(recipe.checkpoint, recipe.precision, recipe.compile, device)
    guide = None if recipe.guide is None else load(recipe.guide, recipe.precision, recipe.compile, device)
    labels = make_labels(recipe, loaded.conditioning)
    check_guidance_interval(recipe.guidance, recipe.sampler, loaded.schedule)
    extractor = make_extractor(recipe.extractor, device) if extractor is None else extractor
    further = make_extractors(recipe.further_extractors(), device) if further is None else further
    if recipe.batch == "auto":
        every = [extractor, *further.values()]
        recipe = dataclasses.replace(recipe, batch=_largest_batch(recipe, loaded, guide, every, device))
        # After several batch sizes, torch.compile would compile the blocks for dynamic sizes.
        torch.compiler.reset()
    sampler = make_sampler(recipe, loaded, guide, device)
    weights = [None if found is None else found.provenance for found in (loaded, guide)]
    settings = settings_of_samples(recipe, extractor.fingerprint, kernel, *weights)
    return PreparedGeneration(sampler, labels, loaded.conditioning, extractor, settings, further)


def _largest_batch(
    recipe: EvalRecipe, loaded: Loaded, guide: Loaded | None, extractors: Sequence[LazyExtractor], device: torch.device
) -> int:
    """The largest batch that fits the memory: for two sampling steps, then for decoding and features."""
    networks = [extractor.get() for extractor in extractors]

    def work(batch: int) -> Iterator[None]:
        short = dataclasses.replace(recipe, batch=batch, sampler=FixedStepConfig(num_steps=2))
        sampler = make_sampler(short, loaded, guide, device)
        drawn = sampler.draw(range(batch), torch.zeros(batch, dtype=torch.int64))
        yield
        pixels = sampler.pixels(drawn)
        for network in networks:
            extract_padded(network, pixels, batch)
        yield

    return auto_batch(work, device)


def with_recorded_batch(recipe: EvalRecipe, *folders: Path) -> EvalRecipe:
    """The recipe with the batch of the first folder that has one, in place of `batch: auto`.

    All ranks have to call this.
    """
    if recipe.batch != "auto":
        return recipe
    files = [folder / "config.json" for folder in folders if (folder / "config.json").is_file()]
    settings = read_json(files[0]) if files else None
    recorded = settings.get("batch") if isinstance(settings, dict) else None
    recorded = distributed.broadcast_object(recorded)
    return recipe if recorded is None else dataclasses.replace(recipe, batch=recorded)


def load_model(path: Path, precision: Precision, compiled: bool, device: torch.device) -> Loaded:
    """The model in a file of `sfd export`, in the precision of sampling; see `prepare_model`."""
    from sfd_scale.sample import load_for_sampling

    return prepare_model(load_for_sampling(path, device), precision, compiled)


def prepare_model(loaded: Loaded, precision: Precision, compiled: bool) -> Loaded:
    """Remove the alignment head, cast the weights, and compile the blocks on request."""
    loaded.model.repa_projector = None
    loaded.model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    if compiled:
        from sfd_scale.engines.block_transforms import prepare_blocks

        prepare_blocks(loaded.model, "none", compiled=True)
    return loaded


def make_sampler(recipe: EvalRecipe, loaded: Loaded, guide: Loaded | None, device: torch.device) -> Sampler:
    """The sampler of a recipe, with guidance.

    Raises:
        ValueError: see `sample.check_guidance_model`.
    """
    assert isinstance(recipe.batch, int)
    model: FlowModel = loaded.model
    worse: FlowModel | None = None
    if guide is not None:
        from sfd_scale.sample import check_guidance_model

        check_guidance_model(loaded, guide, recipe.allow_stats_mismatch)
        worse = guide.model
    if recipe.cuda_graphs:
        sizes = (recipe.batch, 2 * recipe.batch)  # CFG asks for both velocities at once
        model, worse = GraphedModel(model, sizes), None if worse is None else GraphedModel(worse, sizes)
    conditioning = loaded.conditioning if loaded.null_trained else None
    velocity = guided(
        model, recipe.guidance, loaded.layout, guide=worse, conditioning=conditioning, internal=loaded.internal
    )
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


def check_guidance_interval(guidance: GuidanceConfig, sampler: SamplerConfig, schedule: SemanticFirstSchedule) -> None:
    """Refuse a guidance interval that starts after the last time at which the sampler evaluates the model.

    Raises:
        ValueError: naming that time.
    """
    times = sampler.evaluation_times(schedule)
    if isinstance(guidance, NoGuidance) or times is None or guides(guidance, schedule.clocks(times)):
        return
    clocks = schedule.clocks(times)
    guided_parts = ((clocks.texture, guidance.scale_texture), (clocks.semantic, guidance.scale_semantic))
    latest = max(clock.max().item() for clock, scale in guided_parts if scale != 1)
    raise ValueError(
        f"interval_start: {guidance.interval_start} is after the last step of the sampler, so guidance has no effect; "
        f"allowed: up to {latest:.4g}, or more steps"
    )


def make_labels(recipe: EvalRecipe, conditioning: Conditioning) -> Tensor:
    """The class of every image: (num_samples,) int64.

    Raises:
        ValueError: for labels that are no classes, or a file with another number of labels.
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
                raise ValueError(f"labels.path: {path}; allowed: an existing file with one label per line")
            require_kind(path, "text")
            words = read_text(path).split()
            if not all(word.isdecimal() and len(word) <= 18 for word in words):
                raise ValueError(f"labels.path: {path} holds more than class numbers; allowed: one number per line")
            labels = torch.tensor([int(word) for word in words])
    if len(labels) != count:
        raise ValueError(f"labels.path: {len(labels)} labels; allowed: num_samples, {count}")
    conditioning.check(labels, "labels")
    return labels


def settings_of_samples(
    recipe: EvalRecipe,
    extractor: str,
    kernel: str,
    checkpoint: Mapping[str, Any] | None,
    guide: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Everything that determines the features of generated images. Paths, the reference and ranks do not.

    Args:
        extractor: its fingerprint. kernel: the attention kernel in use.
        checkpoint, guide: provenance of the weights.
    """
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


def generate(recipe: EvalRecipe, out: Path, prepared: PreparedGeneration | None = None) -> ChunkFolder:
    """Fill `out` with the features of the recipe's images. A second start continues; a finished folder stays as it is.

    All extractors get the same decoded images. The features of further representations have folders of their own
    below `out`. If an extractor is added to a finished folder, the images are drawn again for it alone.

    Raises:
        ValueError: if `out` holds features of other settings.
    """
    device = distributed.device()
    if prepared is None:
        prepared = prepare(with_recorded_batch(recipe, out), device)
    sampler, all_labels = prepared.sampler, prepared.labels
    batch = sampler.batch
    # Build the extractor first: if that fails, the folder does not yet record these settings.
    extractor, side = prepared.extractor.get(), SideStream(device)
    folder = ChunkFolder(out, recipe.num_samples, batch)
    networks = {folder: extractor}
    for name, further in prepared.further.items():
        networks[ChunkFolder(further_features(out, name), recipe.num_samples, batch)] = further.get()
    if distributed.is_main():
        _record_settings(recipe, folder, networks, prepared.settings)
        for slow in slow_settings(recipe, device):
            logger.info("slow here: %s", slow)
    distributed.barrier()
    kept = outputs.kept_rows(recipe.outputs, all_labels)

    def produce(chunk: int) -> tuple[chunks.Finish, dict[str, Any]]:
        rows = folder.rows(chunk)
        labels = all_labels[rows.start : rows.stop]
        drawn = sampler.draw(rows, prepared.conditioning.given(labels))
        sampled = side.mark()

        def finish() -> dict[ChunkFolder, dict[str, Tensor]]:
            with side.after(sampled):
                images = sampler.pixels(drawn)
                found = extract_missing(networks, images, chunk, batch)
                if folder in found:
                    wanted = [row - rows.start for row in rows if row in kept]
                    own = {
                        "nfe": drawn.nfe,
                        "images": images[wanted],
                        "image_numbers": torch.tensor(wanted).long() + rows.start,
                    }
                    proven = proven_rows(rows, recipe.num_samples)
                    pixels = images[[row - rows.start for row in proven]].cpu()
                    found[folder] |= own | proof_tensors(proven, noise_of(recipe.seed, proven, sampler.layout), pixels)
                found = {place: {name: value.cpu() for name, value in made.items()} for place, made in found.items()}
            return {place: {**made, "labels": labels} for place, made in found.items()}

        numbers = {"NFE": drawn.nfe.double().mean().item()}
        if recipe.precision != "tf32":
            return finish, numbers
        # The extractor needs float32 without TF32, and that setting is the process's: do not overlap with sampling.
        tensors = finish()
        return lambda: tensors, numbers

    started = time.monotonic()
    with arithmetic(recipe.precision, device):
        made = chunks.run(list(networks), produce, "generate", "images")
    if distributed.is_main():
        outputs.write(recipe.outputs, folder, all_labels)
        _log_speed(made, time.monotonic() - started, out)
    distributed.barrier()
    return folder


@contextmanager
def arithmetic(precision: Precision, device: torch.device) -> Iterator[None]:
    """How matrix products are computed while images are drawn. Settings of the process: they hold for all threads."""
    exact = strict_float32(device) if precision == "fp32" else deterministic_cudnn()
    tf32 = allow_tf32() if precision == "tf32" else nullcontext()
    with exact, tf32, bf16_matmul_on_cpu(device):
        yield


def _record_settings(
    recipe: EvalRecipe, folder: ChunkFolder, networks: Mapping[ChunkFolder, Extractor], settings: Mapping[str, Any]
) -> None:
    """Record the settings of each folder of features, or refuse a folder of other settings."""
    new = not (folder.path / "config.json").is_file()
    for own, network in networks.items():
        own.require_settings({**settings, "extractor": network.fingerprint})
    # Beside the settings, not in them: the same weights under another path give the same images.
    if new:
        path = None if recipe.checkpoint is None else str(recipe.checkpoint)
        write_json(folder.path / CHECKPOINT_FILE, {"checkpoint": path})


def further_features(out: Path, name: str) -> Path:
    """The folder below `out` for the features of a further representation."""
    return out / "representations" / name


def _log_speed(made: int, seconds: float, out: Path) -> None:
    if made:
        logger.info("%d images in %.1f s, %.1f images/s: %s", made, seconds, made / seconds, out)
    else:
        logger.info("all images exist already: %s", out)


if __name__ == "__main__":
    from eval.__main__ import main

    main("generate")
