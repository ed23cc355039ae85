"""The custom pipeline of diffusers in a folder for the Hugging Face hub. It needs sfd-scale installed.

`sfd export --hub-folder` copies this file as pipeline.py. `DiffusionPipeline.from_pretrained(folder,
custom_pipeline=folder, trust_remote_code=True)` loads it, and it draws the same bits as `sfd_scale.load(folder)`.
"""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline

import sfd_scale


class SFDPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Semantic-First Diffusion (arXiv 2512.04926). The arguments of a call are those of `sfd_scale.Pipeline`."""

    def __init__(self) -> None:
        super().__init__()
        self._pipeline: sfd_scale.Pipeline | None = None

    def __call__(self, labels: Any = None, **settings: Any) -> sfd_scale.Output:
        if self._pipeline is None:
            self._pipeline = sfd_scale.load(self.config._name_or_path)
        return self._pipeline(labels, **settings)
