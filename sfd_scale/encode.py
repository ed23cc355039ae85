"""Images → shards, on any number of ranks, in chunks that a second start does not repeat."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sfd_scale import distributed
from sfd_scale.data.images import Source, UnreadableImage
from sfd_scale.data.schema import FLIPPED, Manifest, StoredDtype, encoding, stored
from sfd_scale.data.writer import ChunkNote, Claims, claim, finish, is_complete, write_chunk
from sfd_scale.latents import StatsAccumulator
from sfd_scale.logs import progress
from sfd_scale.tokenizers.composite import CompositeTokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """What is kept of each image.

    image: its pixels. latents: the posterior mean, or `moments`, mean and log-variance, so that training draws anew
    each time. features: the alignment features, for `shards`. flip: all of these of the mirrored image too.
    """

    image: bool = False
    latents: Literal["none", "mean", "moments"] = "mean"
    features: Literal["none", "shards"] = "none"
    dtype: StoredDtype = "float16"
    flip: bool = True
    chunk: int = 512  # images a chunk
    batch: int = 64  # images encoded at once
    num_workers: int = 0  # processes that decode image files
    skip_unreadable: bool = False

    def __post_init__(self) -> None:
        for name, least in (("chunk", 1), ("batch", 1), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)}; allowed: {least} and up")
        if not (self.image or self.latents != "none" or self.features != "none"):
            raise ValueError("latents: none, and nothing else is stored either; allowed: mean, moments, or image true")


def encode(
    source: Source, tokenizer: CompositeTokenizer | None, store: StoreConfig, out: Path, recipe: Mapping[str, Any]
) -> Manifest:
    """Write shards, statistics and the manifest. Goes on where a start was cut off, and remakes shards that were lost;
    returns at once where nothing is missing.

    Args:
        recipe: the resolved recipe as plain values, with a `store` entry; it is kept in the manifest.

    Raises:
        ValueError: if the folder holds another recipe's data, or images could not be read and may not be skipped.
    """
    identities = {} if tokenizer is None else tokenizer.identities
    claim(out, {**_decisive(recipe), "tokenizers": identities})
    count = -(-len(source) // store.chunk)
    # Rank 0 decides for all, as files of other nodes may show late.
    if distributed.broadcast_object(distributed.is_main() and is_complete(out, count)):
        logger.info("%s is complete", out)
        return _checked(Manifest.read(out), store, out)
    columns = _columns(source, tokenizer, store)
    claims = Claims(out, count)
    spans = [range(c * store.chunk, min((c + 1) * store.chunk, len(source))) for c in range(count)]
    todo = sum(len(spans[chunk]) for chunk in claims.todo)
    with progress(len(source), f"encode {out.name}", "images") as bar:
        bar.skip(len(source) - todo)
        shown = 0
        for chunk in claims:
            stats = StatsAccumulator(tokenizer.layout.channels) if tokenizer and store.latents != "none" else None
            note = ChunkNote([], stats)
            write_chunk(out, chunk, columns, _rows(source, tokenizer, store, spans[chunk], note), note)
            taken = min(claims.taken * store.chunk, todo)  # by all ranks
            bar.advance(taken - shown)
            shown = taken
        claims.close()
    manifest = finish(
        out, count, num_classes=source.num_classes, image_size=source.size, columns=columns, dtype=store.dtype,
        tokenizers=identities, recipe=dict(recipe),
    )  # fmt: skip
    logger.info("%s: %d samples", out, manifest.num_samples)
    return _checked(manifest, store, out)


def _decisive(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without how it is worked on, and where."""
    store = {k: v for k, v in recipe["store"].items() if k not in ("batch", "num_workers", "skip_unreadable")}
    return {**{k: v for k, v in recipe.items() if k not in ("name", "out")}, "store": store}


def _checked(manifest: Manifest, store: StoreConfig, out: Path) -> Manifest:
    if manifest.unreadable and not store.skip_unreadable:
        raise ValueError(
            f"{len(manifest.unreadable)} images could not be read and are left out, listed in {out}/manifest.json; "
            f"first: {manifest.unreadable[0]}; mend them and encode into another folder, or set "
            "store.skip_unreadable=true"
        )
    return manifest


def _columns(source: Source, tokenizer: CompositeTokenizer | None, store: StoreConfig) -> dict[str, str]:
    columns = {"id": "int", "label": "int"}
    if store.image:
        columns["image"] = f"ndarray:uint8:3,{source.size},{source.size}"
    named: dict[str, str] = {}
    if tokenizer is not None and store.latents != "none":
        named["latents"] = encoding(store.dtype, tokenizer.layout.shape)
        if store.latents == "moments":
            named["logvar"] = named["latents"]
    if tokenizer is not None and store.features == "shards":
        if tokenizer.vision is None:
            raise ValueError("store.features: shards, but tokenizer.vision is null; name a vision encoder")
        grid = tokenizer.vision.grid(source.size)
        named["features"] = encoding(store.dtype, (tokenizer.vision.dim, grid, grid))
    for suffix in ("", FLIPPED) if store.flip else ("",):
        columns |= {f"{name}{suffix}": form for name, form in named.items()}
    return columns


class _Images(Dataset[tuple[int, Tensor | str, int]]):
    """A source for worker processes: an unreadable image comes back as its message."""

    def __init__(self, source: Source, ids: range) -> None:
        self.source, self.ids = source, ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> tuple[int, Tensor | str, int]:
        index = self.ids[row]
        try:
            image, label = self.source[index]
        except UnreadableImage as error:
            return index, str(error), -1
        return index, image, label


def _rows(
    source: Source, tokenizer: CompositeTokenizer | None, store: StoreConfig, ids: range, note: ChunkNote
) -> Iterator[dict[str, Any]]:
    """The rows of a chunk; fills the note."""
    loader = DataLoader(
        _Images(source, ids), store.batch, num_workers=store.num_workers, collate_fn=list, generator=torch.Generator()
    )
    for items in loader:
        note.unreadable.extend(item for _, item, _ in items if isinstance(item, str))
        whole = [(index, item, label) for index, item, label in items if isinstance(item, Tensor)]
        if not whole:
            continue
        images = torch.stack([image for _, image, _ in whole])
        parts: dict[str, np.ndarray[Any, Any]] = {"image": images.numpy()} if store.image else {}
        for suffix in ("", FLIPPED) if store.flip else ("",):
            if tokenizer is not None:
                turned = images.flip(3) if suffix else images
                parts |= {f"{k}{suffix}": v for k, v in _encoded(tokenizer, store, turned, note.stats).items()}
        for row, (index, _, label) in enumerate(whole):
            yield {"id": index, "label": label, **{name: values[row] for name, values in parts.items()}}


def _encoded(
    tokenizer: CompositeTokenizer, store: StoreConfig, images: Tensor, stats: StatsAccumulator | None
) -> dict[str, np.ndarray[Any, Any]]:
    encoded = tokenizer.encode(images.to(distributed.device()))
    parts: dict[str, Tensor] = {}
    if store.latents != "none":
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
