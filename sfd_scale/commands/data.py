"""Commands for data: `sfd init`, `encode`, `convert`, `fit`, `check-data`, `import-data`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sfd_scale.launch.command_line import Overrides, Recipe, load_recipe

if TYPE_CHECKING:
    from sfd_scale.recipe import ConvertRecipe, EncodeRecipe, FitRecipe

app = typer.Typer()


def _encode_recipe() -> type[EncodeRecipe]:
    from sfd_scale.recipe import EncodeRecipe

    return EncodeRecipe


def _convert_recipe() -> type[ConvertRecipe]:
    from sfd_scale.recipe import ConvertRecipe

    return ConvertRecipe


def _fit_recipe() -> type[FitRecipe]:
    from sfd_scale.recipe import FitRecipe

    return FitRecipe


@app.command()
def init(
    name: Annotated[str, typer.Argument(help="The project: a new folder for its recipes.")],
    images: Annotated[Path, typer.Option(help="Your images: one folder per class.")],
    size: Annotated[
        int | None, typer.Option(help="Pixels: 256 with the official tokenizers; 32, 64 or 128 with small ones.")
    ] = None,
    codec: Annotated[
        Literal["auto", "small", "sfd"],
        typer.Option(help="sfd: the official pretrained tokenizers; small: made from your images; auto: what is here."),
    ] = "auto",
) -> None:
    """Write the recipes of a project on your own images, and print the commands to run."""
    from sfd_scale.data.project import init as write

    _, commands = write(name, images, size, codec)
    typer.echo("\n".join(commands))


@app.command()
def encode(recipe: Recipe, overrides: Overrides = None) -> None:
    """Encode images to shards (images, composite latents, features). The same command resumes."""
    loaded = load_recipe(recipe, _encode_recipe, overrides)
    from sfd_scale.encode import encode as run

    run(loaded)


@app.command()
def convert(recipe: Recipe, overrides: Overrides = None) -> None:
    """Convert feature files of the official code (safetensors) to shards, and verify counts and checksums."""
    loaded = load_recipe(recipe, _convert_recipe, overrides)
    from sfd_scale.encode import convert as run

    run(loaded)


@app.command()
def fit(recipe: Recipe, overrides: Overrides = None) -> None:
    """Fit a closed-form codec to images: PCA of patches, or PCA of features."""
    loaded = load_recipe(recipe, _fit_recipe, overrides)
    from sfd_scale.encode import fit as run

    run(loaded)


@app.command("check-data")
def check_data(path: Annotated[Path, typer.Argument(help="A folder of shards.")]) -> None:
    """Verify the size and hash of every shard."""
    from sfd_scale.data.shards import check_data as check
    from sfd_scale.data.shards import without_hash

    bad = check(path)
    if count := without_hash(path):
        typer.echo(f"{path}: {count} shards have no SHA-256 in index.json; only their size was checked", err=True)
    for line in bad:
        typer.echo(line, err=True)
    typer.echo(f"{path}: {'all shards are complete' if not bad else f'{len(bad)} shards are damaged'}")
    sys.exit(1 if bad else 0)


@app.command("import-data")
def import_data(
    path: Annotated[Path, typer.Argument(help="A folder of MDS shards that another program wrote.")],
    image_size: Annotated[int, typer.Option(min=1, help="Width of the images in pixels.")] = 256,
    num_classes: Annotated[int | None, typer.Option(min=1, help="Default: the highest label and one.")] = None,
) -> None:
    """Make MDS shards of another program readable: write their manifest and latent statistics beside them."""
    from sfd_scale.data.import_mds import import_data as run

    manifest = run(path, image_size, num_classes)
    typer.echo(f"{path}: {manifest.num_samples} samples of {manifest.num_classes} classes, {list(manifest.columns)}")
