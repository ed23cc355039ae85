"""`eval verify`: draw a few images of a published result again, and say whether they are the same.

The results.json is the card: it has the settings, the SHA-256 of the weights, and the noise, label and pixels of a few
images as hashes. Whole batches are drawn, because the bits of an image may depend on its place in a batch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from rich.table import Table
from torch import Tensor

from eval import generate
from eval.features.extractor import Extractor, LazyExtractor
from eval.images.proof import ImageProof, sha256
from eval.recipe import EvalRecipe
from eval.results import Results
from eval.work.chunks import ChunkFolder, made_on
from sfd_scale import config, export
from sfd_scale.diffusion.sampler import noise_of
from sfd_scale.export import WeightsChoice
from sfd_scale.models.attention import AttentionBackend
from sfd_scale.runs import open_run
from sfd_scale.runtime import distributed
from sfd_scale.runtime.files import file_sha256
from sfd_scale.runtime.output import plain_console
from sfd_scale.runtime.run_paths import RESULTS, RunPaths

# Mean distance of block means, in levels of 255. On a short training of the quickstart, bf16 in place of float32 moves
# them by 0.2, and another seed by 50.
TOLERANCE = 2.0
_SAME_NAMES = ("sampler", "guidance", "num_samples", "batch", "decode_batch", "seed", "precision", "compile")


@dataclass(frozen=True)
class Redrawn:
    """One image, drawn again.

    distance: of the block means to those of the result, in levels of 255.
    """

    number: int
    noise: bool
    label: bool
    bits: bool
    distance: float

    @property
    def close(self) -> bool:
        """Whether it is the same within the tolerance."""
        return self.noise and self.label and self.distance <= TOLERANCE


@dataclass(frozen=True)
class Verification:
    """What came of all images. made_on: the machines of the result; here: this machine."""

    images: list[Redrawn]
    made_on: tuple[str, ...]
    here: str

    @property
    def same(self) -> bool:
        return all(image.close for image in self.images)

    @property
    def sentence(self) -> str:
        """The answer."""
        count = len(self.images)
        if all(image.noise and image.label and image.bits for image in self.images):
            return f"the same, bit for bit: {count} of {count} images"
        if not self.same:
            other = ", ".join(str(image.number) for image in self.images if not image.close)
            return f"not the same: of {count} images, these differ: {other}"
        furthest = max(image.distance for image in self.images)
        elsewhere = f"made on {', '.join(self.made_on) or 'an unknown machine'}"
        why = "on a machine of the same kind" if set(self.made_on) == {self.here} else elsewhere
        return (
            f"the same within the tolerance: {count} of {count} images, at most {furthest:.2g} of 255 apart in block "
            f"means (allowed: {TOLERANCE:g}); their bits differ, {why}, here {self.here}"
        )


def verify(
    result: Path, *, checkpoint: Path | None = None, guide: Path | None = None, labels: Path | None = None
) -> Verification:
    """Draw the proven images of a results.json, or of its folder, again; prints a table and the answer.

    Args:
        checkpoint, guide: the weights; by default the recorded path, or the checkpoint of the run that has the result.
        labels: the file of labels, where the result was drawn with one.

    Raises:
        ValueError: for a result without proof, or if the weights or labels are not those that drew it.
    """
    results = Results.read(result)
    if not results.generated:
        raise ValueError(f"{result}: scores of given images, which no command can draw again; allowed: of `generate`")
    if not results.proof:
        raise ValueError(f"{result}: it has no proof, as results of earlier releases; generate and score it again")
    file = result / RESULTS if result.is_dir() else result
    with _weights(file, results, "checkpoint", checkpoint) as own, _weights(file, results, "guide", guide) as worse:
        assert own is not None
        recipe = recipe_of(results, own, worse, labels)
        found = Verification(redraw(recipe, results.proof), results.run.made_on, made_on())
    _show(found)
    return found


def redraw(recipe: EvalRecipe, proof: tuple[ImageProof, ...]) -> list[Redrawn]:
    """Draw the batches of the proven images, and compare."""
    device = distributed.device()
    prepared = generate.prepare(recipe, device, LazyExtractor("not used", _no_extractor))
    sampler, folder = prepared.sampler, ChunkFolder(Path(), recipe.num_samples, prepared.sampler.batch)
    found: list[Redrawn] = []
    with generate.arithmetic(recipe.precision, device):
        for chunk in sorted({image.number // folder.size for image in proof}):
            rows = folder.rows(chunk)
            labels = prepared.labels[rows.start : rows.stop]
            images = sampler.pixels(sampler.draw(rows, prepared.conditioning.given(labels))).cpu()
            for image in proof:
                if image.number in rows:
                    place = image.number - rows.start
                    noise = noise_of(recipe.seed, [image.number], sampler.layout)[0]
                    found.append(_compared(image, noise, int(labels[place]), images[place]))
    return found


def _compared(image: ImageProof, noise: Tensor, label: int, pixels: Tensor) -> Redrawn:
    return Redrawn(
        image.number, sha256(noise) == image.noise, label == image.label, sha256(pixels) == image.pixels,
        image.distance(pixels),
    )  # fmt: skip


def _no_extractor() -> Extractor:
    raise AssertionError("images are compared, not features")


# ------------------------------------------------------------------------------------------------- from the card


def recipe_of(results: Results, checkpoint: Path, guide: Path | None, labels: Path | None) -> EvalRecipe:
    """The evaluation that drew a result, by its card. A kernel or CUDA graphs that this machine lacks are left out.

    Raises:
        ValueError: if the labels are of a file that is not given, or is another one.
    """
    samples = results.samples
    if lacking := [name for name in (*_SAME_NAMES, "labels", "attention", "cuda_graphs") if name not in samples]:
        raise ValueError(f"the result lacks samples.{', samples.'.join(lacking)}; generate and score it again")
    settings: dict[str, Any] = {name: samples[name] for name in _SAME_NAMES}
    kind = samples["labels"]
    if kind["kind"] == "file":
        if labels is None:
            raise ValueError("--labels: missing; the result was drawn with a file of labels; give that file")
        if (found := file_sha256(labels)) != kind["sha256"]:
            raise ValueError(f"--labels: {labels} has SHA-256 {found}; the result was drawn with {kind['sha256']}")
        kind = {"kind": "file", "path": str(labels)}
    elif labels is not None:
        raise ValueError(f"--labels: {labels}, but the labels of the result are {kind['kind']}; leave it out")
    on_gpu = distributed.device().type == "cuda"
    kernel = samples["attention"]
    settings |= {
        "kind": "eval", "checkpoint": str(checkpoint), "labels": kind, "guide": None if guide is None else str(guide),
        "attention": kernel if kernel in get_args(AttentionBackend) and (on_gpu or kernel == "math") else "auto",
        "cuda_graphs": samples["cuda_graphs"] and on_gpu, "allow_stats_mismatch": True,
    }  # fmt: skip
    return config.from_dict(EvalRecipe, settings, "the result")


@contextmanager
def _weights(file: Path, results: Results, name: str, given: Path | None) -> Iterator[Path | None]:
    """The file of the checkpoint or of the guidance model, checked by its hash; exported from the run that has it.

    Raises:
        ValueError: if it is missing or another one.
    """
    recorded = results.samples.get(name)
    if recorded is None:
        if given is not None:
            raise ValueError(f"--{name}: {given}, but the result was drawn without one; leave it out")
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        path = given
        if path is None and name == "checkpoint":
            path = None if results.run.checkpoint is None else Path(results.run.checkpoint)
            if path is None or not path.is_file():
                path = _exported(file, results.step, Path(folder) / "model.safetensors")
                if path is not None:  # another release may note more in an export: the pixels decide
                    yield path
                    return
        if path is None or not path.is_file():
            raise ValueError(f"--{name}: {path or 'missing'}; give the file with SHA-256 {recorded['sha256']}")
        if (found := file_sha256(path)) != recorded["sha256"]:
            raise ValueError(
                f"--{name}: {path} has SHA-256 {found}; the result was drawn with {recorded['sha256']}; give that file"
            )
        yield path


def _exported(file: Path, step: int, out: Path) -> Path | None:
    """The weights of a step, exported from the run in whose folder the results lie; None if they lie elsewhere."""
    run = file.parents[2] if len(file.parents) > 2 else None
    if run is None or not RunPaths(run).recipe_file.is_file():
        return None
    open_run(run)[0].checkpoint(step)
    return export.export(run, out, WeightsChoice(step=step))


def _show(found: Verification) -> None:
    if not distributed.is_main():
        return
    table = Table("image", "noise", "label", "pixels", "distance")
    words = {True: "same", False: "other"}
    for image in found.images:
        table.add_row(
            str(image.number), words[image.noise], words[image.label], words[image.bits], f"{image.distance:.3g}"
        )
    plain_console().print(table)
    plain_console().print(found.sentence)
