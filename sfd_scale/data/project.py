"""`sfd init`: the recipes of a project on a folder of the user's own images."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import yaml

from sfd_scale.data.image_files import class_folders, list_files
from sfd_scale.data.image_io import warn_about_upscaling
from sfd_scale.data.sources import classes_one_level_down
from sfd_scale.runtime.files import write_atomically

logger = logging.getLogger(__name__)
Codec = Literal["auto", "small", "sfd"]
PRETRAINED = Path("weights/sdvae_f16d32.safetensors")
_SEMVAE = Path("weights/semvae_ch16.pt")
_GRID = 8  # of the latents of the small codec
_SIZES = (32, 64, 128)  # of its images


def init(name: str, images: Path, size: int | None = None, codec: Codec = "auto") -> tuple[Path, list[str]]:
    """Write the recipes of a project into the folder `name`.

    Args:
        images: one folder per class.
        size: of the images: 256 with the official tokenizers, 32, 64 or 128 with the small ones.
        codec: "sfd" needs the pretrained weights; "small" fits and trains its tokenizers on the images themselves;
            "auto" is "sfd" where the weights are in `weights/`.

    Returns:
        The folder and the commands to run, in order.

    Raises:
        ValueError: if the folder exists, the images are not one folder per class, or the size is not possible.
    """
    folder = Path(name)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{name}: this folder is not empty; give another name")
    classes, count, example = _classes(images)
    if codec == "auto":
        codec = "sfd" if PRETRAINED.is_file() and _SEMVAE.is_file() else "small"
    size = size or (256 if codec == "sfd" else 64)
    allowed = (256,) if codec == "sfd" else _SIZES
    if size not in allowed:
        raise ValueError(f"--size: {size}; allowed with the codec {codec}: {', '.join(map(str, allowed))}")
    warn_about_upscaling(example, size)
    make = _with_pretrained if codec == "sfd" else _with_small
    recipes = make(folder, images.resolve(), len(classes), count, size)
    for recipe, settings in recipes.items():
        write_atomically(folder / f"{recipe}.yaml", yaml.safe_dump(settings, sort_keys=False, width=120))
    logger.info(
        "%s: %d recipes, for %d images of %d classes at %d pixels", folder, len(recipes), count, len(classes), size
    )
    return folder, _commands(folder, recipes)


def _classes(images: Path) -> tuple[list[str], int, Path]:
    """The class folders, the number of images, and one image, as `sfd encode` will list them.

    Raises:
        ValueError: if they are not one folder per class, directly below `images`.
    """
    if not images.is_dir():
        raise ValueError(f"--images: {images}: no such folder")
    classes, _ = class_folders(images)
    files = [(path, label) for label, folder in enumerate(classes) for path in list_files(folder).files]
    filled = {label for _, label in files}
    empty = [folder.name for label, folder in enumerate(classes) if label not in filled]
    inside = classes_one_level_down(classes, files)
    if len(classes) < 2 or empty or inside:
        below = [folder for folder in classes if class_folders(folder)[0]]
        hint = f"; is {below[0]} the folder of the classes?" if below else ""
        reason = f"{len(classes)} folders in it"
        if empty:
            reason = f"{', '.join(empty[:3])} holds no images"
        elif inside:
            reason = f"its {len(classes)} folders hold no images themselves, but {inside} folders inside them do"
        raise ValueError(f"--images: {images}: {reason}; allowed: two or more folders, one per class{hint}")
    return [folder.name for folder in classes], len(files), files[0][0]


def _with_small(folder: Path, images: Path, classes: int, count: int, size: int) -> dict[str, dict[str, object]]:
    """Tokenizers that need no pretrained weights, as in the quickstart."""
    runs = f"runs/{folder.name}"
    grid = _GRID if size > 32 else 4
    halvings = (size // grid).bit_length() - 1  # from a pixel to a latent position
    widths = [32, 64, 96, 128][:halvings]
    vision = {"kind": "convnet", "weights": f"{runs}/vision.safetensors", "image_size": size}
    tokenizer = {
        "texture": {"kind": "small_vae", "weights": f"{runs}/texture.safetensors"},
        "vision": vision,
        "semantic": {"kind": "semantic_vae", "weights": f"{runs}/semvae.safetensors", "heads": 4},
    }
    latents = {"texture_channels": 32, "semantic_channels": 16, "size": grid}
    batch = max(1, min(64, count // 2))
    source = {"kind": "mds", "path": f"{runs}/images"}
    return {
        "images": {
            "kind": "encode", "source": {"kind": "folder", "path": str(images), "size": size, "upright": True},
            "store": {"image": True, "latents": "none", "flip": False}, "out": f"{runs}/images",
        },
        "vision": {
            "extends": "quickstart/vision", "run": f"{runs}/vision", "data": {"path": f"{runs}/images"},
            "model": {"widths": widths, "num_classes": classes, "image_size": size}, "train": {"global_batch": batch},
        },
        "classifier": {"extends": "vision", "run": f"{runs}/classifier", "seed": 1},
        "semvae": {
            "extends": "quickstart/semvae", "run": f"{runs}/semvae", "data": {"path": f"{runs}/images"},
            "latents": latents, "tokenizer": {"vision": vision}, "model": {"input_dim": widths[-1]},
            "train": {"global_batch": batch},
        },
        "texture": {
            "extends": "quickstart/texture", "run": f"{runs}/texture", "data": {"path": f"{runs}/images"},
            "model": {
                "widths": [64, 128, 192][: halvings - 1], "blocks": 2, "latent_channels": 32, "image_size": size,
            },
            "train": {"steps": 4000, "global_batch": min(16, batch)},
        },
        "latents": {
            "extends": "quickstart/latents", "tokenizer": tokenizer, "latents": latents, "source": source,
            "out": f"{runs}/latents",
        },
        "train": {
            "extends": "quickstart/sfd", "run": f"{runs}/train", "data": {"path": f"{runs}/latents"},
            "tokenizer": tokenizer, "latents": latents,
            "model": {"num_classes": classes, "alignment": {"dim": widths[-1]}},
            "train": {"steps": 4000, "global_batch": batch}, "checkpoint": {"every": 1000, "every_s": 300.0},
        },
        "eval": {
            "extends": "quickstart/eval", "name": folder.name, "checkpoint": f"{runs}/train.safetensors",
            "extractor": {"weights": f"{runs}/classifier.safetensors"}, "reference": source,
        },
    }  # fmt: skip


def _with_pretrained(folder: Path, images: Path, classes: int, count: int, size: int) -> dict[str, dict[str, object]]:
    """The official tokenizers, and SFD-B."""
    runs = f"runs/{folder.name}"
    source = {"kind": "folder", "path": str(images), "size": size, "upright": True}
    batch = max(1, min(256, count // 2))
    return {
        "latents": {
            "extends": "data/encode_imagenet256", "name": folder.name, "source": source, "out": f"{runs}/latents",
        },
        "train": {
            "extends": "train/sfd_b", "run": f"{runs}/train", "published": None, "data": {"path": f"{runs}/latents"},
            "model": {"num_classes": classes}, "train": {"steps": 100_000, "global_batch": batch},
        },
        "eval": {
            "extends": "eval/imagenet256", "kind": "eval", "name": folder.name,
            "num_samples": min(50_000, max(count, 2)), "checkpoint": f"{runs}/train.safetensors",
            "reference": source,
        },
    }  # fmt: skip


def _commands(folder: Path, recipes: dict[str, dict[str, object]]) -> list[str]:
    """The commands of a project, in order."""
    runs = f"runs/{folder.name}"
    encode = [f"sfd encode {folder}/images"] if "images" in recipes else []
    trained = [name for name in ("vision", "classifier", "semvae", "texture") if name in recipes]
    tokenizers = [
        line
        for name in trained
        for line in (f"sfd train {folder}/{name}", f"sfd export {runs}/{name} --out {runs}/{name}.safetensors")
    ]
    return [
        *encode, *tokenizers, f"sfd encode {folder}/latents", f"sfd train {folder}/train",
        f"sfd export {runs}/train --out {runs}/train.safetensors",
        f"sfd sample {runs}/train.safetensors --out {folder}/samples.png --guidance 1.5",
        f"sfd eval generate {folder}/eval --out {runs}/samples",
        f"sfd eval score {folder}/eval --samples {runs}/samples",
    ]  # fmt: skip
