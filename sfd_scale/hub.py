"""A folder for the Hugging Face hub: weights, recipe, statistics, texture codec, scores and a model card."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from eval.metrics.scores import SCORES, Score
from eval.results import Results, results_of_run
from sfd_scale import checkpoint, config, export
from sfd_scale.checkpoint import WEIGHTS
from sfd_scale.diffusion.latents import LatentStats
from sfd_scale.export import WeightsChoice
from sfd_scale.recipe import TrainRecipe
from sfd_scale.runs import open_run
from sfd_scale.runtime.files import sha256, write_atomically, write_json
from sfd_scale.runtime.leftovers import is_temporary, make_way
from sfd_scale.runtime.run_paths import RECIPE, RESULTS
from sfd_scale.tasks import diffusion_task
from sfd_scale.tokenizers.make import make_texture

logger = logging.getLogger(__name__)
CARD = "README.md"
_CLASSES = 100  # names in the card
_DIFFUSERS = ("pipeline.py", "model_index.json")
_PAPER = "Semantics Lead the Way: Harmonizing Semantic and Texture Modeling with Asynchronous Latent Diffusion"
_PAPER_URL = "https://arxiv.org/abs/2512.04926"
_CITATION = f"""@article{{pan2025semantics,
  title   = {{{_PAPER}}},
  author  = {{Pan, Yueming and Feng, Ruoyu and Dai, Qi and Wang, Yuqi and Lin, Wenfeng and Guo, Mingyu and
             Luo, Chong and Zheng, Nanning}},
  journal = {{arXiv preprint arXiv:2512.04926}},
  year    = {{2025}}
}}"""

_USE = f"""## Use

With sfd-scale installed, download the folder and draw images:

    hf download OWNER/NAME --local-dir model
    sfd sample model --out samples.png
    sfd eval generate RECIPE --checkpoint model/{WEIGHTS} --out samples

In Python, with the folder or its id on the hub:

    import sfd_scale
    pipe = sfd_scale.load("OWNER/NAME")
    images = pipe(labels=[0, 1, 2], guidance=1.5, steps=50, seed=0).images

