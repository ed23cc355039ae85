"""Images in Parquet files, as in datasets on the Hugging Face hub: a column of encoded images, a column of labels."""

from __future__ import annotations

import bisect
import io
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from sfd_scale.data.image_files import MAX_CLASSES, is_hidden, list_files, sort_key
from sfd_scale.data.image_io import UnreadableImage, read_image
from sfd_scale.runtime.file_kind import file_error
from sfd_scale.runtime.settings import at_least

SPLITS = frozenset({"train", "validation", "val", "test"})
MAX_ROW_GROUP_BYTES = 4 << 30  # of images; a row group is read as a whole
_CACHED_ROW_GROUPS = 2


@dataclass(frozen=True, kw_only=True)
class ParquetConfig:
    """A Parquet file, or the files of a folder in the order of their names. Needs pyarrow.

    size: side of the images after the crop.
    upright: rotate images by their EXIF orientation tag.
    image: the column of encoded images: bytes, or a struct with a field `bytes`.
    label: the column of class indices, from 0.
    files: which files of the folder, such as `train-*.parquet`.
    """

    path: Path
    kind: Literal["parquet"] = "parquet"
    size: int = 256
    upright: bool = True
    image: str = "image"
    label: str = "label"
    files: str = "*.parquet"

    def __post_init__(self) -> None:
        at_least(self, size=1)


class _RowGroup(NamedTuple):
    """A row group of a file. first, first_in_file: index of its first image, over all files and in its file."""

    file: Path
    number: int
    first: int
    first_in_file: int


