"""Import plain MDS shards that another program wrote with MosaicML's MDSWriter: make their manifest and statistics."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sfd_scale.data.image_files import MAX_CLASSES
from sfd_scale.data.manifest import FLIPPED, MANIFEST, STATS, Manifest, StoredDtype, index_sha256, read_index, restored
from sfd_scale.data.mds_reader import MDSReader
from sfd_scale.data.shards import check_sizes
from sfd_scale.diffusion.latents import StatsAccumulator
from sfd_scale.runtime.progress import progress

_BATCH = 64  # samples of one read
_PARTS = ("latents", "features", "image")
_DTYPES: dict[str, StoredDtype] = {"float16": "float16", "uint16": "bfloat16"}  # bfloat16 is stored by its bits


def import_data(path: Path, image_size: int, num_classes: int | None = None) -> Manifest:
    """Write manifest.json and stats.safetensors beside the shards. The shards stay as they are.

    Args:
        path: a folder with index.json. Columns: `label` (int), and `latents` (C, H, W), `features` (D, H, W) or
            `image` (3, S, S) as sized ndarrays; with `_flip` for the mirrored image.
        image_size: width of the images in pixels.
        num_classes: by default the highest label and one.

    Raises:
        ValueError: if the folder is complete already, or a column is missing or of another type.
    """
    if (path / MANIFEST).exists():
        raise ValueError(f"{path}: it has a {MANIFEST} already; remove it to import the data anew")
    check_sizes(path)
    reader, entries = MDSReader(path), read_index(path)["shards"]
    if reader.num_samples == 0:
        raise ValueError(f"{path}: no samples in its {len(entries)} shards; write the data again")
    entry = entries[0]
    columns = dict(zip(entry["column_names"], entry["column_encodings"], strict=True))
    if any(shard.columns != reader.shards[0].columns for shard in reader.shards):
        raise ValueError(f"{path}: its shards have different columns")
    dtype = _check_columns(path, columns)
    _check_shapes(path, {name: column.shape for name, column in reader.shards[0].columns.items()}, image_size)
    labels, stats = [-1], None
    if "latents" in columns:
        stats = StatsAccumulator(reader.shards[0].columns["latents"].shape[0])
    with progress(reader.num_samples, "import", "samples") as bar:
        for start in range(0, reader.num_samples, _BATCH):
            ids = range(start, min(start + _BATCH, reader.num_samples))
            names = [name for name in ("latents", f"latents{FLIPPED}") if name in columns]
            found, *latents = reader.gather(ids, [[name] * len(ids) for name in ("label", *names)])
            if found.min() < 0:
                raise ValueError(f"{path}: a label is {found.min()}; allowed: 0 and up")
            if found.max() >= MAX_CLASSES:
                raise ValueError(f"{path}: a label is {found.max()}; allowed: 0 to {MAX_CLASSES - 1:,}")
            labels.append(int(found.max()))
            for values in latents:
                assert stats is not None
                stats.update(restored(values, dtype))
            bar.advance(len(ids))
    classes = max(labels) + 1
    if num_classes is not None and num_classes < classes:
        raise ValueError(f"--num-classes: {num_classes}, but a label is {classes - 1}")
    stats_hash = None
    if stats is not None:
        try:
            finished = stats.finish()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        finished.save(path / STATS)
        stats_hash = finished.hash
    manifest = Manifest(
        num_samples=reader.num_samples, num_classes=num_classes or classes, image_size=image_size, columns=columns,
        dtype=dtype, index_sha256=index_sha256(path), stats_hash=stats_hash, recipe={"imported": True},
    )  # fmt: skip
    manifest.write(path)
    return manifest


def _check_columns(path: Path, columns: dict[str, str]) -> StoredDtype:
    """The type of latents and features.

    Raises:
        ValueError: naming the column.
    """
    if columns.get("label") != "int":
        raise ValueError(f"{path}: its column 'label' is {columns.get('label')}; allowed: int")
    if not any(part in columns for part in _PARTS):
        raise ValueError(f"{path}: columns {list(columns)}; allowed: at least one of {', '.join(_PARTS)}")
    types = set()
    for name, form in columns.items():
        kind = form.split(":")[1] if form.startswith("ndarray") else form
        if name == "image" and kind != "uint8":
            raise ValueError(f"{path}: its column 'image' is {form}; allowed: ndarray:uint8:3,S,S")
        if name.removesuffix(FLIPPED) in ("latents", "features", "logvar"):
            if kind not in _DTYPES:
                raise ValueError(
                    f"{path}: its column {name!r} is {form}; allowed: float16, or uint16 with the bits of bfloat16"
                )
            types.add(kind)
    if len(types) > 1:
        raise ValueError(f"{path}: its columns have the types {sorted(types)}; allowed: one of them")
    return _DTYPES[types.pop()] if types else "float16"


def _check_shapes(path: Path, shapes: Mapping[str, tuple[int, ...]], image_size: int) -> None:
    """Check the images by `image_size`, and the mirrored columns by their own.

    Raises:
        ValueError: naming the column.
    """
    wanted = (3, image_size, image_size)
    if shapes.get("image", wanted) != wanted:
        raise ValueError(
            f"{path}: its column 'image' has the shape {shapes['image']}, with --image-size {image_size}; allowed: "
            f"{wanted}, channels first"
        )
    for name in ("latents", "features", "logvar"):
        plain, mirrored = shapes.get(name), shapes.get(f"{name}{FLIPPED}")
        if plain is not None and len(plain) != 3:
            raise ValueError(f"{path}: its column {name!r} has the shape {plain}; allowed: (channels, height, width)")
        if plain is not None and mirrored is not None and mirrored != plain:
            raise ValueError(f"{path}: its column '{name}{FLIPPED}' has the shape {mirrored}; allowed: {plain}")