With diffusers, which gives the same images:

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(
        "OWNER/NAME", custom_pipeline="OWNER/NAME", trust_remote_code=True
    )
    images = pipe(labels=[0, 1, 2], guidance=1.5, steps=50, seed=0).images"""


def write_folder(source: Path, folder: Path, choice: WeightsChoice | None = None, licence: str | None = None) -> Path:
    """Export the weights of a run into `folder`, with everything that others need to draw images from them.

    Args:
        source, choice: see `export.export`.
        licence: of the weights, as the hub names it, such as "apache-2.0".

    Raises:
        ValueError: see `export.export`; or if `folder` holds files other than those of an earlier call.
    """
    own = (WEIGHTS, CARD, RECIPE, "config.json", "stats.safetensors", export.TEXTURE, RESULTS, *_DIFFUSERS)
    names = {file.name for file in folder.iterdir() if not is_temporary(file.name)} if folder.exists() else set()
    if other := sorted(names - {*own, "samples.png", ".git"}):
        raise ValueError(f"--hub-folder: {folder} holds other files ({', '.join(other[:5])}); give an empty folder")
    weights = export.export(source, folder / WEIGHTS, choice)
    for name in {*own, "samples.png"} - {WEIGHTS}:
        make_way(folder / name)  # left by an earlier call
    note = export.read_note(weights)
    recipe = config.from_dict(TrainRecipe, note["recipe"], str(weights))
    write_atomically(folder / RECIPE, config.to_yaml(recipe))
    if "stats" in note:
        stats = {name: torch.tensor(note["stats"][name], dtype=torch.float64) for name in ("mean", "std")}
        LatentStats(**stats).save(folder / "stats.safetensors")
    texture = recipe.tokenizer.texture
    if texture is not None and texture.weights is not None and texture.weights.is_file():
        shutil.copyfile(texture.weights, folder / export.TEXTURE)
    elif (carried := export.carried_codec(note, weights)) is not None:
        write_atomically(folder / export.TEXTURE, carried)
    shutil.copyfile(Path(checkpoint.__file__).with_name("diffusers_pipeline.py"), folder / "pipeline.py")
    write_json(folder / "model_index.json", {"_class_name": "SFDPipeline", "_diffusers_version": "0.35.0"})
    # The hub counts downloads by the requests for this file.
    write_json(folder / "config.json", _config(recipe, note))
    results = _results(source, note, weights)
    if results is not None:
        shutil.copyfile(results, folder / RESULTS)
        if (grid := results.with_name("grid.png")).is_file():
            shutil.copyfile(grid, folder / "samples.png")
    write_atomically(folder / CARD, _card(recipe, note, folder, licence))
    logger.info("%s: ready for `hf upload`", folder)
    return folder


def _config(recipe: TrainRecipe, note: Mapping[str, Any]) -> dict[str, Any]:
    model = config.to_dict(recipe.model)
    classes = {"id2label": dict(enumerate(note["classes"]))} if "classes" in note else {}
    return {"library_name": "sfd-scale", "model_type": recipe.model.kind, **model, "step": note["step"], **classes}


def _results(source: Path, note: Mapping[str, Any], weights: Path) -> Path | None:
    """The results.json of the weights: of `eval watch` for the step, or of `eval score` for a file with these bytes."""
    run, _ = open_run(source)
    watched = run.evaluations.step(note["step"]) / RESULTS
    # `eval watch` scores the EMA weights. Its scores do not belong to other weights of the step.
    plain = note["step"] == 0 or (note.get("weights") == "ema" and "ema_length" not in note)
    if plain and watched.is_file():
        return watched
    own_hash, known = sha256(weights), results_of_run(run.path, note["recipe_digest"])
    for file, result in known:
        if result.weights_hash == own_hash:
            return file
    for file, result in known:
        if result.step == note["step"]:
            logger.warning(
                "no scores in the card: those of %s are of another file of step %d. It has other weights of the step, "
                "or an earlier release exported it. Draw and score %s to have scores", file, result.step, weights,
            )  # fmt: skip
            break
    return None


def _card(recipe: TrainRecipe, note: Mapping[str, Any], folder: Path, licence: str | None) -> str:
    results = Results.read(folder) if (folder / RESULTS).is_file() else None
    head: dict[str, Any] = {
        "library_name": "sfd-scale",
        **({"license": "other", "license_name": "not-stated"} if licence is None else {"license": licence}),
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusion", "flow-matching", "semantic-first-diffusion", "class-conditional", recipe.model.kind],
    }
    if results is not None:
        head["model-index"] = [{"name": recipe.name, "results": [_index_entry(results)]}]
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {recipe.name}",
        "Class-conditional image generation with Semantic-First Diffusion "
        f"([{_PAPER}]({_PAPER_URL}), arXiv 2512.04926), trained with sfd-scale.",
        "![samples](samples.png)" if (folder / "samples.png").is_file() else "",
        _USE,
        _table("## Model and training", _training(recipe, note, folder)),
        _classes(note),
        "" if results is None else _table("## Scores", _scored(results)),
        "## Files\n\n"
        f"`{WEIGHTS}` holds the weights in float32, under the names of the official code. Its metadata holds the "
        f"recipe, the latent statistics and the fingerprints of the tokenizers. `{RECIPE}`, `stats.safetensors` (mean "
        "and std, float64) and `config.json` repeat them as plain files."
        + (f" `{export.TEXTURE}` is the texture codec." if (folder / export.TEXTURE).is_file() else ""),
        _licence(licence),
        "## Limits\n\nThe model draws the classes and the kind of images that it was trained on, with their biases. "
        "Scores are comparable only for the same extractor, reference, sampler and number of samples.",
        f"## Citation\n\n```bibtex\n{_CITATION}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _licence(licence: str | None) -> str:
    own = "not stated. It depends on the training data and on the pretrained tokenizers"
    return (
        "## Licence\n\nThe code of sfd-scale has the licence Apache-2.0. The licence of these weights is "
        f"{own if licence is None else licence}."
    )


def _classes(note: Mapping[str, Any]) -> str:
    """The class names, if the data had them. `config.json` lists all of many."""
    names = note.get("classes", [])
    if not names:
        return ""
    shown = ", ".join(f"{index} {name}" if name != str(index) else name for index, name in enumerate(names[:_CLASSES]))
    more = f", and {len(names) - _CLASSES} more in `config.json`" if len(names) > _CLASSES else ""
    return f"## Classes\n\nLabels: {shown}{more}."


def _training(recipe: TrainRecipe, note: Mapping[str, Any], folder: Path) -> dict[str, str]:
    step = int(note["step"])
    rows = {
        **{name.capitalize(): fact for name, fact in recipe.task.summary().items()},
        **_resolution(recipe, folder),
        "Training": f"{step:,} steps of {recipe.train.global_batch}, {step * recipe.train.global_batch:,} samples",
        "Optimizer": recipe.optimizer.description,
        "Weights": _weights(recipe, note),
        "Recipe": f"`{RECIPE}`, digest `{note['recipe_digest'][:16]}`",
    }
    if "stats_hash" in note:
        rows["Latent statistics"] = f"`{note['stats_hash'][:16]}`"
        rows |= {f"Tokenizer, {name}": f"`{fingerprint}`" for name, fingerprint in note["tokenizers"].items()}
    return rows


def _resolution(recipe: TrainRecipe, folder: Path) -> dict[str, str]:
    """The size of the images, where the texture codec is in the folder or can be read here."""
    texture = recipe.tokenizer.texture
    if texture is not None and (own := folder / export.TEXTURE).is_file():
        texture = dataclasses.replace(texture, weights=own)
    if texture is None or (texture.weights is not None and not texture.weights.is_file()):
        return {}
    side = recipe.latents.size * make_texture(texture, torch.device("cpu")).downsample
    return {"Resolution": f"{side} × {side} pixels", "Classes": str(diffusion_task(recipe).model.conditioning)}


def _weights(recipe: TrainRecipe, note: Mapping[str, Any]) -> str:
    if "ema_length" in note:
        return f"post-hoc EMA, sigma_rel {note['ema_length']:g}"
    if note["step"] == 0:
        return "untrained"
    return f"EMA, decay {recipe.ema.decay:g}" if note["weights"] == "ema" else "raw weights of the step"


def _scored(results: Results) -> dict[str, str]:
    return {
        **{score.name: f"{value:.4g}" for score, value in _present(results)},
        "Samples": f"{results.count:,}",
        "Sampling": results.sampling,
        "Extractor": f"`{results.samples['extractor']}`",
    }


def _present(results: Results) -> list[tuple[Score, float]]:
    """The scores that the results have, in the order of the table."""
    found = [(score, results.scores.of(score)) for score in SCORES]
    return [(score, value) for score, value in found if value is not None]


def _index_entry(results: Results) -> dict[str, Any]:
    """The scores in the form of the hub's model index."""
    data = str(results.reference["data"])
    return {
        "task": {"type": "unconditional-image-generation"},
        "dataset": {"name": data, "type": data},
        "metrics": [
            {"type": score.key, "name": score.name, "value": float(f"{value:.6g}")}
            for score, value in _present(results)
        ],
    }


def _table(title: str, rows: Mapping[str, str]) -> str:
    return "\n".join([title, "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


if __name__ == "__main__":
    from sfd_scale.__main__ import main

    main("export")
