"""sfd-scale: train and evaluate Semantic-First Diffusion (arXiv 2512.04926).

`sfd_scale.load("model.safetensors")` draws images from a trained model. Names are imported when they are used: without
them, `import sfd_scale` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sfd_scale.runtime import environment

environment.prepare()  # before a library reads a variable or looks for a GPU

if TYPE_CHECKING:
    from sfd_scale.diffusion.guidance import AutoGuidance, ClassifierFreeGuidance, InternalGuidance, NoGuidance
    from sfd_scale.recipe import TrainRecipe
    from sfd_scale.sample import Output, Pipeline, SFDModel, load

__version__ = "0.1.0"
__all__ = [
    "AutoGuidance",
    "ClassifierFreeGuidance",
    "InternalGuidance",
    "NoGuidance",
    "Output",
    "Pipeline",
    "SFDModel",
    "TrainRecipe",
    "__version__",
    "load",
]
_HOME = {
    "AutoGuidance": "diffusion.guidance",
    "ClassifierFreeGuidance": "diffusion.guidance",
    "InternalGuidance": "diffusion.guidance",
    "NoGuidance": "diffusion.guidance",
    "Output": "sample",
    "Pipeline": "sample",
    "load": "sample",
    "SFDModel": "sample",
    "TrainRecipe": "recipe",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
