"""Imports MosaicML streaming without its text and video datasets."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

# `import streaming` imports these modules, and they import transformers and scikit-learn. That is most of the ten
# seconds of the import, in every rank. We use none of them.
_UNUSED = ("streaming.multimodal", "streaming.text", "streaming.vision", "streaming.base.dataloader")


def streaming(module: str = "streaming") -> ModuleType:
    """Import a module of the library, such as streaming.base.format."""
    if "streaming" not in sys.modules:
        placeholders = {name: ModuleType(name) for name in _UNUSED}
        placeholders["streaming.base.dataloader"].StreamingDataLoader = None  # type: ignore[attr-defined]
        sys.modules.update(placeholders)
        try:
            importlib.import_module("streaming")
        finally:
            for name in placeholders:
                del sys.modules[name]
    return importlib.import_module(module)
