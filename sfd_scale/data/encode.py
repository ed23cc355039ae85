"""Encodes images to MDS shards, in chunks, on any number of ranks. A restart skips complete chunks."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sfd_scale import config
from sfd_scale.data.image_io import UnreadableImage
from sfd_scale.data.manifest import FLIPPED, Manifest, StoredDtype, encoding, stored
from sfd_scale.data.sources import Source, listing_sha256
from sfd_scale.data.waiting import bounded
from sfd_scale.data.workers import worker_batches
from sfd_scale.data.writer import (
    ChunkNote,
    Description,
    finish,
    is_committed,
    is_complete,
    remove_leftovers,
    require_recipe,
    write_chunk,
    writing,
)
from sfd_scale.diffusion.latents import StatsAccumulator
from sfd_scale.runtime import distributed
from sfd_scale.runtime.chunks import Claims
from sfd_scale.runtime.progress import progress
from sfd_scale.runtime.settings import NoEffectOnResults, at_least
from sfd_scale.tokenizers.composite import CompositeTokenizer, FeatureTokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """What is stored for each image.

    image: the pixels.
    latents: `mean`, the posterior mean; or `moments`, mean and log-variance, so that training samples the posterior.
    features: `shards`, the alignment features.
    dtype: of latents and features.
    flip: store latents and features of the mirrored image too.
    chunk: images per chunk. batch: images per forward pass. num_workers: processes that decode image files.
    skip_unreadable: leave unreadable images out; otherwise they are an error at the end.
    """

    image: bool = False
    latents: Literal["none", "mean", "moments"] = "mean"
    features: Literal["none", "shards"] = "none"
    dtype: StoredDtype = "float16"
    flip: bool = True
    chunk: int = 512
    batch: NoEffectOnResults[int] = 64
    num_workers: NoEffectOnResults[int] = 0
    skip_unreadable: NoEffectOnResults[bool] = False

    def __post_init__(self) -> None:
        at_least(self, chunk=1, batch=1, num_workers=0)
        if not (self.image or self.latents != "none" or self.features != "none"):
            raise ValueError("latents: none, but image and features are off too; allowed: mean, moments, or image=true")


def encode(source: Source, tokenizer: FeatureTokenizer | None, store: StoreConfig, out: Path, recipe: Any) -> Manifest:
    """Write shards, statistics and the manifest.

    An interrupted encode resumes. Shards that were lost are written again. A complete folder is left as it is.

    Args:
        tokenizer: a CompositeTokenizer if latents are stored, a FeatureTokenizer if only features are, else None.
        recipe: the recipe of source, tokenizer and store. It is kept in the manifest.

    Raises:
        ValueError: if the folder has data of another recipe or of other images, or images are unreadable and
            skip_unreadable is false.
    """
    fingerprints = {} if tokenizer is None else tokenizer.fingerprints
    decisive = {**config.settings_affecting_results(recipe), "tokenizers": fingerprints}
    listing = listing_sha256(source)
    images = None if listing is None else {"count": len(source), "sha256": listing}
    count = -(-len(source) // store.chunk)
    # Rank 0 decides: on a network file system the other nodes may see new files late.
    if distributed.broadcast_object(distributed.is_main() and is_complete(out, count)):
        require_recipe(out, decisive, images)
        if distributed.is_main():
            remove_leftovers(out)
        logger.info("%s is complete", out)
        return _checked(Manifest.read(out), store, out)
    columns = _columns(source, tokenizer, store)
    with writing(out) as claims:
        require_recipe(out, decisive, images)
        _write_chunks(source, tokenizer, store, out, columns, claims)
        description = Description(
            num_classes=source.num_classes, image_size=source.size, columns=columns, dtype=store.dtype,
            tokenizers=fingerprints, recipe=config.to_dict(recipe), classes=source.classes,
        )  # fmt: skip
        manifest = finish(out, count, description)
    logger.info("%s: %d samples", out, manifest.num_samples)
    return _checked(manifest, store, out)


def _write_chunks(
    source: Source, tokenizer: FeatureTokenizer | None, store: StoreConfig, out: Path, columns: Mapping[str, str],
    claims: Claims,
) -> None:  # fmt: skip
    """Write the missing chunks, on all ranks."""
    count = -(-len(source) // store.chunk)
    spans = [range(c * store.chunk, min((c + 1) * store.chunk, len(source))) for c in range(count)]

    def done(missing: Sequence[int]) -> int:
        return len(source) - sum(len(spans[chunk]) for chunk in missing)

    with progress(len(source), f"encode {out.name}", "images") as bar:
        for todo, mine in claims.rounds(count, partial(is_committed, out)):
            bar.skip(done(todo) - bar.done)
            for chunk, batches in _chunk_batches(source, mine, spans, store):
                composite = tokenizer if isinstance(tokenizer, CompositeTokenizer) else None
                note = ChunkNote([], None if composite is None else StatsAccumulator(composite.layout.channels))
                write_chunk(out, chunk, columns, _samples(batches, tokenizer, store, note), note)
                bar.advance(done(claims.unclaimed(todo)) - bar.done)  # by all ranks


def _checked(manifest: Manifest, store: StoreConfig, out: Path) -> Manifest:
    if manifest.unreadable:
        told = (
            f"{len(manifest.unreadable)} images could not be read and are left out, listed in {out}/manifest.json; "
            f"first: {manifest.unreadable[0]}"
        )
        if not store.skip_unreadable:
            raise ValueError(
                f"{told}; set store.skip_unreadable=true to use this folder without them, or repair the images and "
                "encode into another folder"
            )
        logger.warning("%s", told)
    return manifest


def _columns(source: Source, tokenizer: FeatureTokenizer | None, store: StoreConfig) -> dict[str, str]:
    columns = {"id": "int", "label": "int"}
    if store.image:
        columns["image"] = f"ndarray:uint8:3,{source.size},{source.size}"
    named: dict[str, str] = {}
    if isinstance(tokenizer, CompositeTokenizer):
        named["latents"] = encoding(store.dtype, tokenizer.layout.shape)
        if store.latents == "moments":
            named["logvar"] = named["latents"]
    if tokenizer is not None and store.features == "shards":
        if tokenizer.vision is None:
            raise ValueError("store.features: shards, but tokenizer.vision is null; name a vision encoder")
        grid = tokenizer.vision.grid(source.size)
        named["features"] = encoding(store.dtype, (tokenizer.vision.dim, grid, grid))
    assert (store.latents != "none") == isinstance(tokenizer, CompositeTokenizer)
    for suffix in ("", FLIPPED) if store.flip else ("",):
        columns |= {f"{name}{suffix}": form for name, form in named.items()}
    return columns


@dataclass(frozen=True)
class _Batch:
    """The readable images (N, 3, H, W) uint8 of a batch, and error messages for the others.

    start: index of the first image of the batch, readable or not.
    """

    start: int
    ids: list[int]
    labels: list[int]
    images: Tensor
    unreadable: list[str]

    @classmethod
    def read(cls, source: Source, indices: list[int]) -> _Batch:
        ids, labels, images, unreadable = list[int](), list[int](), list[Tensor](), list[str]()
        for index in indices:
            try:
                image, label = source[index]
            except UnreadableImage as error:
                unreadable.append(str(error))
                continue
            ids.append(index)
            labels.append(label)
            images.append(image)
        return cls(indices[0], ids, labels, torch.stack(images) if images else torch.empty(0), unreadable)


def _batch_indices(chunks: Iterator[int], spans: list[range], batch: int) -> Iterator[list[int]]:
    """The image indices of the batches of this rank's chunks, chunk by chunk."""
    for chunk in chunks:
        ids = spans[chunk]
        yield from (list(ids[start : start + batch]) for start in range(0, len(ids), batch))


