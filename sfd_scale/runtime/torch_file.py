"""Reads files of torch.save without executing code from their pickle.

A pickle can call any function. This reader calls only the functions that rebuild tensors. Every other name in the
pickle becomes an `Inert` object, which keeps its arguments and does nothing. So files with objects of libraries that
are not installed can be read too.

Differences from `torch.load(weights_only=True, mmap=True)`, as of torch 2.15: only the requested tensors are read; the
size and the CRC-32 of a tensor are checked, where torch returns the damaged numbers; a tensor that is larger than its
storage (stride 0) is refused; unknown classes need no list.
"""

from __future__ import annotations

import io
import math
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfd_scale.runtime.file_kind import file_error, require_kind
from sfd_scale.runtime.safe_pickle import SafeUnpickler

_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_MAX_SETTINGS = 100_000


class Inert:
    """Stands for an object of an unknown class. `name` is the class; `arguments`, `state` and `items` its content."""

    name = ""

    def __new__(cls, *arguments: Any, **_: Any) -> Inert:
        instance = super().__new__(cls)
        instance.arguments = arguments
        instance.state = None
        instance.items = []
        return instance

    def __init__(self, *_: Any, **__: Any) -> None: ...

    arguments: tuple[Any, ...]
    state: Any
    items: list[Any]

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        self.items.append(value)

    def extend(self, values: Sequence[Any]) -> None:
        self.items.extend(values)


@dataclass(frozen=True)
class Storage:
    """`count` elements in the file's record data/`key`."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is not read yet. Offset and stride are in elements, as for `torch.as_strided`."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class TensorUnpickler(SafeUnpickler):
    """An unpickler without access to code: a pickle gets functions and classes only from `find_class`."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return _DTYPES[name]
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
            # A new function for each call, because a pickle can set attributes of a function.
            return lambda storage, offset, shape, stride, *_: _lazy(storage, offset, tuple(shape), tuple(stride))
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda data, *_: data
        if (module, name) == ("torch", "Size"):
            return tuple
        return type(name.rpartition(".")[2] or "Inert", (Inert,), {"name": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _, count = pid[:5]
        if pid[5:] not in ((), (None,)):  # before PyTorch 0.4, a storage could be a view of another
            raise pickle.UnpicklingError(f"a view of a storage: {pid[5:]}")
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"unknown kind of storage: {kind} {dtype}")
        if type(count) is not int or count < 0:
            raise pickle.UnpicklingError(f"a storage of {count!r} elements")
        return Storage(str(key), dtype, count)


def _lazy(storage: Any, offset: Any, shape: tuple[Any, ...], stride: tuple[Any, ...]) -> LazyTensor:
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, Storage) or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise pickle.UnpicklingError(f"a tensor of shape {shape}, stride {stride}, offset {offset}")
    # A stride of 0 would allow tensors of any size over a few bytes.
    if len(shape) != len(stride) or math.prod(shape) > storage.count:
        raise pickle.UnpicklingError(f"a tensor of shape {shape} in a storage of {storage.count} elements")
    return LazyTensor(storage, offset, shape, stride)


class TorchFile:
    """A file of torch.save.

    Attributes:
        content: the saved object, with LazyTensor in place of tensors and Inert in place of unknown objects.

    Raises:
        ValueError: names the file, if it is missing, damaged, a Git-LFS pointer, or not a file of torch.save.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        require_kind(path, "torch")
        try:
            self._zip = zipfile.ZipFile(path)
            self._root = next(n for n in self._zip.namelist() if n.endswith("data.pkl")).removesuffix("data.pkl")
            names = self._zip.namelist()
            if any(info.compress_type != zipfile.ZIP_STORED for info in self._zip.infolist()):
                raise ValueError("its records are compressed, but torch.save does not compress")
            order = self._zip.read(f"{self._root}byteorder") if f"{self._root}byteorder" in names else b"little"
            self.content: Any = TensorUnpickler(io.BytesIO(self._zip.read(f"{self._root}data.pkl"))).load()
        except zipfile.BadZipFile as error:
            raise ValueError(file_error(path, "torch", error)) from error
        except StopIteration:
            raise ValueError(f"{path} is a zip file, but not of torch.save: it has no data.pkl") from None
        except Exception as error:
            raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error
        if order != sys.byteorder.encode():
            raise ValueError(f"{path} has {order[:8]!r}-endian numbers, but this machine is {sys.byteorder}-endian")

    def load(self, value: Any) -> Any:
        """Read the tensors in a part of `content`, inside dicts, lists and tuples.

        Raises:
            ValueError: names the file, if a tensor is damaged, or an object contains itself.
        """
        storages: dict[Storage, Tensor] = {}
        done: dict[int, Any] = {}  # by identity: an object that occurs twice is read once, or few bytes become many

        def load(item: Any) -> Any:
            if isinstance(item, LazyTensor):
                return self._tensor(item, storages)
            if not isinstance(item, dict | list | tuple):
                return item
            if id(item) not in done:
                if isinstance(item, dict):
                    done[id(item)] = {key: load(part) for key, part in item.items()}
                else:
                    done[id(item)] = type(item)(load(part) for part in item)
            return done[id(item)]

        try:
            return load(value)
        except RecursionError as error:
            raise ValueError(f"{self.path} is damaged: an object in it contains itself") from error

    def read_storage(self, storage: Storage) -> bytearray:
        """The bytes of a storage. Errors are those of `zipfile`, and ValueError for a record of another size."""
        # Check the size first: a damaged file may give any size.
        size = storage.count * storage.dtype.itemsize
        info = self._zip.getinfo(f"{self._root}data/{storage.key}")
        if info.file_size < size:
            raise ValueError(f"it has {info.file_size} bytes, expected {size}")
        return bytearray(self._zip.read(info))

    def _tensor(self, lazy: LazyTensor, storages: dict[Storage, Tensor]) -> Tensor:
        storage = lazy.storage
        if storage not in storages:
            try:
                data = self.read_storage(storage)
            except (KeyError, ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
                raise ValueError(f"{self.path} is truncated or damaged at tensor {storage.key}: {error}") from error
            whole = torch.frombuffer(data, dtype=storage.dtype, count=storage.count) if storage.count else None
            storages[storage] = torch.empty(0, dtype=storage.dtype) if whole is None else whole
        last = lazy.offset + sum((n - 1) * step for n, step in zip(lazy.shape, lazy.stride, strict=True))
        if math.prod(lazy.shape) and not 0 <= last < storage.count:
            raise ValueError(
                f"{self.path} is damaged: a tensor of shape {lazy.shape} exceeds its storage of {storage.count}"
            )
        return storages[storage].as_strided(lazy.shape, lazy.stride, lazy.offset)


def plain(value: Any) -> Any:
    """Convert settings to dicts, lists and values: unpacks OmegaConf's nodes, which were read as Inert objects.

    Raises:
        ValueError: if the settings contain themselves, or have more than 100,000 values.
    """
    budget = iter(range(_MAX_SETTINGS))

    def convert(item: Any) -> Any:
        if next(budget, None) is None:
            raise ValueError(f"settings of more than {_MAX_SETTINGS} values")
        if isinstance(item, Inert):
            state = item.state
            for content in ("_content", "_val"):
                if isinstance(state, dict) and content in state:
                    return convert(state[content])
            return item.name
        if isinstance(item, dict):
            return {key: convert(part) for key, part in item.items()}
        if isinstance(item, list | tuple):
            return [convert(part) for part in item]
        return item

    try:
        return convert(value)
    except RecursionError as error:
        raise ValueError("settings that contain themselves") from error
