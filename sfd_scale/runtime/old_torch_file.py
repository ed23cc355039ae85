"""Reads files of torch.save before PyTorch 1.6 without executing code from their pickles.

Such a file is a sequence: a magic number, a version, the sizes of the machine's types, the saved object, the list of
storages, then the numbers of each storage. The first five are pickles.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

from sfd_scale.runtime.file_kind import file_error
from sfd_scale.runtime.torch_file import Storage, TensorUnpickler, TorchFile

_VERSION = 1001
_COUNT_BYTES = 8  # before the numbers of a storage: their count


class _Unpickler(TensorUnpickler):
    """Keeps the storages that the saved object names."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.storages: dict[str, Storage] = {}

    def persistent_load(self, pid: Any) -> Storage:
        storage = super().persistent_load(pid)
        return self.storages.setdefault(storage.key, storage)


class OldTorchFile(TorchFile):
    """A file of torch.save before PyTorch 1.6; see `TorchFile`.

    Raises:
        ValueError: names the file, if it is missing or damaged, or was written on a big-endian machine.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size = path.stat().st_size
        try:
            with path.open("rb") as file:
                _, version, machine = (TensorUnpickler(file).load() for _ in range(3))
                if version != _VERSION or not isinstance(machine, dict) or machine.get("little_endian") is not True:
                    raise ValueError(f"version {version}, machine {machine}; allowed: {_VERSION}, little_endian")
                saved = _Unpickler(file)
                self.content = saved.load()
                keys = [str(key) for key in TensorUnpickler(file).load()]
                self._offsets = _offsets(file, [saved.storages[key] for key in keys])
        except Exception as error:
            raise ValueError(file_error(path, "weights", error)) from error

    def read_storage(self, storage: Storage) -> bytearray:
        """The bytes of a storage. Raises KeyError, or ValueError if the file has another count of numbers."""
        size = storage.count * storage.dtype.itemsize
        start = self._offsets[storage.key] + _COUNT_BYTES
        with self.path.open("rb") as file:
            file.seek(start - _COUNT_BYTES)
            count = int.from_bytes(file.read(_COUNT_BYTES), "little")
            if count != storage.count or start + size > self._size:
                raise ValueError(f"it has {count} numbers, expected {storage.count}, {self._size - start} bytes follow")
            return bytearray(file.read(size))


def _offsets(file: BinaryIO, storages: list[Storage]) -> dict[str, int]:
    """The position of each storage in the file, by key. The storages follow each other from the current position."""
    offsets = dict[str, int]()
    for storage in storages:
        offsets[storage.key] = file.tell()
        count = int.from_bytes(file.read(_COUNT_BYTES), "little")
        file.seek(count * storage.dtype.itemsize, 1)
    return offsets