class ParquetImages:
    """The images of ParquetConfig, in the order of files and rows. Labels are read at the start, images on access.

    Attributes:
        files: the Parquet files, in their order.

    Raises:
        ValueError: names the file, if it is not a Parquet file, a column is missing, or a label is not a class index.
    """

    classes: tuple[str, ...] = ()

    def __init__(self, config: ParquetConfig) -> None:
        self.config, self.size, self.upright = config, config.size, config.upright
        self.groups: list[_RowGroup] = []
        self.labels = np.zeros(0, np.int64)
        self.files = _files(config)
        for file in self.files:
            self._scan(file)
        if not len(self.labels):
            raise ValueError(f"source.path: the files in {config.path} have no rows")
        self.num_classes = int(self.labels.max()) + 1
        self._cache: OrderedDict[int, Any] = OrderedDict()
        self._process = os.getpid()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        at = bisect.bisect_right(self.groups, index, key=lambda group: group.first) - 1
        group = self.groups[at]
        row = index - group.first
        name = f"{group.file}, row {group.first_in_file + row}"
        value = self._column(at, name)[row].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None:
            place = value.get("path") if isinstance(value, dict) else None
            where = f", with the path {place!r} alone; write the dataset with its images embedded" if place else ""
            raise UnreadableImage(f"{name}: the image is null{where}")
        return read_image(io.BytesIO(content), self.size, self.upright, name), int(self.labels[index])

    def _scan(self, file: Path) -> None:
        """Add a file: its row groups, from the footer, and its labels."""
        pyarrow, parquet = _pyarrow()
        try:
            with parquet.ParquetFile(file) as opened:
                self._check_columns(file, opened, pyarrow)
                _check_rows(file, opened.metadata.num_rows)
                column = opened.read([self.config.label], use_threads=False).column(0)
                counts = [opened.metadata.row_group(g).num_rows for g in range(opened.num_row_groups)]
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(file_error(file, "parquet", error)) from error
        labels = column.cast(pyarrow.int64(), safe=False).fill_null(-1).to_numpy()
        wrong = np.flatnonzero((labels < 0) | (labels >= MAX_CLASSES))
        if len(wrong):
            raise ValueError(
                f"{file}, row {wrong[0]}: {self.config.label} {column[int(wrong[0])].as_py()} is not a class index; "
                f"allowed: 0 to {MAX_CLASSES - 1:,}"
            )
        first = 0
        for number, count in enumerate(counts):
            if count:
                self.groups.append(_RowGroup(file, number, len(self.labels) + first, first))
            first += count
        self.labels = np.concatenate([self.labels, labels])

    def _check_columns(self, file: Path, opened: Any, pyarrow: Any) -> None:
        schema, types = opened.schema_arrow, pyarrow.types
        for key in ("image", "label"):
            if getattr(self.config, key) not in schema.names:
                raise ValueError(
                    f"source.{key}: {getattr(self.config, key)!r} is not a column of {file}; it has: "
                    f"{', '.join(schema.names)}"
                )
            if schema.names.count(getattr(self.config, key)) > 1:
                raise ValueError(
                    f"source.{key}: {file} has {schema.names.count(getattr(self.config, key))} columns of the name "
                    f"{getattr(self.config, key)!r}; allowed: one"
                )
        image, label = (schema.field(name).type for name in (self.config.image, self.config.label))
        if types.is_struct(image) and image.get_field_index("bytes") >= 0:
            image = image.field("bytes").type
        if not (types.is_binary(image) or types.is_large_binary(image)):
            raise ValueError(
                f"source.image: the column has type {image} in {file}; allowed: binary, or a struct with binary bytes"
            )
        if not types.is_integer(label):
            raise ValueError(f"source.label: the column has type {label} in {file}; allowed: integers")

    def _column(self, at: int, name: str) -> Any:
        """The images of a row group. Caches the last row groups, separately in every process."""
        if self._process != os.getpid():
            self._cache, self._process = OrderedDict(), os.getpid()
        if at in self._cache:
            self._cache.move_to_end(at)
            return self._cache[at]
        group = self.groups[at]
        pyarrow, parquet = _pyarrow()
        try:
            with parquet.ParquetFile(group.file) as opened:
                found = opened.metadata.row_group(group.number)
                size = sum(
                    column.total_uncompressed_size
                    for column in map(found.column, range(found.num_columns))
                    if column.path_in_schema.partition(".")[0] == self.config.image
                )
                if size > MAX_ROW_GROUP_BYTES:
                    raise ValueError(
                        f"{group.file}: row group {group.number} has {size / 2**30:.1f} GiB of images; allowed: "
                        f"{MAX_ROW_GROUP_BYTES >> 30}; write it with fewer rows per group"
                    )
                column = opened.read_row_group(group.number, [self.config.image], use_threads=False).column(0)
        except (pyarrow.ArrowException, OSError) as error:
            raise UnreadableImage(f"{name}: {error}") from error
        self._cache[at] = column
        while len(self._cache) > _CACHED_ROW_GROUPS:
            self._cache.popitem(last=False)
        return column


def _check_rows(file: Path, rows: int) -> None:
    """Refuse a footer that claims more rows than the file has bytes: each row takes memory for its label.

    Raises:
        ValueError: names the file.
    """
    if rows > file.stat().st_size:
        raise ValueError(f"{file}: {rows:,} rows in {file.stat().st_size:,} bytes; allowed: one image in each row")


def _files(config: ParquetConfig) -> list[Path]:
    files = [config.path]
    if config.path.is_dir():
        files = sorted((path for path in config.path.glob(config.files) if not is_hidden(path)), key=sort_key)
        listing = list_files(config.path, {".parquet"})
        for path in set(listing.files) - set(files):
            listing.others.add(".parquet of another name or folder", str(path))
        listing.others.warn(config.path, config.files)
    if not files or not files[0].is_file():
        raise ValueError(f"source.path: {config.path} is neither a Parquet file nor a folder with {config.files}")
    splits = sorted({file.name.partition("-")[0] for file in files} & SPLITS)
    if len(splits) > 1:
        raise ValueError(
            f"source.files: {config.files} matches files of {' and '.join(splits)}; choose one, such as "
            f"{splits[0]}-*.parquet"
        )
    return files


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError("source.kind: parquet needs pyarrow; install sfd-scale[parquet]") from error
    return pyarrow, parquet
