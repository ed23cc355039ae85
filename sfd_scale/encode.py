"""What comes before training: images or feature files → shards, and codecs in closed form."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sfd_scale.data.convert import convert as convert_files
from sfd_scale.data.encode import encode as encode_images
from sfd_scale.data.sources import Source, make_source
from sfd_scale.recipe import ConvertRecipe, EncodeRecipe, FitRecipe
from sfd_scale.runtime import distributed
from sfd_scale.tokenizers.composite import FeatureTokenizer
from sfd_scale.tokenizers.make import make_composite, make_features
from sfd_scale.tokenizers.patch_pca import PatchPCA, PatchPCAFitConfig, patch_rows
from sfd_scale.tokenizers.pca import FeaturePCA, feature_rows, fit_in_order

logger = logging.getLogger(__name__)


def encode(recipe: EncodeRecipe) -> None:
    """Images to shards, on any number of ranks."""
    distributed.init()
    source = make_source(recipe.source)  # before networks that may have to be downloaded
    tokenizer: FeatureTokenizer | None = None
    if recipe.store.latents != "none":
        tokenizer = make_composite(recipe.tokenizer, recipe.latents, distributed.device())
    elif recipe.store.features != "none":
        tokenizer = make_features(recipe.tokenizer, distributed.device())
    encode_images(source, tokenizer, recipe.store, recipe.out, recipe)


def convert(recipe: ConvertRecipe) -> None:
    """The authors' feature files to shards, on any number of ranks."""
    distributed.init()
    convert_files(recipe.convert, recipe.out)


def fit(recipe: FitRecipe) -> None:
    """A closed-form codec from the first images of a source, a batch at a time, on any number of ranks: each batch is
    reduced by the rank whose turn it is and merged in the order of batches, so the file is the same to the last bit."""
    distributed.init()
    source = make_source(recipe.source)
    count = min(recipe.num_images, len(source))
    batches = [range(start, min(start + recipe.batch, count)) for start in range(0, count, recipe.batch)]
    images = _images(source, batches[distributed.rank() :: distributed.world_size()], recipe.num_workers)
    codec: PatchPCA | FeaturePCA
    if isinstance(recipe.codec, PatchPCAFitConfig):
        codec = _fit_patches(recipe.codec, images, len(batches), recipe)
    else:
        vision = make_features(recipe.tokenizer, distributed.device())
        rows = (feature_rows(vision.features(batch.to(distributed.device()))) for batch in images)
        codec = FeaturePCA(fit_in_order(rows, len(batches), recipe.codec.channels))
    if distributed.is_main():
        codec.save(recipe.out)
        logger.info("%s: fitted to %d images, %s", recipe.out, count, codec.fingerprint)
    distributed.barrier()


def _fit_patches(settings: PatchPCAFitConfig, images: Iterator[Tensor], count: int, recipe: FitRecipe) -> PatchPCA:
    patch, channels, alignment = settings.patch, settings.channels, settings.alignment
    if alignment == 0:
        return PatchPCA(fit_in_order((patch_rows(batch, patch) for batch in images), count, channels))
    device = distributed.device()
    vision = make_features(recipe.tokenizer, device)

    def rows(batch: Tensor) -> Tensor:
        pixels, features = patch_rows(batch, patch), feature_rows(vision.features(batch.to(device))).cpu()
        if len(pixels) != len(features):
            sides = batch.shape[2] // patch, round((len(features) / len(batch)) ** 0.5)
            raise ValueError(
                f"codec.patch: {patch} makes a grid of {sides[0]}; allowed: {sides[1]}, as of the features"
            )
        return torch.cat([pixels, features], 1)

    inputs = 3 * patch**2
    return PatchPCA(
        fit_in_order(map(rows, images), count, channels, lambda total: total.aligned(channels, inputs, alignment))
    )


class _Pixels(torch.utils.data.Dataset[Tensor]):
    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, index: int) -> Tensor:
        return self.source[index][0]


def _images(source: Source, batches: list[range], num_workers: int) -> Iterator[Tensor]:
    loader = DataLoader(
        _Pixels(source), batch_sampler=[list(batch) for batch in batches], num_workers=num_workers,
        collate_fn=torch.stack, generator=torch.Generator(),
    )  # fmt: skip
    return iter(loader)
