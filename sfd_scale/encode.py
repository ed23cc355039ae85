"""Data preparation: `sfd encode`, `sfd convert` and `sfd fit`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from sfd_scale.data.convert import convert as convert_files
from sfd_scale.data.encode import encode as encode_images
from sfd_scale.data.sources import Source, make_source
from sfd_scale.data.waiting import bounded
from sfd_scale.data.workers import worker_batches
from sfd_scale.recipe import ConvertRecipe, EncodeRecipe, FitRecipe
from sfd_scale.runtime import distributed
from sfd_scale.runtime.files import require_output
from sfd_scale.tokenizers.composite import FeatureTokenizer
from sfd_scale.tokenizers.make import make_composite, make_features
from sfd_scale.tokenizers.patch_pca import PatchPCA, PatchPCAFitConfig, patch_rows
from sfd_scale.tokenizers.pca import FeaturePCA, feature_rows, fit_in_order

logger = logging.getLogger(__name__)


def encode(recipe: EncodeRecipe) -> None:
    """Encode images to shards, on any number of ranks."""
    distributed.init()
    source = make_source(recipe.source)  # before networks that may be downloaded, so that its errors come first
    tokenizer: FeatureTokenizer | None = None
    if recipe.store.latents != "none":
        tokenizer = make_composite(recipe.tokenizer, recipe.latents, distributed.device())
    elif recipe.store.features != "none":
        tokenizer = make_features(recipe.tokenizer, distributed.device())
    encode_images(source, tokenizer, recipe.store, recipe.out, recipe)


def convert(recipe: ConvertRecipe) -> None:
    """Convert the feature files of the official code to shards, on any number of ranks."""
    distributed.init()
    convert_files(recipe.convert, recipe.out)


def fit(recipe: FitRecipe) -> None:
    """Fit a closed-form codec (PCA) to the first images of a source, on any number of ranks.

    The ranks reduce batches in turn, and the batches are merged in order. So the file does not depend on the number of
    ranks, to the last bit.
    """
    distributed.init()
    if distributed.is_main():
        require_output(recipe.out, "out")
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
                f"codec.patch: {patch} gives a grid of {sides[0]}; allowed: a grid of {sides[1]}, that of the features"
            )
        return torch.cat([pixels, features], 1)

    inputs = 3 * patch**2
    return PatchPCA(
        fit_in_order(map(rows, images), count, channels, lambda total: total.aligned(channels, inputs, alignment))
    )


def _read(source: Source, indices: list[int]) -> Tensor:
    """The images (N, 3, H, W) of some indices."""
    return torch.stack([source[index][0] for index in indices])


def _images(source: Source, batches: list[range], num_workers: int) -> Iterator[Tensor]:
    most = max(map(len, batches), default=0)
    images = worker_batches(
        partial(_read, source), map(list, batches), num_workers=num_workers, setting="num_workers",
        batch_bytes=3 * source.size**2 * most,
    )  # fmt: skip
    return bounded(images)


if __name__ == "__main__":
    from sfd_scale.__main__ import main

    main("encode")
