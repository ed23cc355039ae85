"""MosaicML streaming, without its ready-made corpora."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

# `import streaming` brings these, and they bring transformers and scikit-learn: most of the import's ten seconds, in
# every rank of every run, for text and video data sets and a loader that are not used here.
_UNUSED = ("streaming.multimodal", "streaming.text", "streaming.vision", "streaming.base.dataloader")


def streaming(module: str = "streaming") -> ModuleType:
    """A module of the library, such as streaming.base.format."""
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