def _chunk_batches(
    source: Source, chunks: Iterator[int], spans: list[range], store: StoreConfig
) -> Iterator[tuple[int, Iterator[_Batch]]]:
    """This rank's chunks, each with its batches. One dataloader serves all chunks, so its workers never pause."""
    images = worker_batches(
        partial(_Batch.read, source), _batch_indices(chunks, spans, store.batch), num_workers=store.num_workers,
        setting="store.num_workers", batch_bytes=3 * source.size**2 * store.batch,
    )  # fmt: skip
    batches = bounded(images)
    for first in batches:
        chunk = first.start // store.chunk
        rest = -(-len(spans[chunk]) // store.batch) - 1
        yield chunk, chain([first], islice(batches, rest))


def _samples(
    batches: Iterator[_Batch], tokenizer: FeatureTokenizer | None, store: StoreConfig, note: ChunkNote
) -> Iterator[dict[str, Any]]:
    """The samples of a chunk. Fills the note with unreadable images and statistics."""
    for batch in batches:
        note.unreadable.extend(batch.unreadable)
        if not batch.ids:
            continue
        parts: dict[str, np.ndarray[Any, Any]] = {"image": batch.images.numpy()} if store.image else {}
        for suffix in ("", FLIPPED) if store.flip else ("",):
            if tokenizer is not None:
                images = batch.images.flip(3) if suffix else batch.images
                parts |= {f"{k}{suffix}": v for k, v in _encoded(tokenizer, store, images, note.stats).items()}
        for row, (index, label) in enumerate(zip(batch.ids, batch.labels, strict=True)):
            yield {"id": index, "label": label, **{name: values[row] for name, values in parts.items()}}


def _encoded(
    tokenizer: FeatureTokenizer, store: StoreConfig, images: Tensor, stats: StatsAccumulator | None
) -> dict[str, np.ndarray[Any, Any]]:
    images = images.to(distributed.device())
    if not isinstance(tokenizer, CompositeTokenizer):
        return {"features": stored(tokenizer.features(images), store.dtype)}
    encoded = tokenizer.encode(images)
    parts: dict[str, Tensor] = {}
    parts["latents"] = encoded.latents
    if stats is not None:
        stats.update(encoded.latents)
    if store.latents == "moments":
        if encoded.logvar is None:
            raise ValueError("store.latents: moments, but these codecs have no posterior variance; allowed: mean")
        parts["logvar"] = encoded.logvar
    if store.features == "shards" and encoded.features is not None:
        parts["features"] = encoded.features
    return {name: stored(part, store.dtype) for name, part in parts.items()}
