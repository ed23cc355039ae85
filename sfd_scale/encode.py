"""Images → shards, on any number of ranks, in chunks that a second start does not repeat."""

from __future__ import annotations

import json
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
from sfd_scale.data.schema import FLIPPED, STATS, Manifest, index_sha256
from sfd_scale.data.writer import ChunkNote, drop_chunks, is_committed, join_chunks, share, write_chunk
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
    dtype: Literal["float16", "bfloat16"] = "float16"
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
    """Write shards, statistics and the manifest; continues or returns at once where the folder already has them.

    Raises:
        ValueError: if the folder holds another recipe's data, or images could not be read and may not be skipped.
    """
    _claim(out, recipe)
    if (out / "manifest.json").exists():
        logger.info("%s is complete", out)
        return Manifest.read(out)
    chunks = range(-(-len(source) // store.chunk))
    columns = _columns(source, tokenizer, store)
    own = share(chunks, distributed.rank(), distributed.world_size())
    with progress(len(own) * store.chunk, f"encode {out.name}", "images") as bar:
        for chunk in own:
            ids = range(chunk * store.chunk, min((chunk + 1) * store.chunk, len(source)))
            if is_committed(out, chunk):
                bar.skip(len(ids))
                continue
            unreadable: list[str] = []
            stats = StatsAccumulator(tokenizer.layout.channels) if tokenizer and store.latents != "none" else None
            state = {} if stats is None else stats.state()
            note = ChunkNote(unreadable, None if stats is None else state)
            rows = _rows(source, tokenizer, store, ids, unreadable, stats, state)
            write_chunk(out, chunk, columns, rows, note)
            bar.advance(len(ids))
    distributed.barrier()
    if distributed.is_main():
        _finish(source, tokenizer, store, out, recipe, columns, len(chunks))
    distributed.barrier()
    manifest = Manifest.read(out)
    if manifest.unreadable and not store.skip_unreadable:
        raise ValueError(
            f"{len(manifest.unreadable)} images could not be read and are left out (listed in {out}/manifest.json; first: "
            f"{manifest.unreadable[0]}); mend them and encode anew, or set store.skip_unreadable=true"
        )
    return manifest


def _claim(out: Path, recipe: Mapping[str, Any]) -> None:
    """The folder belongs to one recipe, but for how it is worked on."""
    decisive = json.loads(json.dumps(recipe))
    for name in ("batch", "num_workers", "skip_unreadable"):
        decisive["store"].pop(name)
    path = out / "recipe.json"
    if distributed.is_main():
        out.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(json.dumps(decisive, indent=1), encoding="utf-8")
    distributed.barrier()
    if json.loads(path.read_text(encoding="utf-8")) != decisive:
        raise ValueError(f"out: {out} holds data of another recipe (its recipe.json); give another folder, or remove it")


def _columns(source: Source, tokenizer: CompositeTokenizer | None, store: StoreConfig) -> dict[str, str]:
    columns = {"id": "int", "label": "int"}
    named: dict[str, str] = {}
    kind = "float16" if store.dtype == "float16" else "uint16"
    if store.image:
        named["image"] = f"ndarray:uint8:3,{source.size},{source.size}"
    if tokenizer is not None and store.latents != "none":
        shape = ",".join(map(str, tokenizer.layout.shape))
        named["latents"] = f"ndarray:{kind}:{shape}"
        if store.latents == "moments":
            named["logvar"] = f"ndarray:{kind}:{shape}"
    if tokenizer is not None and store.features == "shards":
        if tokenizer.vision is None:
            raise ValueError("store.features: shards, but tokenizer.vision is null; name a vision encoder")
        grid = tokenizer.vision.grid(source.size)
        named["features"] = f"ndarray:{kind}:{tokenizer.vision.dim},{grid},{grid}"
    for suffix in ("", FLIPPED) if store.flip else ("",):
        columns |= {f"{name}{suffix}": encoding for name, encoding in named.items() if not (name == "image" and suffix)}
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
    source: Source, tokenizer: CompositeTokenizer | None, store: StoreConfig, ids: range, unreadable: list[str],
    stats: StatsAccumulator | None, state: dict[str, Tensor],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The rows of a chunk; fills `unreadable` and, at the end, `state` with the statistics of both flips."""
    loader = DataLoader(_Images(source, ids), store.batch, num_workers=store.num_workers, collate_fn=list)
    for items in loader:
        unreadable += [item for _, item, _ in items if isinstance(item, str)]
        whole = [(index, item, label) for index, item, label in items if isinstance(item, Tensor)]
        if not whole:
            continue
        images = torch.stack([image for _, image, _ in whole])
        parts: dict[str, np.ndarray[Any, Any]] = {"image": images.numpy()} if store.image else {}
        for suffix in ("", FLIPPED) if store.flip else ("",):
            if tokenizer is not None:
                turned = images.flip(3) if suffix else images
                parts |= {f"{k}{suffix}": v for k, v in _encoded(tokenizer, store, turned, stats).items()}
        for row, (index, _, label) in enumerate(whole):
            yield {"id": index, "label": label, **{name: values[row] for name, values in parts.items()}}
    if stats is not None:
        state |= stats.state()


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
    if store.dtype == "float16":
        return {name: part.cpu().to(torch.float16).numpy() for name, part in parts.items()}
    return {name: part.cpu().to(torch.bfloat16).view(torch.uint16).numpy() for name, part in parts.items()}


def _finish(
    source: Source, tokenizer: CompositeTokenizer | None, store: StoreConfig, out: Path, recipe: Mapping[str, Any],
    columns: dict[str, str], num_chunks: int,
) -> None:  # fmt: skip
    notes = join_chunks(out, num_chunks)
    unreadable = [line for note in notes for line in note.unreadable]
    stats_hash = None
    if tokenizer is not None and store.latents != "none":
        total = StatsAccumulator(tokenizer.layout.channels)
        for note in notes:  # in the order of chunks: the same bits for any number of ranks
            if note.stats is not None:
                total.merge(StatsAccumulator.from_state(note.stats))
        stats = total.finish()
        stats.save(out / STATS)
        stats_hash = stats.hash
    Manifest(
        num_samples=len(source) - len(unreadable), num_classes=source.num_classes, image_size=source.size,
        columns=columns, dtype=store.dtype, index_sha256=index_sha256(out), stats_hash=stats_hash,
        tokenizers={} if tokenizer is None else tokenizer.identities, unreadable=unreadable, recipe=dict(recipe),
    ).write(out)  # fmt: skip
    drop_chunks(out)
    logger.info("%s: %d samples", out, len(source) - len(unreadable))
