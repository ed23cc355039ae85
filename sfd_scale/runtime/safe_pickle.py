"""The base of our unpicklers: no access to code, and no memory that the file merely claims."""

from __future__ import annotations

import pickle
from typing import Any, ClassVar


class SafeUnpickler(pickle._Unpickler):
    """Python's own unpickler without the C accelerator, without code, and without opcodes that claim memory.

    A few bytes of a pickle make the accelerator take gigabytes: it has an array with one place for each number up to
    the largest number of a memo. This class has a dictionary. A subclass gives `find_class`.
    """

    dispatch: ClassVar[dict[int, Any]] = {
        opcode: read for opcode, read in pickle._Unpickler.dispatch.items() if opcode != pickle.BYTEARRAY8[0]
    }

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"the pickle names {module}.{name}")
